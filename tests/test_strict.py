"""What is wrong with settings, in one sentence that a beginner can act on."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from sukashi.core.errors import UsageError
from sukashi.core.schema import checked


class Leaf(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    colour: str = Field(examples=["green"])
    size: int | None = Field(3, ge=1)


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(examples=["oak"])
    leaves: dict[str, Leaf] = Field(examples=[{"NAME": {"colour": "green"}}])
    rings: list[int] = Field(default_factory=list)


GOOD = {"name": "oak", "leaves": {"a": {"colour": "green"}}}


def test_what_is_right_passes():
    assert checked(Tree, GOOD).leaves["a"].size == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nam": "oak"}, "f has an unknown key 'nam': did you mean 'name'? Known: name, leaves, rings"),
        ({"name": "oak"}, "f has no 'leaves': add [leaves.NAME] with colour = \"green\""),
        ({"leaves": {}}, "f has no 'name': add name = \"oak\", or give `name`"),
        ({**GOOD, "leaves": {"a": {}}}, "f has no 'colour' in [leaves.a]: add colour = \"green\""),
        (
            {**GOOD, "leaves": {"a": {"color": "green"}}},
            "f has an unknown key 'leaves.a.color': did you mean 'colour'? Known: colour, size",
        ),
        ({**GOOD, "leaves": {"a": {"colour": 3}}}, 'f: leaves.a.colour must be a string like "green", got 3'),
        ({**GOOD, "leaves": {"a": "green"}}, "f: leaves.a must be a table, got 'green'"),
        ({**GOOD, "rings": [1, "two"]}, "f: rings.1 must be a whole number, got 'two'"),
        (
            {**GOOD, "leaves": {"a": {"colour": "red", "size": 0}}},
            "f: leaves.a.size must be at least 1, got 0",
        ),
    ],
)
def test_what_is_wrong_is_said(given, said):
    with pytest.raises(UsageError) as found:
        checked(Tree, given, file="f", options=["name"])
    assert str(found.value) == said


def test_keywords_have_no_file():
    with pytest.raises(UsageError, match=r"^unknown setting 'wood': did you mean 'woods'\? Known: name, .*, woods$"):
        checked(Tree, {"wood": 1}, known=["woods"])
    with pytest.raises(UsageError, match=r'^`name` must be a string like "oak", got 1$'):
        checked(Tree, {**GOOD, "name": 1})
