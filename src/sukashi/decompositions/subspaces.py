"""Subspaces of what a layer writes, as a virtual layer whose units they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Member, Site
from sukashi.network import hooks
from sukashi.network.insert import inserted
from sukashi.network.layers import Rotation

ORTHONORMAL = 1e-4  # how far U'U of a given basis may be from the identity


@dataclass(frozen=True)
class Subspaces:
    """Orthogonal subspaces of the features that a layer writes: K blocks of d columns of an orthonormal basis.

    `basis` (D, D) holds the blocks one after another, (U_1 | ... | U_K | rest); `rest` completes it and is no concept.
    `axis` is where the features lie in what the layer writes. `mean` (D,) is the mean feature over the images and
    positions that they were found on. `method` and `params` say how they were found.

    Raises UsageError for a basis that is not square and orthonormal, and more or wider blocks than it has columns.
    """

    layer: str
    axis: int
    basis: Tensor
    n_subspaces: int
    n_dimensions: int
    mean: Tensor
    method: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.basis)
        if self.basis.shape != (size, size) or self.mean.shape != (size,):
            raise UsageError(
                f"the basis of subspaces must be (D, D) and their mean (D,), got {tuple(self.basis.shape)} and "
                f"{tuple(self.mean.shape)}"
            )
        off = float((self.basis.T @ self.basis - torch.eye(size).to(self.basis)).abs().max())
        if not off <= ORTHONORMAL:
            raise UsageError(f"the basis of subspaces is not orthonormal: U'U is off by {off:.1e}")
        if self.n_subspaces < 1 or self.n_dimensions < 1 or self.n_subspaces * self.n_dimensions > size:
            raise UsageError(
                f"{self.n_subspaces} subspaces of {self.n_dimensions} dimensions do not fit the {size} features of "
                f"layer {self.layer!r}"
            )

    def block(self, k: int) -> Tensor:
        """U_k (D, d)."""
        return self.basis[:, k * self.n_dimensions : (k + 1) * self.n_dimensions]

    @property
    def fill(self) -> Tensor:
        """(K, d) the mean in the coordinates of the subspaces."""
        inside = self.mean.to(self.basis) @ self.basis
        return inside[: self.n_subspaces * self.n_dimensions].view(self.n_subspaces, -1)


class VirtualLayer(nn.Module):
    """a + U (h' - h) of a, with h = U'a, and h' what becomes of h in `units`, which does nothing by itself.

    This is U h', up to rounding, and bit for bit a while nothing changes h: a max-pool behind it then finds the same
    maxima, where activations are equal too.
    """

    def __init__(self, basis: Tensor, axis: int) -> None:
        super().__init__()
        self.project = Rotation(basis, axis)
        self.units = nn.Identity()
        self.reconstruct = Rotation(basis.T.contiguous(), axis)

    def forward(self, a: Tensor) -> Tensor:
        h = self.project(a)
        changed: Tensor = a + self.reconstruct(self.units(h) - h)
        return changed


@contextmanager
def virtual(model: nn.Module, subspaces: Subspaces) -> Iterator[Site]:
    """Inside, what a layer writes goes through a `VirtualLayer` before anything else reads it; gives the site of h.

    Nothing changes, but the subspaces are units now, as channels are of a convolution: attributions give each its
    relevance, which adds up to the layer's (Chormai et al. 2024, eq. 8), R_k = (U_k'a) . (U_k'c), and `hooks.ablated`
    takes one out (Danek and Ramaswamy 2026, stages 1 and 2). Afterwards the model is as it was.

    Raises ModelError for a layer that there is not, and in a pass for one that writes another number of features.
    """
    layer = VirtualLayer(subspaces.basis.to(next(model.parameters())), subspaces.axis)
    layer.train(hooks.layer(model, subspaces.layer).training)
    d = subspaces.n_dimensions
    index = tuple(tuple(range(k * d, (k + 1) * d)) for k in range(subspaces.n_subspaces))
    with inserted(model, subspaces.layer, layer) as name:
        place = f"{name}.module.units"
        yield Site(
            place, "subspace", subspaces.n_subspaces, subspaces.axis, (Member(place, "in", index, subspaces.axis),)
        )


@contextmanager
def ablated(model: nn.Module, subspaces: Subspaces, without: Sequence[int], *, fill: str = "mean") -> Iterator[None]:
    """Inside, subspaces are taken out of what their layer writes: replaced by zero, or by the mean over a data set.

        a' = a - sum over k in `without` of U_k (U_k'a - m_k),  m_k = U_k'mean, or 0 for `fill` "zero"

    Zero is what Danek and Ramaswamy do; the mean keeps what all images have in common, so that the answer does not
    lean to one class.

    Raises UsageError for a subspace that there is not and where all of the features would go.
    """
    if odd := [k for k in without if not 0 <= k < subspaces.n_subspaces]:
        raise UsageError(f"layer {subspaces.layer!r} has subspaces 0 to {subspaces.n_subspaces - 1}, got {odd[0]}")
    if len(set(without)) * subspaces.n_dimensions == len(subspaces.basis):
        raise UsageError(f"all that layer {subspaces.layer!r} writes would go: leave one subspace at least")
    if fill not in ("mean", "zero"):
        raise UsageError(f"fill must be mean or zero, got {fill!r}")
    gate = torch.ones(subspaces.n_subspaces)
    gate[list(without)] = 0
    with virtual(model, subspaces) as site:
        means = {site: subspaces.fill} if fill == "mean" else 0.0
        with hooks.ablated(model, {site: gate}, means):
            yield


def completed(block: Tensor) -> Tensor:
    """(D, D) an orthonormal basis whose first columns are those of a block (D, M), in float64.

    Raises ModelError where they are not independent.
    """
    block = block.double()
    left, values, _ = torch.linalg.svd(block, full_matrices=True)
    if values.min() <= 1e-9 * values.max():
        raise ModelError(f"the {block.shape[1]} directions are not independent: ask for fewer dimensions")
    return torch.cat([block, left[:, block.shape[1] :]], 1)
