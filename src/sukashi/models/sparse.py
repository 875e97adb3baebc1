"""A network under a 2:4 mask in the form that a GPU runs faster."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sukashi.core.errors import UsageError
from sukashi.models.loaded import Loaded
from sukashi.network import sparsity


def semi_structured(loaded: Loaded) -> nn.Module:
    """The network of a 2:4 mask on the GPU, in half precision, its linear layers skipping the zeros.

    `semi_structured(sukashi.load(folder))` of a folder pruned with scope 2:4; `loaded` stays as it is. The other layers
    keep their zeros, see `sparsity.semi_structured`.

    Raises UsageError where the network has no mask or one that is not 2:4, ResourceError without an NVIDIA GPU of
    compute capability 8.0 or newer, ModelError for layers of sizes that torch does not take.
    """
    if loaded.mask is None:
        raise UsageError(f"{loaded.spec} has no mask of single weights: prune with `scope='2:4'` and load the folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return sparsity.semi_structured(copy.deepcopy(loaded.model).to(device).half(), loaded.mask)
