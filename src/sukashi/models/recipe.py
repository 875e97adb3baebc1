"""What a saved folder says of its model, `recipe.json`, checked as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sukashi.core.bounded import read
from sukashi.core.errors import ModelError, nearest
from sukashi.core.files import FORMAT
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


class Recipe(Strict):
    """`recipe.json` of a saved folder: how to rebuild the model, and where it came from.

    `weights_sha256` is the hash of model.safetensors, `tensors` that of each tensor in it; `mask` is there for a model
    that has one; `provenance` is for readers.
    """

    format: Literal[4]  # files.FORMAT
    model: ArchitectureRecipe
    preprocess: InputRecipe
    n_classes: int
    class_names: tuple[str, ...] | None
    cuts: tuple[Table, ...]
    weights_sha256: str
    tensors: dict[str, str]
    provenance: dict[str, Any]
    mask: MaskRecipe | None = None


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
