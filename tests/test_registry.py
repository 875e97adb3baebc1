"""Registries: a method is what its function says, and a wrong name is answered with the nearest."""

import math
from collections.abc import Callable
from typing import Literal

import pytest

from sukashi.core.errors import UsageError, nearest
from sukashi.core.registry import BatchSize, Registry
from sukashi.core.types import Site


@pytest.fixture
def spices():
    registry = Registry("spice", "spices")

    @registry.register("pepper", source="Peter Piper, p. 1", hot=True)
    def pepper(
        food,
        *,
        generator,
        grains: int = 3,
        dose: float = 0.5,
        mill: Literal["fine", "coarse"] = "fine",
        scoring: Callable[..., int] = len,
        _journal=None,
    ):
        """Peppered food, as hot as `grains`.

        More about pepper.
        """
        return food, grains

    @registry.register("salt", source="the sea")
    def salt(food, *, generator):
        return food

    return registry


def test_a_method_is_what_its_function_says(spices):
    pepper = spices["pepper"]
    assert (pepper.name, pepper.source, pepper.facts) == ("pepper", "Peter Piper, p. 1", {"hot": True})
    assert pepper.summary == "Peppered food, as hot as `grains`."
    assert pepper.options == {"grains": 3, "dose": 0.5, "mill": "fine", "scoring": len}
    assert pepper("egg", generator=None, grains=5) == ("egg", 5)
    assert spices["salt"].summary == ""
    assert (pepper.keeps_journal, spices["salt"].keeps_journal) == (True, False)


def test_a_registry_is_in_the_order_of_registration(spices):
    assert spices.names() == ["pepper", "salt"] == [method.name for method in spices]
    assert "salt" in spices
    assert "sugar" not in spices


def test_registering_leaves_the_function_itself(spices):
    @spices.register("mint", source="the garden")
    def mint(food, *, generator):
        return food + "!"

    assert mint("tea", generator=None) == "tea!"
    assert spices["mint"].fn is mint


@pytest.mark.parametrize(("name", "hint"), [("peper", "did you mean 'pepper'?"), ("xyz", "'xyz': Known: pepper, salt")])
def test_an_unknown_name_is_answered_with_the_nearest(spices, name, hint):
    with pytest.raises(UsageError, match=f"unknown spice '{name}'") as error:
        spices[name]
    assert hint in str(error.value)
    assert "Known: pepper, salt" in str(error.value)


def test_an_unknown_option_is_refused_with_the_nearest(spices):
    with pytest.raises(UsageError, match=r"pepper has no option 'grain': did you mean 'grains'\?"):
        spices["pepper"].check_options({"grain": 2})
    for hidden in ("generator", "_journal", "food"):
        with pytest.raises(UsageError, match=f"pepper has no option '{hidden}'"):
            spices["pepper"].check_options({hidden: None})


def test_the_value_of_an_option_is_what_its_annotation_allows(spices):
    pepper = spices["pepper"]
    pepper.check_options({})
    pepper.check_options(pepper.options)
    pepper.check_options({"grains": 2, "dose": 1, "mill": "coarse", "scoring": sum})
    for name, value in [
        ("grains", "2"),
        ("grains", 2.5),
        ("grains", True),
        ("dose", "0.5"),
        ("dose", math.nan),
        ("dose", None),
        ("mill", "finest"),
        ("scoring", 1),
    ]:
        with pytest.raises(UsageError, match=f"{name} of pepper must .*{value!r}"):
            pepper.check_options({name: value})


def test_an_option_says_whether_it_decides_results():
    herbs = Registry("herb", "herbs")

    @herbs.register("mint", source="a garden")
    def mint(*, leaves: int = 2, batch_size: BatchSize = 64) -> None:
        """Leaves."""

    assert herbs["mint"].deciding({"leaves": 3, "batch_size": 8}) == {"leaves": 3}
    with pytest.raises(UsageError, match="batch_size of mint must be greater than or equal to 1, got 0"):
        herbs["mint"].check_options({"batch_size": 0})


def test_a_key_is_the_functions_name_and_is_taken_once(spices):
    with pytest.raises(UsageError, match=r"spice 'sugar' is a function called 'honey': .* call both the same"):

        @spices.register("sugar", source="")
        def honey(food): ...

    def salt(food): ...

    salt.__module__ = "elsewhere"
    with pytest.raises(
        UsageError, match="spice 'salt' of elsewhere has the name of that of test_registry: give yours another"
    ):
        spices.register("salt", source="")(salt)
    assert spices["salt"].source == "the sea"


def test_a_registry_has_facts_for_methods_that_say_nothing_else():
    registry = Registry("spice", "spices", kinds=("channel",), hot=False)

    @registry.register("pepper", source="", hot=True)
    def pepper(model, sites): ...

    @registry.register("salt", source="", kinds=("weight", "head"))
    def salt(model, sites): ...

    assert registry["pepper"].facts == {"kinds": ("channel",), "hot": True}
    assert registry["salt"].facts == {"kinds": ("weight", "head"), "hot": False}
    registry["pepper"](None, [Site("a", "channel", 3)])
    registry["salt"](None, sites=[Site("a", "weight", 3), Site("b", "head", 3)])
    registry["salt"].check_kinds(["head"])
    for give in (lambda site: registry["salt"](None, [site]), lambda site: registry["salt"](None, sites=[site])):
        with pytest.raises(UsageError, match="salt scores sites of kind weight, head, not 'channel'"):
            give(Site("a", "channel", 3))


def test_what_a_method_asks_for_may_be_provided_and_brings_its_options():
    registry = Registry("dish", "dishes")

    @registry.provide
    def dough(flour, water, *, rest: int = 3): ...

    @registry.provide
    def base(dough, oven, *, heat: float = 250.0): ...

    @registry.register("pizza", source="")
    def pizza(base, tomatoes, *, basil: bool = True): ...

    @registry.register("salad", source="")
    def salad(tomatoes, leaves=(), *, generator): ...

    assert (registry["pizza"].asks, registry["salad"].asks) == (("base", "tomatoes"), ("tomatoes",))
    assert registry["pizza"].inputs == {"flour", "water", "oven", "tomatoes"}
    assert registry["salad"].inputs == {"tomatoes"}
    assert registry["pizza"].options == {"basil": True, "heat": 250.0, "rest": 3}
    assert registry["pizza"].own_options == {"basil": True}
    registry["pizza"].check_options({"rest": 4, "heat": 200, "basil": False})
    with pytest.raises(UsageError, match="rest of pizza must be a valid integer"):
        registry["pizza"].check_options({"rest": 0.5})
    with pytest.raises(UsageError, match="did you mean 'heat'"):
        registry["pizza"].check_options({"heet": 200})


def test_nearest_of_nothing_like_it():
    assert nearest("zzz", ["a", "b"]) == ": Known: a, b"
