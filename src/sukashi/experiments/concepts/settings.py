"""What is asked of concepts."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sukashi.core.errors import UsageError
from sukashi.core.schema import MAX_SEED, option
from sukashi.experiments.reading import Masked, Single


def numbered(setting: str, given: str) -> tuple[str, tuple[int, ...]]:
    """The folder and the numbers of FOLDER:0,2. Raises UsageError where it is not both."""
    folder, _, numbers = given.rpartition(":")
    if not folder or not re.fullmatch(r"\d+(,\d+)*", numbers):
        raise UsageError(
            f"`{setting}` is a folder of concepts and numbers of its subspaces, as runs/concepts:0,2, got {given!r}"
        )
    return folder, tuple(map(int, numbers.split(",")))


class Concepts(Masked, Single):
    """Find subspaces of what a layer holds, by relevance or by what masks show, and the images each responds to."""

    kind: ClassVar[str] = "concepts"

    layer: str = option(
        help="Layer whose features are taken apart, as layer3 or features.22: a block or an activation."
    )
    of: str = option(help="Class for whose logit their relevance is, by name.")
    out: str = option(path=True, decides=False, help="Folder for results.")
    method: Literal["drsa", "contrast", "units"] = option(
        "drsa",
        help="drsa: all features, parted so that relevance falls into few parts, by training images of the class. "
        "contrast: the directions in which the layer tells training images that show something from the same "
        "without it: a `concept` of masks, or `where` a subspace is relevant. "
        "units: single features, as channels.",
    )
    subspaces: int | None = option(
        None,
        ge=1,
        le=4096,
        default="4",
        help="Of drsa: how many; they divide the layer's features. Of units: how many of those most relevant.",
    )
    units: list[Annotated[int, Field(ge=0)]] | None = option(
        None, min_length=1, max_length=64, help="Of units: which, by number, in place of the most relevant."
    )
    concept: str | None = option(None, help="Of contrast: what masks show, by name; it is imputed away.")
    where: str | None = option(
        None,
        path=True,
        decides=False,
        help="Of contrast, in place of masks: a subspace found before, as FOLDER:2; what images of the class show "
        "where it is most relevant is imputed away.",
    )
    imputed: float | None = option(
        None, gt=0, lt=1, default="0.1", help="With `where`: the share of the pixels that is imputed."
    )
    dimensions: int | None = option(None, ge=1, le=4096, default="2", help="Of contrast: how many directions.")
    images: int = option(500, ge=2, help="Training images at most.")
    positions: int | None = option(
        None, ge=1, default="20", help="Of drsa and units: positions of each of them, drawn."
    )
    explains: Literal["logit", "margin"] = option(
        "logit", help="Relevance for the logit of the class, or for its margin: its lead over the next."
    )
    rule: Literal["alpha1beta0", "epsilon_plus", "epsilon", "gamma"] = option(
        "alpha1beta0", help="Rule of LRP, see `sukashi list attributions lrp`."
    )
    trials: int | None = option(
        None, ge=1, le=1000, default="3", help="Of drsa: random starts, of which the best is taken."
    )
    test_images: int = option(500, help="Test images at most that are shown and judged, evenly over the classes.")
    seed: int = option(0, ge=0, le=MAX_SEED, help="Draws images, positions and starts.")

    @model_validator(mode="after")
    def _of_one_method(self) -> Self:
        own = {
            "drsa": ("subspaces", "positions", "trials"),
            "contrast": ("concept", "where", "imputed", "dimensions"),
            "units": ("subspaces", "units", "positions"),
        }
        others = {name for of in own.values() for name in of} - {*own[self.method]}
        if given := [name for name in type(self).model_fields if name in others and getattr(self, name) is not None]:
            raise UsageError(f"`{given[0]}` is of another method than `method={self.method!r}`: leave it out")
        if self.units is not None and (self.subspaces is not None or len(set(self.units)) < len(self.units)):
            raise UsageError("`units` are different numbers, and say themselves how many: leave `subspaces` out")
        if self.method == "contrast" and (self.concept is None) == (self.where is None):
            raise UsageError(
                "`method='contrast'` needs a `concept`, the name of what masks show, or `where`, a subspace found "
                "before: give one of them"
            )
        if self.imputed is not None and self.where is None:
            raise UsageError("`imputed` is about `where`: give that too, or leave it out")
        if self.where is not None:
            numbered("where", self.where)
        return self
