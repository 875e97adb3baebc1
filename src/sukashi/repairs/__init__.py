"""Repairs: what a cut took from a network, given back from unlabelled images in closed form, without a gradient.

A repair changes weights or statistics of the cut network in place, and never its shape. It is given the network that
was cut, the dense one, what was cut, {layer: {side: positions}} as `surgery.cut` and `surgery.zero` tell it, and
images. The fact `of` says what it repairs: units, or single weights too.
"""

from sukashi.core.registry import Registry, fill

repairs = Registry("repair", "repairs", takes="model, dense, table, data")

fill(__name__, __path__)
