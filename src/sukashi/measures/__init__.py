"""What a cut did: measures give one number an image; importing this package registers them.

`measure(model, batch, *, generator, reference=None, **options)` gives (B,), never averaged. Facts of a measure:
`better` (higher or lower), and `reads` where it reads something else than a model and a batch: the names of its
arguments, tensors with one row an image (`maps` and `reference` (B, H, W) of two models, `masks` (B, H, W) bool). One
that reads a saliency map beside them takes it as `maps` too, see `measures.saliency`; its value is NaN where a map says
nothing.
"""

from sukashi.core.registry import Registry

measures = Registry("measure", "measures")

from sukashi.measures import accuracy, faithfulness, maps  # noqa: E402, F401
