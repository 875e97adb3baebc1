"""CRAFT: concepts of a class as parts that the activations of crops add up of (Fel et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.stats import qmc
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import UsageError
from sukashi.core.precision import exact
from sukashi.core.types import Site
from sukashi.decompositions.nmf import nmf, nnls, semi_nmf
from sukashi.network import hooks
from sukashi.network.canonical import evaluating

OVERLAP = 0.8  # of its side, how far a crop lies from the next
TOP = 0.1  # of the crops of a concept that its recursion looks at
_CHECKED = 3  # random masks at which a logit that is said to be linear is looked at
LINEAR = 1e-4  # of the largest effect: what rounding makes of a function that is linear in the concepts
Importance = Literal["exact", "sobol", "compat"]


@dataclass(frozen=True)
class Crops:
    """Square windows of images (B, C, H, W): `image` (N,) of which image they are, `box` (N, 3) their top, left and
    side in its pixels."""

    images: Tensor
    image: Tensor
    box: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> Crops:
        return Crops(self.images, self.image[rows], self.box[rows])

    @property
    def x(self) -> Tensor:
        """(N, C, H, W) each enlarged to the size of an image, bilinearly."""
        return torch.cat([*self.batches(len(self))])

    def batches(self, n: int) -> Iterator[Tensor]:
        """The same, at most n at once."""
        for rows in torch.arange(len(self)).split(n):
            windows = [
                self.images[image, :, top : top + side, left : left + side]
                for image, (top, left, side) in zip(self.image[rows].tolist(), self.box[rows].tolist(), strict=True)
            ]
            size = self.images.shape[2:]
            yield F.interpolate(torch.stack(windows), size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Bank:
    """Concepts at a site: `w` (K, D) one direction each, of norm 1, and `u` (N, K) how much of each is in each crop."""

    site: Site
    w: Tensor
    u: Tensor


@contextmanager
def _looking(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """Inside, what sites hold in a pass, in eval mode, full precision and without gradients."""
    with exact(), evaluating(model), hooks.recorded(model, sites) as seen:
        yield seen


def crops(x: Tensor, side: int) -> Crops:
    """All windows of a side, .8 of it apart, of images (B, C, H, W): those of the official implementation.

    Raises UsageError for a side that is no part of an image.
    """
    height, width = x.shape[2:]
    if not 1 <= side <= min(height, width):
        raise UsageError(f"crops must have a side of 1 to {min(height, width)} pixels, got {side}")
    step = max(1, int(OVERLAP * side))
    corners = [(top, left) for top in range(0, height - side + 1, step) for left in range(0, width - side + 1, step)]
    box = torch.tensor([(top, left, side) for top, left in corners]).repeat(len(x), 1)
    return Crops(x, torch.arange(len(x)).repeat_interleave(len(corners)), box)


def activations(model: nn.Module, of: Crops, site: Site, *, batch_size: int = 64) -> Tensor:
    """(N, D) what a site holds of each crop, the mean over positions."""
    pooled = []
    like = next(model.parameters())
    with progress.task("crops", len(of)) as shown, _looking(model, [site]) as seen:
        for x in of.batches(batch_size):
            model(x.to(like))
            pooled.append(hooks.gather(site, seen[site]).flatten(2).mean(2))
            shown.advance(len(x))
    return torch.cat(pooled)


def factorised(a: Tensor, site: Site, n_concepts: int) -> Bank:
    """Concepts of activations (N, D): a = u w with u >= 0.

    Of activations that are not negative w isn't either (`nmf`, the paper's); else it has both signs (`semi_nmf`), as
    behind a GELU. Raises as these do.
    """
    u, w = (semi_nmf if a.min() < 0 else nmf)(a, n_concepts)
    return Bank(site, w, u)


def bank(model: nn.Module, of: Crops, site: Site, n_concepts: int, *, batch_size: int = 64) -> Bank:
    """Concepts of crops at a site: those of its `activations`, `factorised`."""
    return factorised(activations(model, of, site, batch_size=batch_size), site, n_concepts)


def recursed(model: nn.Module, of: Crops, found: Bank, k: int, site: Site, n_concepts: int, **options: int) -> Bank:
    """What a concept is made of at an earlier site: the concepts there of the tenth of the crops that hold most of it
    (Fel et al. 2023, sec. 3.2)."""
    most = found.u[:, k].argsort(descending=True, stable=True)[: max(n_concepts, round(TOP * len(of)))]
    return bank(model, of[most.cpu()], site, n_concepts, **options)


def concept_maps(model: nn.Module, x: Tensor, found: Bank, *, batch_size: int = 64) -> Tensor:
    """(B, K, positions...) how much of each concept is where: u >= 0 that minimises |a - u w| at each position."""
    parts = []
    like = next(model.parameters())
    with _looking(model, [found.site]) as seen:
        for rows in x.split(batch_size):
            model(rows.to(like))
            a = hooks.gather(found.site, seen[found.site])
            flat = a.flatten(2).transpose(1, 2)
            u = nnls(flat.flatten(0, 1), found.w)
            parts.append(u.view(*flat.shape[:2], -1).transpose(1, 2).unflatten(2, a.shape[2:]))
    return torch.cat(parts)


def importance(
    rest: nn.Module,
    maps: Tensor,
    found: Bank,
    target: int,
    *,
    how: Importance = "exact",
    n_designs: int = 256,
    batch_size: int = 256,
) -> Tensor:
    """(B, K) how much of a class's logit is due to each concept: its total Sobol index, of each image by itself.

    The logit f is that of `rest`, what lies behind the site (`behind`), given sum_k m_k u_k w_k, with `maps` (B, K,
    positions...) the u of each image (`concept_maps`) and m in [0, 1]^K. With m uniform,
    S_k = E[Var(f | all m but m_k)] / Var(f) (Fel et al. 2023, eq. 4):

    - `exact`: where f is linear in m, as behind global pooling and a linear layer, S_k = e_k^2 / sum e^2 with e_k what
      concept k adds to the logit: the slope of f, by one pass back. Three more passes see whether f is linear;
    - `sobol`: Jansen's estimator, sum (f(A) - f(A_k))^2 / (2 n Var f(A)), over a scrambled Sobol sequence;
    - `compat`: the same over a Halton sequence that is not scrambled, of which the official implementation takes 32
      points; biased.

    `batch_size` bounds the rows in one pass. Raises UsageError where `exact` is asked for and f is not linear.
    """
    n_concepts = len(found.w)
    if how != "exact":
        m = _designs(n_concepts, how, n_designs).to(maps)
        f = _logits(rest, found, maps, target, m, batch_size)
        a, b = f[:, :n_designs], f[:, n_designs:].unflatten(1, (n_concepts, n_designs))
        total: Tensor = (a[:, None] - b).square().mean(2) / 2 / _above_zero(a.var(1, correction=0))[:, None]
        return total
    effect = _slopes(rest, found, maps, target, batch_size)
    m = torch.rand(_CHECKED, n_concepts, generator=torch.Generator().manual_seed(0)).to(maps)
    f = _logits(rest, found, maps, target, torch.cat([torch.zeros_like(m[:1]), m]), batch_size)
    off = (f[:, 1:] - f[:, :1] - effect @ m.T.double()).abs().amax(1) / _above_zero(effect.abs().sum(1))
    if off.max() > LINEAR:
        raise UsageError(
            f"the logit is not linear in the concepts of layer {found.site.layer!r} (off by {float(off.max()):.1%}): "
            "its importance can't be exact, take sobol, or the last layer before pooling"
        )
    return effect.square() / _above_zero(effect.square().sum(1))[:, None]


def _slopes(rest: nn.Module, found: Bank, maps: Tensor, target: int, batch_size: int) -> Tensor:
    """(B, K) by how much the logit rises with each concept's map, float64: sum over positions of u_k w_k . df/da."""
    effects = []
    for u in maps.split(batch_size):
        with torch.enable_grad():
            a = _activation(u, found).requires_grad_()
            (slope,) = torch.autograd.grad(rest(a)[:, target].sum(), a)
        slope = slope.movedim(found.site.axis, 1).reshape(len(u), found.w.shape[1], -1)
        effects.append(torch.einsum("bkp,kd,bdp->bk", u.reshape(*u.shape[:2], -1), found.w, slope).double())
    return torch.cat(effects)


def _activation(u: Tensor, found: Bank) -> Tensor:
    """What the site's layer would write of concepts alone: sum_k u_k w_k, of maps u (B, K, positions...)."""
    a = torch.einsum("bkp,kd->bdp", u.reshape(*u.shape[:2], -1), found.w)
    return a.reshape(len(u), -1, *u.shape[2:]).movedim(1, found.site.axis)


def _logits(rest: nn.Module, found: Bank, maps: Tensor, target: int, m: Tensor, batch_size: int) -> Tensor:
    """(B, M) logits of a class, float64, for each image's concept maps (B, K, positions...) times each row of m."""
    n_images, n_designs = len(maps), len(m)
    values = []
    with torch.no_grad(), progress.task("importance of concepts", n_images * n_designs) as shown:
        for rows in torch.arange(n_images * n_designs).split(batch_size):
            weights = m[rows % n_designs].view(len(rows), -1, *[1] * (maps.dim() - 2))
            values.append(rest(_activation(maps[rows // n_designs] * weights, found))[:, target].double())
            shown.advance(len(rows))
    return torch.cat(values).view(n_images, n_designs)


def _designs(n_concepts: int, how: Importance, n_designs: int) -> Tensor:
    """((K + 1) n, K) masks: n of a sequence in 2 K dimensions by its first half, A, and for each k A with column k of
    its second half."""
    sequence: qmc.QMCEngine
    if how == "compat":
        sequence = qmc.Halton(2 * n_concepts, scramble=False)
    else:
        sequence = qmc.Sobol(2 * n_concepts, scramble=True, rng=0)
    points = torch.from_numpy(sequence.random(n_designs))
    a, b = points.split(n_concepts, 1)
    exchanged = []
    for k in range(n_concepts):
        exchanged.append(a.clone())
        exchanged[-1][:, k] = b[:, k]
    return torch.cat([a, *exchanged])


def _above_zero(values: Tensor) -> Tensor:
    """Divisors: of images on which nothing changes, 1."""
    return values.where(values > 0, 1)
