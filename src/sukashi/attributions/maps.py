"""Saliency maps: an attribution at the input site, one number a pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from sukashi.core.errors import UsageError

Channels = Literal["sum", "abs_sum", "sum_abs", "max_abs"]

_REDUCED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(1),
    "abs_sum": lambda values: values.sum(1).abs(),
    "sum_abs": lambda values: values.abs().sum(1),
    "max_abs": lambda values: values.abs().amax(1),
}


def saliency_map(values: Tensor, reduce: Channels) -> Tensor:
    """A map (B, H, W) out of an attribution at the input site (B, C, H, W).

    `reduce` over the channels:
        sum      signed: what a pixel says for the target; sums to what the attribution sums to (LRP, Chefer)
        abs_sum  the size of that, where channels may cancel
        sum_abs  how much a pixel says at all
        max_abs  the channel that says most (vanilla gradients: Simonyan et al. 2014, sec. 3.1)

    Suwal et al. 2025 (the lottery paper, appendix B) measure absolute values of vanilla and integrated gradients and do
    not name the channels' part; IMPACT's maps (Chefer) have a value a patch, so that `sum` and `sum_abs` are the same.

    Raises UsageError for an unknown reduction and values of another shape.
    """
    if reduce not in _REDUCED:
        raise UsageError(f"channels of a map can't be reduced by {reduce!r}: choose one of {', '.join(_REDUCED)}")
    if values.dim() != 4:
        raise UsageError(
            f"values of shape {tuple(values.shape)} are no attribution of pixels: give what one says at "
            "sites.input_site(x), (images, channels, height, width)"
        )
    return _REDUCED[reduce](values)
