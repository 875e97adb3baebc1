"""Where the last maps of a convolutional network speak for a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.attributions import attributions
from sukashi.attributions.gradient import check, check_pixels, in_parts, slopes_at
from sukashi.core.errors import ModelError
from sukashi.core.objective import CLASSIFICATION, Objective
from sukashi.core.registry import BatchSize
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import answer

_MAPS, _TOKENS = 4, 3  # axes: images, channels, height, width; images, tokens, features


@attributions.register(
    "gradcam",
    source="Selvaraju et al. 2017, eq. 1 and 2",
    signed=False,
    kinds=("pixel",),
    refuses=("attention",),
)
def gradcam(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    sites: Sequence[Site],
    objective: Objective = CLASSIFICATION,
    *,
    layer: str | None = None,
    batch_size: BatchSize = 64,
) -> dict[Site, Tensor]:
    """Where maps A_k of a layer speak for the target's logit F: (sum over k of a_k A_k)^+, enlarged; input only.

    a_k is the mean of dF / dA_k over the positions of a channel's map. Enlarged to the image by bilinear interpolation;
    channels of the image have equal parts of a pixel's value, so that a map is their sum. `layer` is the one whose
    output is taken; None is the last to give maps of more than one pixel, behind which a network pools: layer4 of a
    ResNet. A map has no more detail than the layer, 7 x 7 of 224 x 224 pixels there. `batch_size` bounds the images in
    one pass.

    Raises UsageError for another site than the input; ModelError for a layer that gives no maps of channels, as those
    of transformers, and otherwise as `saliency` does; DataError as `saliency` does.
    """
    check_pixels("gradcam", sites)
    check(model, x, target, objective)
    place = Site(*_maps(model, x[:1], layer))
    n_channels, *size = x.shape[1:]

    def explain(rows: slice) -> dict[Site, Tensor]:
        held, slopes = slopes_at(model, x[rows], target[rows], [place], objective)
        maps, slope = hooks.gather(place, held[place]), hooks.gather(place, slopes[place])
        found = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).clamp(min=0)
        large = F.interpolate(found, tuple(size), mode="bilinear", align_corners=False)
        return dict.fromkeys(sites, (large / n_channels).repeat(1, n_channels, 1, 1))

    return in_parts(explain, len(x), batch_size)


def _maps(model: nn.Module, x: Tensor, layer: str | None) -> tuple[str, Any, int]:
    """The layer whose maps are taken, the kind of its units and their number."""
    n_calls: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def leave(name: str, module: nn.Module, read: Any, given: Any) -> None:
        n_calls[name] += 1
        shapes.pop(name, None)  # to stand at the end: by its last call
        shapes[name] = tuple(given.shape) if isinstance(given, Tensor) else ()

    if layer is not None:
        hooks.layer(model, layer)
    with torch.no_grad(), hooks.followed(model, leave):
        answer(model, x.clone())
    once = {name: shape for name, shape in shapes.items() if n_calls[name] == 1}
    last = next((name for name in reversed(once) if _is_maps(once[name])), None)
    after = list(once.values())[list(once).index(last) + 1 :] if last is not None else []
    if layer is None and (last is None or any(len(shape) == _TOKENS for shape in after)):
        raise ModelError(
            f"gradcam reads the last maps of channels, and this {type(model).__name__} has none behind which only "
            "vectors follow, as transformers have none: use lrp, chefer or another attribution"
        )
    name = last if layer is None else layer
    shape = shapes.get(str(name), ())
    height, width = x.shape[2:]
    if not _is_maps(shape) or abs(shape[2] * width - shape[3] * height) > max(height, width):
        raise ModelError(
            f"gradcam reads maps of channels, (images, channels, height, width) in the shape of the image, and layer "
            f"{name!r} gives {shape or 'none'}: choose another layer"
        )
    return str(name), "channel", shape[1]


def _is_maps(shape: tuple[int, ...]) -> bool:
    return len(shape) == _MAPS and shape[2] * shape[3] > 1
