"""What a saved folder says of its model, `recipe.json`, checked as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sukashi.core.bounded import read
from sukashi.core.errors import ModelError, nearest
from sukashi.core.files import FORMAT, canonical
from sukashi.network.surgery import Table

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
MASKS = "masks.safetensors"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class InputRecipe(Strict):
    """`types.Preprocess`, written down."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter: int | None = Field(None, exclude_if=lambda shorter: shorter is None)


class ArchitectureRecipe(Strict):
    """The spec, and the options of `load` that shape the architecture."""

    spec: str
    n_classes: int | None = Field(None, ge=1, le=1_000_000)
    width: int | None = Field(None, ge=1, le=65_536)
    output: str | None = None
    size: int | None = Field(None, ge=1, le=4096, exclude_if=lambda size: size is None)


class MaskRecipe(Strict):
    """`Loaded.mask`, written down: the hash of masks.safetensors, and the shape of each masked layer's weight."""

    sha256: str
    shapes: dict[str, tuple[int, ...]]


class TrainedRecipe(Strict):
    """`loaded.Trained`, written down."""

    splits: str
    validation: float


class Recipe(Strict):
    """`recipe.json` of a saved folder: how to rebuild the model, and where it came from.

    `weights_sha256` is the hash of model.safetensors, `tensors` that of each tensor in it; `mask` is there for a model
    that has one, `trained_on` where all is known that its weights were trained on; `provenance` is for readers.
    `sha256` is the hash of all else in the recipe.
    """

    format: Literal[5]  # files.FORMAT
    model: ArchitectureRecipe
    preprocess: InputRecipe
    n_classes: int
    class_names: tuple[str, ...] | None
    cuts: tuple[Table, ...]
    weights_sha256: str
    tensors: dict[str, str]
    provenance: dict[str, Any]
    mask: MaskRecipe | None = None
    trained_on: tuple[TrainedRecipe, ...] | None = None
    sha256: str


def recipe_sha256(path: Path) -> str:
    """The hash of a `recipe.json`, by which a file says of which network it was made."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what a recipe's network gives and what that is called: all but `provenance`."""
    said = {name: value for name, value in recipe.items() if name not in ("provenance", "sha256")}
    return hashlib.sha256(canonical(said)).hexdigest()


def read_recipe(path: Path) -> Recipe:
    """The `recipe.json` of a saved folder, checked. Raises ModelError for what is none."""
    try:
        text = read(path)
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}): a saved model is a folder with this file") from error
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        other = next((fault for fault in error.errors() if fault["loc"] == ("format",)), None)
        if other is not None and other["type"] == "literal_error":
            raise ModelError(
                f"{path} has format {other['input']}, this version reads {FORMAT}: save the network again with this one"
            ) from error
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            parts: dict[str, type[BaseModel]] = {
                "model": ArchitectureRecipe,
                "preprocess": InputRecipe,
                "mask": MaskRecipe,
            }
            known = parts.get(str(first["loc"][0]), Recipe).model_fields
            raise ModelError(f"{path} has an unknown key {where!r}{nearest(str(first['loc'][-1]), known)}") from error
        raise ModelError(f"{path} is no recipe: {where or 'all of it'}: {first['msg']}") from error
