"""Saved folders: a network written as weights and recipe, and rebuilt from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from sukashi.core.errors import ModelError, UsageError, writing
from sukashi.core.files import FORMAT, beside, check_free, sync, write_new
from sukashi.core.types import Mask, Preprocess
from sukashi.models.checks import noise, probe
from sukashi.models.formats import holds_weights, read
from sukashi.models.loaded import LIBRARIES, READ, Loaded, Origin, Trained
from sukashi.models.recipe import (
    MASKS,
    RECIPE,
    WEIGHTS,
    ArchitectureRecipe,
    InputRecipe,
    MaskRecipe,
    Recipe,
    TrainedRecipe,
    digest,
    read_recipe,
)
from sukashi.models.specs import build, prepare
from sukashi.models.weights import fill, tensor_digests
from sukashi.network import sparsity, surgery


def code_of(folder: str | Path) -> str | None:
    """The import path without which the network of a saved folder can't be built; None where there is none."""
    recipe = Path(folder) / RECIPE
    made = read_recipe(recipe).model.spec if recipe.is_file() else LIBRARIES[0]
    return None if made.partition(":")[0] in LIBRARIES else made


def open_folder(folder: Path, spec: str | None) -> Loaded:
    """The model of a saved folder, rebuilt from its recipe; `spec` is what the caller takes it for."""
    if spec is None and not (folder / RECIPE).exists() and holds_weights(folder):
        raise UsageError(
            f"{folder} holds weights without a {RECIPE}: give the model's name, and `weights={str(folder)!r}`"
        )
    recipe = read_recipe(folder / RECIPE)
    try:
        preprocess = Preprocess(**recipe.preprocess.model_dump())
    except UsageError as error:
        raise ModelError(f"{folder / RECIPE} is no recipe: preprocess: {error}") from error
    options = recipe.model.model_dump(exclude_none=True)
    made = options.pop("spec")
    if spec is not None and spec != made:
        raise ModelError(f"{folder} holds a {made}, not a {spec}: give the spec it was made from")
    if spec is None and made.partition(":")[0] not in LIBRARIES:
        raise needs_code(folder, made, f"`model={made!r}` with `weights={str(folder)!r}`")
    file = read(folder / WEIGHTS)
    found = tensor_digests(file.tensors)
    if file.sha256 != recipe.weights_sha256 or found != recipe.tensors:
        wrong = [name for name in sorted({*found, *recipe.tensors}) if found.get(name) != recipe.tensors.get(name)]
        raise ModelError(
            f"{file.path} has the SHA-256 {file.sha256[:16]}, its recipe says {recipe.weights_sha256[:16]}; first "
            f"tensor at fault: {wrong[0] if wrong else 'none, only the header differs'}: restore the folder"
        )
    bare, published, _ = build(made, options, False)
    published = published or preprocess
    model = prepare(bare, options)
    for table in recipe.cuts:
        surgery.replay(model, table)
    fill(model, file.tensors, file.path)
    mask = None if recipe.mask is None else _mask(folder / MASKS, recipe.mask, model)
    loaded = Loaded(
        model=prepare(model, {}),
        spec=made,
        options=options,
        preprocess=preprocess,
        n_classes=recipe.n_classes,
        class_names=recipe.class_names,
        weights_sha256=file.sha256,
        cuts=recipe.cuts,
        mask=mask,
        trained_on=None if recipe.trained_on is None else tuple(Trained(**dict(one)) for one in recipe.trained_on),
        read_by=dict.fromkeys(READ, Origin("the saved folder")),
        crop=(published.shorter or min(published.height, published.width)) / min(published.height, published.width),
    )
    probe(loaded, noise(loaded.preprocess))
    # Last: what cannot be is refused with a reason of its own, this is left for what could.
    if recipe.sha256 != digest(recipe.model_dump()):
        raise ModelError(
            f"{folder / RECIPE} is not as it was written, its hash is another; what it says of classes, preprocessing "
            "or cuts may be wrong: restore the folder"
        )
    return loaded


def needs_code(folder: str | Path, made: str, remedy: str) -> ModelError:
    return ModelError(
        f"{folder} needs the code of {made}, and a recipe must not choose what code runs: name it yourself, {remedy}"
    )


def _mask(path: Path, recipe: MaskRecipe, model: nn.Module) -> Mask:
    """The mask of a saved folder, which fits the model and whose removed weights are zero in it."""
    file = read(path)
    if file.sha256 != recipe.sha256:
        raise ModelError(
            f"{path} has the SHA-256 {file.sha256[:16]}, its recipe says {recipe.sha256[:16]}: restore the folder"
        )
    mask = sparsity.unpack(file.tensors, recipe.shapes)
    check_mask(model, mask, f"{WEIGHTS}: restore the folder")
    return mask


def check_mask(model: nn.Module, mask: Mask, where: str) -> None:
    """ModelError where a mask does not fit a network, or the weights that it removes are not zero."""
    sparsity.check_fits(model, mask)
    for site, keep in mask.keep.items():
        n_alive = int((sparsity.weight_of(model, site)[~keep] != 0).sum())
        if n_alive:
            raise ModelError(f"{n_alive} weights of layer {site.layer!r} that its mask removes are not zero in {where}")


def contents(loaded: Loaded, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a saved folder by name, the recipe last: `model.safetensors`, `recipe.json`, and with a mask
    `masks.safetensors`, one bit a weight: a 32nd of the weights' size on top of them, for zeros are stored like any
    number. Equal networks give equal bytes.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in loaded.model.state_dict().items()}
    # No metadata: safetensors writes it in random order, and equal models should give equal bytes.
    files = {WEIGHTS: safetensors.torch.save(state)}
    masked = None
    if loaded.mask is not None:
        files[MASKS] = safetensors.torch.save(sparsity.pack(loaded.mask))
        shapes = {site.layer: tuple(keep.shape) for site, keep in loaded.mask.keep.items()}
        masked = MaskRecipe(sha256=hashlib.sha256(files[MASKS]).hexdigest(), shapes=shapes)
    recipe = Recipe(
        format=FORMAT,
        model=ArchitectureRecipe(spec=loaded.spec, **loaded.options),
        preprocess=InputRecipe(**asdict(loaded.preprocess)),
        n_classes=loaded.n_classes,
        class_names=loaded.class_names,
        cuts=loaded.cuts,
        weights_sha256=hashlib.sha256(files[WEIGHTS]).hexdigest(),
        tensors=tensor_digests(state),
        provenance=dict(provenance),
        mask=masked,
        trained_on=None
        if loaded.trained_on is None
        else tuple(TrainedRecipe(**one._asdict()) for one in loaded.trained_on),
        sha256="",  # of the others
    )
    whole = recipe.model_dump()
    return files | {RECIPE: json.dumps(whole | {"sha256": digest(whole)}, allow_nan=False).encode()}


def save(folder: str | Path, loaded: Loaded, *, provenance: Mapping[str, Any]) -> None:
    """Write a new folder from which `sukashi.load(folder)` rebuilds the network; see `contents`.

    `provenance` says where it comes from, as JSON. The folder appears whole or not at all: it is written beside its
    place and then renamed.

    Raises UsageError for a folder that exists, ResourceError where there is no space or no right to write.
    """
    folder = Path(folder)
    check_free(folder)
    files = contents(loaded, provenance)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with beside(folder) as draft:
            draft.mkdir()
            for name, content in files.items():
                write_new(draft / name, content)
            sync(draft)
            check_free(folder)
            draft.rename(folder)
        sync(folder.parent)
