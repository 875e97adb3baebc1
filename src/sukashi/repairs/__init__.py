"""Repairs: what a cut took from a network, given back from unlabelled images in closed form, without a gradient.

A repair changes weights or statistics of the cut network in place, and never its shape. It is given the network that
was cut, the dense one, what was cut, {layer: {side: positions}} as `surgery.cut` and `surgery.zero` tell it, and
images.
"""

from collections.abc import Callable

from torch import nn

from sukashi.core.precision import exact
from sukashi.core.registry import Registry, fill
from sukashi.core.types import Batch
from sukashi.network.surgery import Table

NONE = "none"  # the cut as it is

repairs = Registry("repair", "repairs", takes="model, dense, table, data")


Mend = Callable[[nn.Module, Table], None]


def mender(name: str, dense: nn.Module, data: Batch) -> Mend | None:
    """What a repair does, in place, to a network that was cut from a dense one by a table; None for `NONE`.

    Raises UsageError for a repair that there is not; what it gives raises ModelError where it can do nothing.
    """
    if name == NONE:
        return None
    method = repairs[name]

    def mend(model: nn.Module, table: Table) -> None:
        if table:
            with exact():
                method(model, dense, table, data)

    return mend


def check(name: str) -> None:
    """Refuse a repair that there is not."""
    if name != NONE:
        repairs[name]


fill(__name__, __path__)
