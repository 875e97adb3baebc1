"""Disentangled relevant subspaces: rotations after which relevance falls into few parts (Chormai et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError

EVERY = 10  # steps between two values of the objective


@dataclass(frozen=True)
class Found:
    """A basis (D, D), its objective, and of each trial the objective at its start and after every ten steps."""

    basis: Tensor
    objective: float
    history: list[list[float]]


def drsa(
    a: Tensor,
    c: Tensor,
    n_subspaces: int,
    *,
    generator: torch.Generator,
    trials: int = 3,
    steps: int = 500,
    step: float = 1.0,
    tolerance: float = 1e-5,
) -> Found:
    """Orthogonal subspaces U = (U_1 | ... | U_K) of D / K dimensions each that maximise

        J(U) = (mean_k (mean_n r_nk^2)^(1/4))^2,   r_nk = max(0, (U_k'a_n) . (U_k'c_n))

    over activations a (N, D) and contexts c (N, D) (`lrp.factors`): the mean over subspaces, of an exponent that keeps
    all of them in play, of how much relevance each has for the instances that it is most relevant for (Chormai et al.
    2024, eq. 11 and 12). With g_nk = dJ/dr_nk the gradient has a closed form, A'(g * C U) + C'(g * A U), g repeated for
    each column of its block.

    The paper iterates U <- (U + dJ) ((U + dJ)'(U + dJ))^(-1/2), 5,000 times. Here the same step is taken at
    U + t / (t + 3) (U - U_before), as Nesterov has it, with t from 0 again where a step leads down by the gradient
    (O'Donoghue and Candes 2015), until J rises by less than `tolerance` of itself in ten steps. a and c are scaled to a
    mean square norm of 1 first, because the gradient's length follows them; J is told in the scale given. Random
    orthogonal starts, the best of `trials` wins; orthonormalisation in float64. Subspaces are ordered by their part of
    the relevance, the largest first.

    Raises UsageError where K does not divide D, DataError for fewer vectors than dimensions, values that are not
    finite, and vectors without relevance.
    """
    n, size = a.shape
    dimensions(size, n_subspaces)
    if n < size:
        raise DataError(
            f"{n} vectors are too few for {size} features: give {size} at least, from more images or positions"
        )
    if not (a.isfinite().all() and c.isfinite().all()):
        raise DataError("activations or contexts hold NaN or Inf: no subspace can be found in them")
    scale = [float(of.double().square().sum(1).mean().sqrt()) for of in (a, c)]
    if not min(scale) > 0:
        raise DataError("activations or contexts are all zero: nothing is relevant here")
    a, c = a / scale[0], c / scale[1]
    best, history = None, []
    with progress.task("subspaces", trials * steps) as shown:
        for _ in range(trials):
            basis, values = _ascended(a, c, n_subspaces, orthogonal(size, generator), steps, step, tolerance, shown)
            history.append([value * scale[0] * scale[1] for value in values])
            if best is None or max(history[-1]) > best[1]:
                best = basis, max(history[-1])
    assert best is not None
    basis, objective = best
    share = relevance(a, c, basis, n_subspaces).double().mean(0).cpu()
    blocks = basis.view(size, n_subspaces, -1)[:, share.argsort(descending=True, stable=True)]
    return Found(blocks.reshape(size, size), objective, history)


def dimensions(size: int, n_subspaces: int) -> int:
    """How many each of so many equal subspaces of D features has. Raises UsageError where they do not divide these."""
    if not 1 <= n_subspaces <= size or size % n_subspaces:
        fitting = [k for k in range(1, size + 1) if size % k == 0]
        near = sorted(sorted(fitting, key=lambda k: abs(k - n_subspaces))[:3])
        raise UsageError(
            f"{n_subspaces} subspaces do not divide {size} features into equal parts: take {', '.join(map(str, near))}"
        )
    return size // n_subspaces


def relevance(a: Tensor, c: Tensor, basis: Tensor, n_subspaces: int) -> Tensor:
    """(N, K) R_nk = (U_k'a_n) . (U_k'c_n): they add up to a_n . c_n where the blocks make up all of the basis."""
    u = basis.to(a)
    found: Tensor = ((a @ u) * (c @ u)).unflatten(1, (n_subspaces, -1)).sum(2)
    return found


def objective(a: Tensor, c: Tensor, basis: Tensor, n_subspaces: int) -> float:
    """J of `drsa`."""
    r = relevance(a, c, basis, n_subspaces).clamp(min=0).double()
    return float(r.square().mean(0).pow(0.25).mean().square())


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """(D, D) drawn uniformly among orthogonal matrices, float64 (Mezzadri 2007)."""
    return nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64), generator=generator)


def polar(x: Tensor) -> Tensor:
    """x (x'x)^(-1/2): the nearest matrix with orthonormal columns, float64."""
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _ascended(
    a: Tensor,
    c: Tensor,
    n_subspaces: int,
    start: Tensor,
    steps: int,
    step: float,
    tolerance: float,
    shown: progress.Task,
) -> tuple[Tensor, list[float]]:
    """The best basis (D, D) on the way from a start, of those whose J is taken, and each J."""
    basis, before, t = start, start, 0
    best, values = start, [objective(a, c, start, n_subspaces)]
    for number in range(1, steps + 1):
        ahead = basis + t / (t + 3) * (basis - before)
        slope = gradient(a, c, ahead, n_subspaces)
        new = polar(ahead + step * slope)
        t = t + 1 if (slope * (new - basis)).sum() >= 0 else 0
        basis, before = new, basis
        shown.advance()
        if number % EVERY == 0 or number == steps:
            values.append(objective(a, c, basis, n_subspaces))
            best = basis if values[-1] == max(values) else best
            if values[-1] - values[-2] < tolerance * values[-1]:
                break
    return best, values


def gradient(a: Tensor, c: Tensor, basis: Tensor, n_subspaces: int) -> Tensor:
    """dJ/dU (D, D), float64, on the CPU; products in the precision and on the device of a."""
    u = basis.to(a)
    au, cu = a @ u, c @ u
    r = (au * cu).unflatten(1, (n_subspaces, -1)).sum(2).clamp(min=0)
    q = r.double().square().mean(0)
    # dJ/dr_nk = 2 m / K * q_k^(-3/4) / 4 * 2 r_nk / N; a subspace without relevance has none to follow.
    weight = q.pow(0.25).mean() / (n_subspaces * len(a)) * torch.where(q > 0, q.pow(-0.75), 0)
    g = (r * weight.to(r)).repeat_interleave(u.shape[1] // n_subspaces, dim=1)
    slope: Tensor = a.T @ (g * cu) + c.T @ (g * au)
    return slope.double().cpu()
