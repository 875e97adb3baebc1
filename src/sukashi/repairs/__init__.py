"""Repairs: what a cut took from a network, given back from unlabelled images in closed form, without a gradient.

A repair changes weights or statistics of the cut network in place, and never its shape. It is given the network that
was cut, the dense one, what was cut, {layer: {side: positions}} as `surgery.cut` and `surgery.zero` tell it, and
images.
"""

from sukashi.core.registry import Registry, fill

NONE = "none"  # the cut as it is

repairs = Registry("repair", "repairs", takes="model, dense, table, data")


def check(name: str) -> None:
    """Refuse a repair that there is not."""
    if name != NONE:
        repairs[name]


fill(__name__, __path__)
