"""What a cut did: measures give one number an image; importing this package registers them.

`measure(model, batch, *, generator, reference=None, **options)` gives (B,). One that reads a saliency map also takes
`maps` (B, H, W), see `measures.saliency`; its value is NaN where a map says nothing.
"""

from sukashi.registry import Registry

measures = Registry("measure", "measures")

from sukashi.measures import accuracy, saliency  # noqa: E402, F401
