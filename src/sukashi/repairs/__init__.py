"""Repairs: what a cut took from a network, given back from unlabelled images in closed form, without a gradient.

A repair changes weights or statistics of the cut network in place, and never its shape. It is given the network that
was cut, the dense one, what was cut, {layer: {side: positions}} as `surgery.cut` and `surgery.zero` tell it, or of
single weights {layer: {"weights": where zeros are in the flattened weight}}, and images. The fact `needs` names layers
of which a network must have one, `changes` what it is given and changes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.precision import exact
from sukashi.core.registry import Registry, fill
from sukashi.core.types import Batch
from sukashi.network.surgery import Table

NONE = "none"  # the cut as it is


def _changes_in_place(name: str, found: object, given: Mapping[str, Any]) -> None:
    if found is not None:
        raise UsageError(
            f"{name} gives {type(found).__name__}: a repair changes the weights of `model` in place and returns nothing"
        )


repairs = Registry(
    "repair",
    "repairs",
    takes="model, dense, table, data",
    gives=_changes_in_place,
    needs=(nn.Module,),
    changes=("model",),
)

Mend = Callable[[nn.Module, Table], None]
Teacher = Callable[[], AbstractContextManager[None]]


def mender(name: str, dense: nn.Module, data: Batch, teacher: Teacher = nullcontext) -> Mend | None:
    """What a repair does, in place, to a network that was cut from a dense one by a table; None for `NONE`.

    While it works the dense network, towards which it mends, is inside `teacher()`.

    Raises UsageError for a repair that there is not; what it gives raises ModelError where it can do nothing.
    """
    if name == NONE:
        return None
    method = repairs[name]

    def mend(model: nn.Module, table: Table) -> None:
        if table:
            # In full precision, whatever the caller's passes are in. To leave inference mode turns gradients on.
            full = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
            with torch.inference_mode(False), exact(), full[0], full[1], teacher():
                method(model, dense, table, data)

    return mend


def check(name: str) -> None:
    """Refuse a repair that there is not, or an option that it has not."""
    if name != NONE:
        repairs[name]


def code(name: str) -> dict[str, str]:
    """{repair: a hash of its code}; of `NONE` nothing."""
    return {} if name == NONE else {name: repairs[name].code}


def check_fits(name: str, dense: nn.Module) -> None:
    """Refuse a repair that there is not, by UsageError, and by ModelError a network without a layer that it needs."""
    if name == NONE:
        return
    needs = repairs[name].facts["needs"]
    if not any(isinstance(layer, needs) for layer in dense.modules()):
        nouns = " or ".join(kind.__name__.strip("_") for kind in needs)
        raise ModelError(f"{name} needs a layer of class {nouns}, and this network has none: leave it out of `repair`")


fill(__name__, __path__)
