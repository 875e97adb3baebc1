"""Subspaces of what a layer writes, as a virtual layer whose units they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.core.errors import UsageError
from sukashi.core.types import Member, Site
from sukashi.network import hooks
from sukashi.network.insert import inserted
from sukashi.network.layers import FeatureMap

DUAL = 1e-4  # how far dual' basis may be from the identity


@dataclass(frozen=True)
class Subspaces:
    """Subspaces of the features that a layer writes: K blocks of d columns of a basis.

    `basis` B (D, D) holds the blocks one after another, (B_1 | ... | B_K | rest); what completes it is no concept.
    `dual` (D, D), by which h = dual' a are the coordinates of features a, is the transpose of its inverse: B itself
    where the basis is orthonormal. `axis` is where the features lie in what the layer writes. `mean` (D,) is what an
    ablation puts in place, in the subspaces that it takes out. `facts` are what the method that found them says.

    Raises UsageError for a basis that is not square or whose inverse the dual is not, and more or wider blocks than it
    has columns.
    """

    layer: str
    axis: int
    basis: Tensor
    dual: Tensor
    n_subspaces: int
    n_dimensions: int
    mean: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.basis)
        if self.basis.shape != (size, size) or self.dual.shape != (size, size) or self.mean.shape != (size,):
            raise UsageError(
                f"basis and dual of subspaces must be (D, D) and their mean (D,), got {tuple(self.basis.shape)}, "
                f"{tuple(self.dual.shape)} and {tuple(self.mean.shape)}"
            )
        off = float((self.dual.T @ self.basis - torch.eye(size).to(self.basis)).abs().max())
        if not off <= DUAL:
            raise UsageError(
                f"the dual of the basis of subspaces is not its inverse: off by {off:.1e}; an orthonormal basis is its "
                "own dual"
            )
        if self.n_subspaces < 1 or self.n_dimensions < 1 or self.n_subspaces * self.n_dimensions > size:
            raise UsageError(
                f"{self.n_subspaces} subspaces of {self.n_dimensions} dimensions do not fit the {size} features of "
                f"layer {self.layer!r}"
            )

    def block(self, k: int) -> Tensor:
        """B_k (D, d)."""
        return self.basis[:, k * self.n_dimensions : (k + 1) * self.n_dimensions]

    @property
    def identity(self) -> dict[str, Any]:
        """What says which they are, in JSON."""
        parts = (self.basis, self.dual, self.mean)
        digest = hashlib.sha256(b"".join(of.numpy().tobytes() for of in parts)).hexdigest()
        return {
            "layer": self.layer,
            "axis": self.axis,
            "of": [self.n_subspaces, self.n_dimensions],
            "sha256": digest,
        }

    @property
    def fill(self) -> Tensor:
        """(K, d) the mean in the coordinates of the subspaces."""
        inside = self.mean.to(self.dual) @ self.dual
        return inside[: self.n_subspaces * self.n_dimensions].view(self.n_subspaces, -1)


def units(size: int, first: Sequence[int]) -> Tensor:
    """(size, size) the basis whose columns are single features, these before the others: each a subspace by itself."""
    order = [*first, *(unit for unit in range(size) if unit not in {*first})]
    return torch.eye(size)[:, order]


class VirtualLayer(nn.Module):
    """a + B (h' - h) of a, with h = dual' a, and h' what becomes of h in `units`, which does nothing by itself.

    This is B h', up to rounding, and bit for bit a while nothing changes h: a max-pool behind it then finds the same
    maxima, where activations are equal too.
    """

    def __init__(self, basis: Tensor, dual: Tensor, axis: int) -> None:
        super().__init__()
        self.project = FeatureMap(dual, axis)
        self.units = nn.Identity()
        self.reconstruct = FeatureMap(basis.T.contiguous(), axis)

    def forward(self, a: Tensor) -> Tensor:
        h = self.project(a)
        changed: Tensor = a + self.reconstruct(self.units(h) - h)
        return changed


@contextmanager
def virtual(model: nn.Module, subspaces: Subspaces) -> Iterator[Site]:
    """Inside, what a layer writes goes through a `VirtualLayer` before anything else reads it; gives the site of h.

    Nothing changes, but the subspaces are units now, as channels are of a convolution: attributions give each its
    relevance, R_k = (dual_k' a) . (B_k' c), which adds up to the layer's (Chormai et al. 2024, eq. 8, for orthonormal
    bases), and `hooks.ablated` takes one out (Danek and Ramaswamy 2026, stages 1 and 2). Afterwards the model is as it
    was.

    Raises ModelError for a layer that there is not, and in a pass for one that writes another number of features.
    """
    like = next(model.parameters())
    layer = VirtualLayer(subspaces.basis.to(like), subspaces.dual.to(like), subspaces.axis)
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

        a' = a - sum over k in `without` of B_k (dual_k' a - m_k),  m_k = dual_k' mean, or 0 for `fill` "zero"

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
