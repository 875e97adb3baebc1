"""Sparse autoencoders of what a layer writes: BatchTopK (Bussmann, Leask and Nanda 2024; Zhang 2026, sec. 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.core.errors import DataError, UsageError
from sukashi.core.precision import without_tf32
from sukashi.core.types import Batch, Member, Site
from sukashi.network import hooks
from sukashi.network.insert import inserted

AUXILIARY = 1 / 32  # of the loss in which dead latents make up what is left (Gao et al. 2024, appendix A.2)
IDLE = 20  # steps without firing after which a latent counts as dead while training
_SAMPLED = 97  # every so manieth activation says where about the k-th largest lies
_PART = 4096  # rows at a time
_DECAY = 0.99  # of the moving average of thresholds


class SparseAutoencoder(nn.Module):
    """f = BatchTopK(W_enc z + b_enc) and z' = W_dec f + b_dec (eq. 8, 9) of features x (N, D), z = (x - mean) / scale.

    While it is trained, the k N largest positive activations of a batch of N rows are kept and all others 0: k of a row
    on average. Used, a latent fires above `threshold`, the moving average of the least activation that was kept, so
    that what a row is does not depend on others. Rows of `decoder` (L, D) have length 1. `mean` (D,) and the number
    `scale` are those of the data it is trained on: features of a variance of 1 on average.

    Raises UsageError for more active latents than there are.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor
    idle: Tensor

    def __init__(self, n_features: int, n_latents: int, k: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if not 1 <= k <= n_latents:
            raise UsageError(f"k must be 1 to the {n_latents} latents, got {k}: it is how many are active for a row")
        self.k = k
        rows = F.normalize(torch.randn(n_latents, n_features, generator=generator), dim=1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.decoder_bias = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((), -1.0))  # none yet
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.long))

    @property
    def n_latents(self) -> int:
        return len(self.decoder)

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Take `mean` and `scale` of rows x (N, D). Raises DataError for rows that are all the same, or not finite."""
        mean, variance = mean_of(x), squares(x) / x.numel()
        if not 0 < variance < math.inf:
            raise DataError("what the layer writes is the same for all images, or not finite: no parts can be told")
        self.mean.copy_(mean)
        self.scale.fill_(math.sqrt(variance))

    def encode(self, x: Tensor) -> Tensor:
        """(N, L) how much of each latent rows (N, D) have, by `threshold`."""
        pre = F.linear((x - self.mean) / self.scale, self.encoder, self.encoder_bias)
        return pre.where(pre > self.threshold.clamp(min=0), 0)

    def decode(self, f: Tensor) -> Tensor:
        """(N, D) what latents (N, L) add up to."""
        return (f @ self.decoder + self.decoder_bias) * self.scale + self.mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The loss of a batch (N, D), with its gradients in the parameters' `grad`; the batch's threshold is noted.

            L = (|z - z'|^2 + AUXILIARY |z - z' - W_dec f_dead|^2) / (N D)

        f_dead are the D / 2 largest activations a row of latents that have not fired for IDLE steps, kept as in
        BatchTopK; the residual in it is no variable. Only what fires has a gradient, and only that is computed: a
        product with f is a sum of few rows. What `decoder` would gain in length is left out of its gradient.
        """
        z = (x - self.mean) / self.scale
        pre = torch.addmm(self.encoder_bias, z, self.encoder.T)
        active = largest(pre, self.k * len(x))
        left = self._decoded(active, len(x)) + self.decoder_bias - z
        loss = left.square().mean()
        self.encoder.grad, self.decoder.grad = torch.zeros_like(self.encoder), torch.zeros_like(self.decoder)
        self.encoder_bias.grad = torch.zeros_like(self.encoder_bias)
        slope = left * (2 / left.numel())
        self.decoder_bias.grad = slope.sum(0)
        self._backward(active, z, slope)
        dead = self.idle >= IDLE
        if dead.any():
            names = dead.nonzero()[:, 0]
            some = largest(pre[:, names], max(1, z.shape[1] // 2) * len(x))
            some = some._replace(columns=names[some.columns])
            more = self._decoded(some, len(x)) + left
            loss = loss + AUXILIARY * more.square().mean()
            self._backward(some, z, more * (2 * AUXILIARY / more.numel()))
        along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
        self.decoder.grad -= along * self.decoder
        fired = torch.zeros_like(dead).index_fill_(0, active.columns, True)
        self.idle.add_(1).masked_fill_(fired, 0)
        least = active.values.min() if len(active.values) else self.threshold
        self.threshold.copy_(torch.where(self.threshold < 0, least, torch.lerp(least, self.threshold, _DECAY)))
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Give the rows of `decoder` length 1 again, after a step of an optimiser."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))

    def _decoded(self, active: Active, n: int) -> Tensor:
        """(N, D) f W_dec."""
        return _summed(active.rows, active.columns, active.values, self.decoder, n)

    def _backward(self, active: Active, z: Tensor, slope: Tensor) -> None:
        """Add to the gradients what the slope (N, D) of a reconstruction by some latents brings."""
        rows, columns, values = active
        of_values = _products(rows, columns, slope, self.decoder)
        order = columns.argsort(stable=True)
        rows, columns, values, of_values = (of[order] for of in (rows, columns, values, of_values))
        for parameter, weights, of in ((self.decoder, values, slope), (self.encoder, of_values, z)):
            cast(Tensor, parameter.grad).add_(_summed(columns, rows, weights, of, self.n_latents))
        ones = torch.ones_like(of_values)[:, None]
        at = torch.arange(len(columns), device=columns.device)
        cast(Tensor, self.encoder_bias.grad).add_(_summed(columns, at, of_values, ones, self.n_latents)[:, 0])


class Active(NamedTuple):
    """The latents that fire: for each its row, its column and its activation (M,), row by row."""

    rows: Tensor
    columns: Tensor
    values: Tensor


def largest(pre: Tensor, n: int) -> Active:
    """The n largest of the positive entries of pre (N, L), all of them where there are fewer.

    A sample says about where the n-th lies, so that only what is above has to be sorted: the same, some times faster.
    """
    flat = pre.flatten()
    sample = flat[::_SAMPLED]
    share = min(1.0, 1.3 * n / len(flat))
    bound = sample.kthvalue(max(1, round((1 - share) * len(sample)))).values.clamp(min=0)
    above = (flat > bound).nonzero()[:, 0]
    if len(above) < n:
        above = (flat > 0).nonzero()[:, 0]
    if len(above) > n:
        # Of equal ones the first: what is kept must not depend on how a sort was shared out.
        least = flat[above].topk(n).values[-1]
        surely, equal = above[flat[above] > least], above[flat[above] == least]
        above = torch.cat([surely, equal[: n - len(surely)]]).sort().values
    return Active(above // pre.shape[1], above % pre.shape[1], flat[above])


def _summed(owner: Tensor, at: Tensor, weights: Tensor, of: Tensor, n: int) -> Tensor:
    """(n, D) for each owner, in rising order, the sum of its weights times rows of `of`."""
    start = torch.searchsorted(owner, torch.arange(n, device=owner.device))
    sums: Tensor = F.embedding_bag(at, of, start, mode="sum", per_sample_weights=weights)
    return sums


def _products(rows: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(M,) the products of rows of a with rows of b, for pairs row by row."""
    start = torch.searchsorted(rows, torch.arange(len(a) + 1, device=rows.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are new
        pattern = torch.sparse_csr_tensor(
            start, columns, torch.zeros_like(a[:1, 0]).expand(len(rows)), (len(a), len(b))
        )
        found: Tensor = torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    return found


def mean_of(x: Tensor) -> Tensor:
    """(D,) float64 of rows (N, D)."""
    return torch.stack([part.double().sum(0) for part in x.split(_PART)]).sum(0) / len(x)


def squares(x: Tensor, *, batch_size: int = 4096) -> float:
    """The sum of the squares of rows (N, D) about their mean, in float64."""
    mean = mean_of(x)
    return float(sum((part.double() - mean).square().sum() for part in x.split(batch_size)))


@dataclass(frozen=True)
class Quality:
    """How well an autoencoder gives back what it did not see: `nmse` = sum |x - x'|^2 / sum |x - mean|^2, with these
    rows' own mean, `explained` = 1 - nmse, `fires` (L,) which latents any row fires, `dead` the share of the others,
    `active` how many a row fires on average."""

    nmse: float
    active: float
    fires: Tensor

    @property
    def explained(self) -> float:
        return 1 - self.nmse

    @property
    def dead(self) -> float:
        return 1 - float(self.fires.double().mean())


@torch.no_grad()
def quality(sae: SparseAutoencoder, x: Tensor, *, batch_size: int = 4096) -> Quality:
    """That on rows x (N, D), sums in float64. Raises DataError where all rows are the same."""
    off, n_active = x.new_zeros((), dtype=torch.float64), 0
    fires = torch.zeros(sae.n_latents, dtype=torch.bool, device=x.device)
    for part in x.split(batch_size):
        f = sae.encode(part)
        fires |= (f > 0).any(0)
        n_active += int((f > 0).sum())
        off += (sae.decode(f) - part).double().square().sum()
    spread = squares(x, batch_size=batch_size)
    if not spread > 0:
        raise DataError("what the layer writes is the same for all images: nothing can be explained")
    return Quality(float(off) / spread, n_active / len(x), fires.cpu())


class LatentLayer(nn.Module):
    """x + (decode(f') - decode(f)) of x, with f = encode(x) and f' what becomes of f in `units`, which does nothing; at
    some of the `tokens` (B, T, D), or everywhere."""

    def __init__(self, sae: SparseAutoencoder, axis: int, tokens: slice | None) -> None:
        super().__init__()
        self.sae, self.axis, self.tokens = sae, axis, tokens
        self.units = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        f = self.sae.encode(rows_at(x, self.axis, self.tokens))
        changed = ((self.units(f) - f) @ self.sae.decoder * self.sae.scale).movedim(-1, self.axis)
        if self.tokens is not None:
            before = self.tokens.start or 0
            changed = F.pad(changed, (0, 0, before, x.shape[1] - before - changed.shape[1]))
        out: Tensor = x + changed
        return out


def rows_at(x: Tensor, axis: int, tokens: slice | None) -> Tensor:
    """(B, positions..., D) of what a layer writes with its features on an axis, at some tokens or all positions."""
    of: Tensor = x.movedim(axis, -1)
    return of if tokens is None else of[:, tokens]


@torch.no_grad()
def rows_of(model: nn.Module, site: Site, batch: Batch, tokens: slice | None = None) -> Tensor:
    """(B, P, D) the features of images that a site holds, at some tokens or at all P positions."""
    found = []
    with without_tf32(), hooks.recorded(model, [site]) as seen:
        for part in batch.in_passes():
            model(part.x.clone())
            of = rows_at(seen[site][0], 1, tokens)
            found.append(of.reshape(len(of), -1, of.shape[-1]))
    return torch.cat(found)


@contextmanager
def latents(
    model: nn.Module, layer: str, axis: int, sae: SparseAutoencoder, tokens: slice | None = None
) -> Iterator[Site]:
    """Inside, the latents of what a layer writes, with its features on an axis, are units: at these tokens, or at every
    position. Bit for bit nothing changes while they are left alone; `hooks.ablated` takes one out, with what the
    autoencoder leaves unexplained kept as it is. Gives their site; gradients reach it.

    Raises ModelError for a layer that there is not, and in a pass for one that writes another number of features.
    """
    module = LatentLayer(sae, axis, tokens)
    module.train(hooks.layer(model, layer).training)
    with inserted(model, layer, module) as name:
        place = f"{name}.module.units"
        whole = tuple((unit,) for unit in range(sae.n_latents))
        yield Site(place, "latent", sae.n_latents, -1, (Member(place, "in", whole, -1),))
