"""Masks of single weights: made from scores in a scope, put on a model, kept in few bytes."""

from __future__ import annotations

import torch
from torch import nn

from sukashi.types import Mask


@torch.no_grad()
def enforce(model: nn.Module, mask: Mask) -> None:
    """Set the weights that a mask of weight sites removes to zero, in place."""
    for site, keep in mask.keep.items():
        assert site.kind == "weight"
        weight = model.get_submodule(site.layer).weight
        assert isinstance(weight, nn.Parameter)
        weight.mul_(keep.to(weight.device))
