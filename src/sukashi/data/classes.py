"""What the classes of data are to a network: whether both count alike, or which outputs mean them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from sukashi.core.errors import DataError, ModelError


def check_classes(model_names: Sequence[str] | None, data_names: Sequence[str], n_classes: int) -> None:
    """Refuse a model and data that do not mean the same by a class number.

    ModelError where their counts differ; DataError where a name both know has another number in each. Names only one of
    them knows say nothing (a synset number against a word), and None means the model knows none. Data loaded with a
    `class_map` is in the model's order already: pass None.
    """
    if n_classes != len(data_names):
        unnamed = "" if model_names else " (the model knows no names to find them by)"
        mapped = f", or give a `class_map` from every class name to the model's number{unnamed}"
        raise ModelError(
            f"the model has {n_classes} classes and the data {len(data_names)}: "
            f"use a model of {len(data_names)} classes, train this one on by `sukashi.finetune(new_head=True)`"
            f"{mapped if n_classes > len(data_names) else ''}"
        )
    for number, of_model in enumerate(_numbers(model_names or (), data_names)):
        if of_model is not None and of_model != number:
            raise DataError(
                f"class {data_names[number]!r} is number {of_model} of the model and {number} of the data: both must "
                "count alike, so give a `class_map` from every class name to the model's number"
            )


def outputs_by_name(model_names: Sequence[str] | None, data_names: Sequence[str]) -> tuple[int, ...] | None:
    """The model's number of each class of the data, where it knows every name once, in capitals or not; else None."""
    found = [number for number in _numbers(model_names or (), data_names) if number is not None]
    return tuple(found) if len(found) == len(data_names) else None


def numbering(class_names: Sequence[str]) -> list[str]:
    """A note where the numbers that classes are called by are not in their order."""
    numbers = [int(name) for name in class_names if name.isascii() and name.isdecimal() and len(name) < 20]
    if len(numbers) < len(class_names) or numbers == sorted(numbers):
        return []
    few = ", ".join(class_names[:4]) + (", ..." if len(class_names) > 4 else "")
    return [f"classes are numbered by their names as text: {few}; a `class_map` gives them other numbers"]


def _numbers(model_names: Sequence[str], data_names: Sequence[str]) -> list[int | None]:
    """The model's number of each class, by its name in small letters where that names one, else by the very name."""
    small, exact = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for number, name in enumerate(model_names):
        small[_folded(name)].append(number)
        exact[name].append(number)
    alike = Counter(map(_folded, data_names))
    found = [small[_folded(name)] if alike[_folded(name)] == 1 else [] for name in data_names]
    found = [one if len(one) == 1 else exact[name] for one, name in zip(found, data_names, strict=True)]
    return [one[0] if len(one) == 1 else None for one in found]


def _folded(name: str) -> str:
    return name.strip().casefold()
