"""What a cut did: measures give one number an image; importing this package registers them."""

from sukashi.registry import Registry

measures = Registry("measure", "measures")

from sukashi.measures import accuracy  # noqa: E402, F401
