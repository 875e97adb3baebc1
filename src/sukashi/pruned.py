"""From a plan and a ratio to a network that is smaller on disk and in use: mask, removal, saved folder, ONNX."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from sukashi import models, surgery
from sukashi.errors import ModelError, ResourceError, UsageError, writing
from sukashi.models import RECIPE, WEIGHTS, Loaded, Recipe
from sukashi.types import Mask, Plan

ROUND_TO = 8
_ONNX_CAP = 2**31  # bytes a protobuf message can hold
# Of fp32 logits that should be equal, between two runtimes with their own kernels.
_ONNX_TOLERANCE = 1e-4


def round_mask(plan: Plan, ratio: float, round_to: int = ROUND_TO) -> Mask:
    """The mask of a ratio, each site's kept units rounded up to a multiple of `round_to` (1 = the exact ratio).

    Odd widths are slow on most hardware. Rounding only gives back, the last units removed of a site first, so never
    more is removed than was asked for, and a unit never goes before another that the plan removes earlier. A site
    without enough units for the next multiple stays whole. The ratio that comes out is
    `mask.n_removed / mask.n_units`; small networks lose much of what was asked for.

    Raises UsageError for a ratio outside [0, 1) or a `round_to` below 1.
    """
    check_round_to(round_to)
    mask = plan.mask(ratio)
    order = plan.site[: mask.n_removed], plan.unit[: mask.n_removed]
    keep = {}
    for position, site in enumerate(plan.sites):
        n_kept = int(mask.keep[site].sum())
        n_back = min(-n_kept % round_to, site.n_units - n_kept)
        gone = order[1][order[0] == position]
        keep[site] = mask.keep[site].clone()
        keep[site][torch.from_numpy(gone[len(gone) - n_back :].astype(np.int64))] = True
    return Mask(keep)


def cut(loaded: Loaded, mask: Mask, mode: str = "cut") -> Loaded:
    """A copy of the model with a mask's units removed, in one of surgery.MODES; the given one is left alone.

    Raises UsageError where the mask would leave a site without units.
    """
    model = copy.deepcopy(loaded.model)
    table = surgery.MODES[mode](model, mask)
    return replace(loaded, model=model, cuts=(*loaded.cuts, table), weights_sha256=models.digest(model))


def check_round_to(round_to: int) -> None:
    """Refuse a multiple below 1."""
    if round_to < 1:
        raise UsageError(f"round_to must be at least 1, got {round_to}: 1 keeps the exact ratio")


def check_onnx_installed() -> None:
    """Refuse to export where a package of the extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"ONNX export needs {package}: pip install 'sukashi[onnx]'")


def check_free(path: Path) -> None:
    """Refuse a path that exists, with UsageError, and one whose folder can't be made or written, with ResourceError."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: nothing is overwritten; give another place or remove it")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ResourceError(f"cannot write {path} ({above} is no folder with that right): give another place")


def save(
    folder: str | Path,
    loaded: Loaded,
    *,
    provenance: Mapping[str, Any],
    figures: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Recipe:
    """The recipe written: a new folder with `model.safetensors`, `recipe.json` and further `files` by name.

    `sukashi.load(folder)` rebuilds the model. `provenance` says where it comes from, `figures` what was measured; both
    are JSON. The folder appears whole or not at all: it is written beside its place and then renamed.

    Raises UsageError for a folder that exists, ResourceError where there is no space or no right to write.
    """
    folder = Path(folder)
    check_free(folder)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in loaded.model.state_dict().items()}
    # No metadata: safetensors writes it in random order, and equal models should give equal bytes.
    weights = safetensors.torch.save(state)
    recipe = Recipe(
        format=1,
        model=models.ArchitectureRecipe(spec=loaded.spec, **loaded.options),
        preprocess=models.InputRecipe(**asdict(loaded.preprocess)),
        n_classes=loaded.n_classes,
        class_names=loaded.class_names,
        cuts=loaded.cuts,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        tensors=models.tensor_digests(state),
        provenance=dict(provenance),
        figures=dict(figures),
    )
    contents = {WEIGHTS: weights, RECIPE: json.dumps(recipe.model_dump(), allow_nan=False).encode(), **(files or {})}
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as draft:
            draft.mkdir()
            for name, content in contents.items():
                _write(draft / name, content)
            _sync(draft)
            check_free(folder)
            draft.rename(folder)
        _sync(folder.parent)
    return recipe


def export_onnx(loaded: Loaded, path: str | Path) -> None:
    """One ONNX file for any batch size, whose logits onnxruntime computes as torch does (within 1e-4 of the largest).

    Input `images` (B, C, H, W), preprocessed; output `logits` (B, K). Appears whole or not at all.

    Raises UsageError where the extra is not installed or the file exists, ModelError for a model that torch cannot
    export or that gives other logits, ResourceError where there is no space.
    """
    path = Path(path)
    check_onnx_installed()
    check_free(path)
    model = copy.deepcopy(loaded.model).cpu()
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if n_bytes >= _ONNX_CAP:
        raise ModelError(f"the model has {n_bytes:,} bytes of weights: one ONNX file holds less than {_ONNX_CAP:,}")
    shape = (loaded.preprocess.channels, loaded.preprocess.height, loaded.preprocess.width)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as draft:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.onnx.export(
                        model,
                        (images,),
                        draft,
                        input_names=["images"],
                        output_names=["logits"],
                        dynamic_shapes=({0: torch.export.Dim("batch")},),
                        dynamo=True,
                        external_data=False,
                        verbose=False,
                    )
            except OSError:
                raise
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ModelError(
                    f"torch cannot export {loaded.spec} to ONNX ({reason}): save it as a folder"
                ) from error
            _check_onnx(model, draft, images)
            _sync(draft)
            check_free(path)
            draft.rename(path)


def _check_onnx(model: torch.nn.Module, path: Path, images: torch.Tensor) -> None:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch).numpy()
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        if not worst <= _ONNX_TOLERANCE:
            raise ModelError(
                f"onnxruntime gives logits {worst:.1e} of the largest apart, {_ONNX_TOLERANCE:.0e} is allowed: "
                "save the model as a folder"
            )


# Writing.


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place for a draft on the same disk; what is still there afterwards is removed."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
