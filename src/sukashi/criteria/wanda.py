"""Wanda: single weights, by their size times the norm of what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ModelError
from sukashi.core.precision import exact
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch, Scores, Site
from sukashi.criteria import criteria
from sukashi.network import hooks
from sukashi.network.canonical import canonical, is_compound
from sukashi.network.exclude import remedy
from sukashi.network.functions import owner
from sukashi.network.sparsity import weight_of

_CHUNK = 2**22  # numbers that are squared in float64 at once


@criteria.register("wanda", source="Sun et al. 2024, eq. 1; Zhang et al. 2026 (IMPACT), eq. 1", kinds=("weight",))
def wanda(
    model: nn.Module,
    sites: Sequence[Site],
    data: Batch,
    *,
    generator: torch.Generator,
    batch_size: BatchSize = 64,
) -> Scores:
    """Size of a weight times the norm of its input: S_ij = |W_ij| ||X_j||_2, over all images and positions.

    Of a linear layer X_j is feature j of every token of every image. A convolution is the linear layer that reads
    windows: j counts input channel, row and column of the kernel, and X_j is what meets that weight wherever the kernel
    lies, padding included. A norm for each channel would leave out that some weights never meet the border of a map: it
    changes 1.6 % of the bits of a CIFAR ResNet-20's mask.

    A layer of a class of its own that is a plain one and more (timm's convolutions that pad like TensorFlow's) is
    measured in the canonical form, where it reads what the plain one does.

    All layers are measured in one pass over the images, sums of squares in float64. `batch_size` bounds the images in
    one pass; results do not depend on it.

    Raises ModelError for a layer that is neither linear nor a 2d convolution, or that reads nothing in a pass, and for
    a network that needs its canonical form and has none.
    """
    layers = {site.layer: model.get_submodule(site.layer) for site in sites}
    if alien := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear | nn.Conv2d)]:
        raise ModelError(
            f"layer {alien[0]!r} is a {type(layers[alien[0]]).__name__}: wanda scores linear layers and 2d "
            f"convolutions, {remedy(alien, (name for name in layers if name not in alien))}"
        )
    device = next(model.parameters()).device
    squares: dict[str, Tensor] = {}
    network, places = _plain(model, layers, data.x[:2].to(device))

    def add(place: str, name: str, x: Tensor) -> None:
        layer = network.get_submodule(place)
        found = _of_features(x) if isinstance(layer, nn.Linear) else _of_windows(layer, x)
        squares[name] = squares[name] + found if name in squares else found

    with (
        progress.task("wanda", len(data)) as shown,
        exact(),
        hooks.visited(network, {place: partial(add, place, name) for place, name in places.items()}),
    ):
        for batch in data.split(batch_size):
            network(batch.x.to(device))
            shown.advance(len(batch))
    if idle := [name for name in layers if name not in squares]:
        raise ModelError(f"layer {idle[0]!r} reads nothing when the model runs: {remedy(idle, squares)}")
    values = {}
    for site in sites:
        weight = weight_of(model, site).detach().cpu().double().abs()
        values[site] = weight * _shaped_like(weight, squares[site.layer].cpu().sqrt())
    return Scores(values, len(data), "wanda")


def _plain(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """The network to run, and {place in it: layer}: the canonical form where a layer does more than its kind.

    There a convolution that pads by itself reads what is padded, and a layer called n times is n places.
    """
    if not any(map(is_compound, layers.values())):
        return model, {name: name for name in layers}
    form = canonical(model, x)
    called = [node for node in form.graph.nodes if node.op == "call_module"]
    kinds = nn.Linear | nn.Conv2d
    places = {
        str(node.target): owner(node)
        for node in called
        if owner(node) in layers and isinstance(form.get_submodule(str(node.target)), kinds)
    }
    return form, places


def _of_features(x: Tensor) -> Tensor:
    """(in,) sums of squares of x (..., in)."""
    return _sum_of_squares(x.reshape(-1, x.shape[-1]))


def _of_windows(layer: nn.Module, x: Tensor) -> Tensor:
    """(C, kh, kw) sums of squares of what meets each place of a convolution's kernel, of x (B, C, H, W)."""
    assert isinstance(layer, nn.Conv2d)
    # Padding copies numbers or puts zeros, so it may come after squares and sums.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    map_CHW = F.pad(_sum_of_squares(x)[None], layer._reversed_padding_repeated_twice, mode=mode)[0]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    n_rows = (map_CHW.shape[1] - dh * (kh - 1) - 1) // sh + 1
    n_columns = (map_CHW.shape[2] - dw * (kw - 1) - 1) // sw + 1
    met = [
        map_CHW[:, i * dh :: sh, j * dw :: sw][:, :n_rows, :n_columns].sum((1, 2))
        for i, j in product(range(kh), range(kw))
    ]
    return torch.stack(met, 1).view(-1, kh, kw)


def _sum_of_squares(x: Tensor) -> Tensor:
    """(...) in float64 out of (N, ...), a bounded number at a time."""
    parts = x.split(max(1, _CHUNK // max(1, x[:1].numel())))
    return sum((part.double().square().sum(0) for part in parts), torch.zeros((), dtype=torch.float64, device=x.device))


def _shaped_like(weight: Tensor, norms: Tensor) -> Tensor:
    """Norms of the inputs of a layer, (in,) or (C, kh, kw), as its weight (out, C / groups, ...) reads them."""
    n_groups = len(norms) // weight.shape[1]
    return (
        norms.view(n_groups, 1, *weight.shape[1:])
        .expand(n_groups, len(weight) // n_groups, *weight.shape[1:])
        .reshape(weight.shape)
    )
