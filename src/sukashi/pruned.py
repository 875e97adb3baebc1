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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from sukashi import hooks, models, sparsity, surgery
from sukashi.criteria import criteria
from sukashi.errors import ModelError, ResourceError, UsageError, writing
from sukashi.models import MASKS, RECIPE, WEIGHTS, Loaded, Recipe
from sukashi.types import Batch, Mask, Plan, Scores, Site

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
    return replace(
        loaded,
        model=model,
        cuts=(*loaded.cuts, table),
        weights_sha256=models.digest(model),
        mask=loaded.mask and _cut_along(loaded, loaded.mask, table),
    )


@torch.no_grad()
def _cut_along(loaded: Loaded, mask: Mask, table: surgery.Table) -> Mask:
    """The mask of a sparse model after a cut: what surgery makes of weights of one and zero."""
    twin = copy.deepcopy(loaded.model)
    for site, keep in mask.keep.items():
        sparsity.weight_of(twin, site).copy_(keep)
    surgery.replay(twin, table)
    kept = {site: sparsity.weight_of(twin, site).cpu() != 0 for site in mask.keep}
    return Mask({replace(site, n_units=keep.numel()): keep for site, keep in kept.items()})


def weight_mask(
    loaded: Loaded,
    sites: Sequence[Site],
    data: Batch,
    criterion: str,
    ratio: float,
    scope: str,
    *,
    generator: torch.Generator,
    sequential: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Mask:
    """Which single weights stay, by one criterion: `sparsity.mask_of` of its scores; what is gone already stays gone.

    With `sequential` a layer is scored in the network in which all layers called before it are pruned already, in one
    pass over the images for each layer. Wanda's reference goes block by block, and measures the layers of a block
    before any of them is pruned: what a block is only some networks say. Needs a scope within a layer.

    Raises UsageError for what `check_sequential` and `sparsity.mask_of` refuse.
    """
    method, chosen = criteria[criterion], dict(options or {})
    if not sequential:
        scores: Scores = method(loaded.model, sites, data, generator=generator, **chosen)
        return sparsity.mask_of(scores, ratio, scope, within=loaded.mask)
    check_sequential(criterion, scope)
    model = copy.deepcopy(loaded.model)
    device = next(model.parameters()).device
    with torch.no_grad():
        order = hooks.calls(model, data.x[:1].to(device))
    first = {name: position for position, name in reversed(list(enumerate(order)))}
    keep: dict[Site, torch.Tensor] = {}
    for site in sorted(sites, key=lambda site: first.get(site.layer, len(order))):
        found = sparsity.mask_of(
            method(model, [site], data, generator=generator, **chosen), ratio, scope, within=loaded.mask
        )
        sparsity.enforce(model, found)
        keep |= found.keep
    return Mask({site: keep[site] for site in sites})


def check_sequential(criterion: str, scope: str) -> None:
    """Refuse to recalibrate layer by layer where it has no meaning."""
    if not criteria[criterion].facts.get("needs_data", True):
        raise UsageError(f"{criterion} looks at no image, so there is nothing to recalibrate: leave sequential out")
    if scope == "global":
        raise UsageError("sequential prunes layer by layer, scope global compares all layers: give scope layer or row")


def sparse(loaded: Loaded, mask: Mask) -> Loaded:
    """A copy of the model with the weights that a mask removes at zero, and the mask beside it.

    Masked zeros are not compression: the network keeps its shape, and with it its size and its latency. Layers that an
    older mask of the model speaks of and this one doesn't stay as they are.

    Raises ModelError for a mask of another architecture.
    """
    sparsity.check_fits(loaded.model, mask)
    model = copy.deepcopy(loaded.model)
    sparsity.enforce(model, mask)
    both = Mask({**(loaded.mask.keep if loaded.mask else {}), **mask.keep})
    return replace(loaded, model=model, weights_sha256=models.digest(model), mask=both)


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

    A mask goes into `masks.safetensors`, one bit a weight: a 32nd of the weights' size on top of them, for zeros are
    stored like any number. `sukashi.load(folder)` rebuilds the model. `provenance` says where it comes from, `figures`
    what was measured; both are JSON. The folder appears whole or not at all: it is written beside its place and then
    renamed.

    Raises UsageError for a folder that exists, ResourceError where there is no space or no right to write.
    """
    folder = Path(folder)
    check_free(folder)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in loaded.model.state_dict().items()}
    # No metadata: safetensors writes it in random order, and equal models should give equal bytes.
    weights = safetensors.torch.save(state)
    contents = {WEIGHTS: weights}
    masked = None
    if loaded.mask is not None:
        contents[MASKS] = safetensors.torch.save(sparsity.pack(loaded.mask))
        shapes = {site.layer: tuple(keep.shape) for site, keep in loaded.mask.keep.items()}
        masked = models.MaskRecipe(sha256=hashlib.sha256(contents[MASKS]).hexdigest(), shapes=shapes)
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
        mask=masked,
    )
    # A recipe without a mask is what it was before there were any.
    written = recipe.model_dump(exclude=None if masked else {"mask"})
    contents |= {RECIPE: json.dumps(written, allow_nan=False).encode(), **(files or {})}
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
