"""A network as an ONNX file, and what float16 does to its answers."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sukashi import models
from sukashi.core import files, stats
from sukashi.core.errors import ModelError, UsageError, writing
from sukashi.core.experiment import Result
from sukashi.core.objective import CLASSIFICATION
from sukashi.core.types import pass_size
from sukashi.experiments.bench import Source, check_code
from sukashi.experiments.export.settings import Export
from sukashi.experiments.reading import Architecture, Pixels
from sukashi.measures import cost
from sukashi.models import Loaded, onnx
from sukashi.report import networks, words

N_RANDOM = 256


class ExportResult(Result):
    """A network as an ONNX file.

    `file` holds `bytes` bytes with that `sha256`, `infer` is the script beside it, None where image files can't feed
    the network. `metadata` is what the file says of itself. Of float16 `fp16` holds, beside the float32 file on
    `n_images` `images`: the `largest_difference` of a logit, as a fraction of the largest logit, and the share of
    `same_answers` with its 95 % interval, `low` to `high` (Wilson's), see `agree`. `latency_ms` is the median time of
    {images at once: a pass} in onnxruntime on `threads` of this machine's CPU, which a clock decides.
    """

    kind: ClassVar[str] = "export"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "latency_ms", "threads")

    model: str
    file: str
    infer: str | None
    bytes: int
    sha256: str
    metadata: dict[str, str]
    fp16: dict[str, Any] | None
    latency_ms: dict[str, float]
    threads: int
    notes: list[str]

    def text(self) -> str:
        said = [f"{self.file}: {words.printed(self.bytes, 'bytes')}, {self.metadata['precision']}"]
        if self.fp16:
            of = self.fp16
            said.append(
                f"float16 beside float32, on {of['n_images']:,} {of['images']}: {words.percent(of['same_answers'])} "
                f"the same answers ({words.percent(of['low'])} to {words.percent(of['high'])}), logits at most "
                f"{of['largest_difference']:.1e} of the largest apart"
            )
        times = [f"{words.printed(ms, 'ms')} ms for {networks.images_at_once(n)}" for n, ms in self.latency_ms.items()]
        said.append(f"onnxruntime takes {words.listed(times)}, on {words.several(self.threads, 'thread')} of this CPU")
        said += [f"note: {note}" for note in self.notes]
        if self.infer:
            said += [
                "",
                "Run it, with onnxruntime, Pillow and NumPy alone:",
                f"  {onnx.run_line(self.infer, self.file)}",
            ]
        return "\n".join(said)

    def table(self) -> list[dict[str, Any]]:
        """One row."""
        about = {name: getattr(self, name) for name in ("model", "file", "bytes", "sha256")}
        return [{**about, "precision": self.metadata["precision"]}]


def export(asked: Export) -> ExportResult:
    """See `functions.export`."""
    models.check_onnx_installed(fp16=asked.fp16)
    check_code(asked)
    path = _place(asked)
    files.check_free(path)
    loaded, images = _opened(asked)
    script, beside = models.infer_script(loaded.preprocess), path.with_name(models.INFER)
    if script and beside.exists() and beside.read_bytes() != script:
        raise UsageError(f"{beside} is another file: nothing is overwritten; give another place or remove it")
    folder = _folder(asked)
    recipe = folder and folder / models.RECIPE
    content = models.onnx_file(loaded, {} if recipe is None else {"recipe_sha256": models.recipe_sha256(recipe)})
    agreement = None
    if asked.fp16:
        whole, content = content, onnx.half(content)
        of = "random inputs" if images is None else f"test images of {asked.data}"
        x = images if images is not None else _random(loaded)
        agreement = {"images": of, **agree(whole, content, x.split(pass_size(x)))}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.check_free(path)
    if script:
        files.write(beside, script)
    files.write(path, content)
    return ExportResult(
        model=asked.model,
        file=str(path),
        infer=str(beside) if script else None,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        metadata=onnx.metadata(content),
        fp16=agreement,
        latency_ms=_latency(content, _random(loaded) if images is None else images),
        threads=torch.get_num_threads(),
        notes=[*loaded.notes, *_doubts(asked, recipe, script)],
    )


def agree(whole: bytes, content: bytes, parts: Iterable[torch.Tensor]) -> dict[str, Any]:
    """How near the answers of a float16 file are to those of the float32 file that it was made of: see `ExportResult`.

    It is run as a CPU has it, which rounds the weights alone, and as a GPU does, see `onnx.rounded`: the larger
    difference counts, and the same answers are the same in both.

    Raises ModelError for logits that are not finite.
    """
    ways, worst, largest, n_same, n = (whole, content, onnx.rounded(whole)), 0.0, 0.0, 0, 0
    sessions = [onnx.session(of) for of in ways]
    for part in parts:
        expected, *found = (onnx.logits(session, part.numpy()) for session in sessions)
        if not np.isfinite(found).all():
            raise ModelError(
                "the network has numbers above 65,504, which float16 does not hold, so that its logits are NaN or Inf: "
                "export it without `fp16`"
            )
        worst = max(worst, float(np.abs(np.stack(found) - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        answer, *answers = (CLASSIFICATION.answer(torch.from_numpy(of)) for of in (expected, *found))
        n_same += int(torch.stack([answer == other for other in answers]).all(0).sum())
        n += len(expected)
    same = stats.share(n_same, n)
    return {
        "n_images": n,
        "largest_difference": worst / largest,
        "same_answers": same.mean,
        "low": same.low,
        "high": same.high,
    }


def _latency(content: bytes, images: torch.Tensor) -> dict[str, float]:
    """{images at once: the median milliseconds of a pass}"""
    opened, found = onnx.session(content), {}
    for size in cost.SPEED_BATCHES:
        batch = cost.batch_of(images, size)
        (times,) = cost.latency([lambda x: onnx.logits(opened, x.numpy())], batch, seconds=5.0)
        found[str(size)] = statistics.median(times)
    return found


def _place(asked: Export) -> Path:
    name = onnx.ONNX_FP16 if asked.fp16 else onnx.ONNX
    if asked.file is not None:
        return Path(asked.file) if asked.file.endswith(".onnx") else Path(asked.file) / name
    if ":" not in asked.model and not Path(asked.model).exists():
        raise UsageError(
            f"there is no folder {asked.model!r}: give a saved network's, or a model's name with `file=FILE`"
        )
    folder = _folder(asked) or Path(asked.model)
    if not folder.is_dir():
        raise UsageError(f"{asked.model} is no folder that a file could lie in: say where, `file='FILE.onnx'`")
    return folder / "onnx" / name


def _opened(asked: Export) -> tuple[Loaded, torch.Tensor | None]:
    """The network, and with data its test images; then its classes are called as theirs."""
    if asked.data is None:
        given = {name: getattr(asked, name) for name in (*Architecture.model_fields, *Pixels.model_fields)}
        return models.load(asked.model, **given), None
    source = Source.of(asked, calibration=1)
    early = source.early()
    bench = source.beside(source.read(), early)
    names = bench.data.names_of_outputs(bench.loaded.class_names)
    return replace(bench.loaded, class_names=names), bench.test().x


def _folder(asked: Export) -> Path | None:
    """The saved folder that is exported."""
    given = (Path(place) for place in (asked.model, asked.weights) if place is not None)
    folders = (place.parent if place.name == models.WEIGHTS else place for place in given)
    return next((folder for folder in folders if (folder / models.RECIPE).is_file()), None)


def _random(loaded: Loaded) -> torch.Tensor:
    """(N_RANDOM, C, H, W) pixels drawn evenly, as the network reads them."""
    reads = loaded.preprocess
    drawn = torch.rand(N_RANDOM, reads.channels, reads.height, reads.width, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (reads.mean, reads.std))
    return (drawn - mean) / std


def _doubts(asked: Export, recipe: Path | None, script: bytes | None) -> list[str]:
    """What one who runs the file should know of the network."""
    found = []
    if asked.weights is None and not asked.pretrained and models.takes_classes(asked.model):
        found.append(
            f"{asked.model} has random weights, its answers mean nothing: give `weights=FILE` or a saved folder"
        )
    if script is None:
        found.append("image files have 1 or 3 channels, and this network reads another number: there is no infer.py")
    data = {} if recipe is None else models.read_recipe(recipe).provenance.get("data", {})
    if asked.data is None and str(data.get("spec", "")).startswith("memory:"):
        found.append(
            "the network learned from tensors in memory, and nobody knows how these were made of images: infer.py "
            "gives it pixels in [0, 1] as they are"
        )
    return found
