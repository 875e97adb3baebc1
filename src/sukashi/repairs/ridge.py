"""Ridge regression towards what a layer is, from sums over rows that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean square of what is read. Below the first nothing changes any more, at the last hardly anything is refitted.
DAMPING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 192  # columns; a third of the time less from 300 on, and powers of two are slower than the whole
_AT_ONCE = 2**24  # numbers of the systems that are solved together


class Sums:
    """What least squares need of rows x (R, N) that are read and r (R, M) that are missing in what is written: while
    they are fewer than N the rows themselves, and then

        gram = sum x' x,  cross = sum x' r,  missing = sum |r|^2

    all in float64, so that parts add up to the whole.
    """

    def __init__(self) -> None:
        self.gram = self.cross = torch.zeros((), dtype=torch.float64)
        self.missing = torch.zeros((), dtype=torch.float64)
        self.n_rows = 0
        self._few: list[tuple[Tensor, Tensor]] = []  # rows that are not in gram and cross

    def add(self, x: Tensor, r: Tensor) -> None:
        x, r = x.double(), r.double()
        self.missing = self.missing + r.square().sum()
        self.n_rows += len(x)
        self._few.append((x, r))
        if self.n_rows >= x.shape[1]:
            self._sum_up()

    def __add__(self, other: Sums) -> Sums:
        both = Sums()
        both.gram, both.cross, both.missing = (
            self.gram + other.gram,
            self.cross + other.cross,
            self.missing + other.missing,
        )
        both.n_rows, both._few = self.n_rows + other.n_rows, [*self._few, *other._few]
        if both.gram.dim() or both.n_rows >= both._few[0][0].shape[1]:
            both._sum_up()
        return both

    def change(self, damping: float, free: int = 0, live: Tensor | None = None) -> Tensor:
        """(N, M) the change D that minimises  sum |x D - r|^2 + lambda |D|^2,  lambda = damping * mean(diag(gram)).

        The last `free` rows of D, the intercept's, at most one, cost nothing. With `live` (N, M) only these numbers of
        D are other than zero: each column is a system of its own.
        """
        if live is not None:
            self._sum_up()
        elif self._few:
            return self._change_by_rows(damping, free)
        diagonal = self.gram.diagonal()
        n = len(diagonal) - free
        penalty = torch.zeros_like(diagonal)
        penalty[:n] = damping * diagonal[:n].mean()
        # What is always zero has no part in what is written, and must not make the system singular.
        penalty[diagonal + penalty <= 0] = 1.0
        matrix = self.gram + torch.diag(penalty)
        if live is None:
            return _solved(matrix, self.cross)
        columns = []
        for some, cross in zip(
            *(x.split(max(1, _AT_ONCE // matrix.numel()), dim=1) for x in (live, self.cross)), strict=True
        ):
            own = some.T[:, :, None] & some.T[:, None, :]
            matrices = torch.where(own, matrix, 0.0) + torch.diag_embed((~some.T).double())
            columns.append(_solved(matrices, (cross * some).T[:, :, None])[:, :, 0].T)
        return torch.cat(columns, 1)

    def error(self, change: Tensor) -> float:
        """sum |x D - r|^2 over the rows."""
        fitted = (change * (self.gram @ change)).sum() - 2 * (change * self.cross).sum() if self.gram.dim() else 0.0
        rows = sum(float((x @ change - r).square().sum() - r.square().sum()) for x, r in self._few)
        return float(fitted + rows + self.missing)

    def _change_by_rows(self, damping: float, free: int) -> Tensor:
        """The same by a system of as many numbers as there are rows: D = x' (x x' + lambda)^-1 r, of x and r less their
        means where an intercept makes up for these.
        """
        x, r = (torch.cat(of) for of in zip(*self._few, strict=True))
        n = x.shape[1] - free
        x = x[:, :n]
        penalty = damping * x.square().sum() / n
        mean_x, mean_r = (x.mean(0), r.mean(0)) if free else (torch.zeros_like(x[0]), torch.zeros_like(r[0]))
        x, r = x - mean_x, r - mean_r
        matrix = x @ x.T
        matrix.diagonal().add_(penalty if penalty > 0 else 1.0)
        change = x.T @ _solved(matrix, r)
        return torch.cat([change, (mean_r - mean_x @ change)[None]]) if free else change

    def _sum_up(self) -> None:
        for x, r in self._few:
            self.gram = self.gram + _products(x)
            self.cross = self.cross + x.T @ r
        self._few = []


def _products(x: Tensor) -> Tensor:
    """x' x (N, N), of which what lies above the diagonal is not multiplied but copied, block by block."""
    n = x.shape[1]
    found = x.new_empty(n, n)
    for start in range(0, n, _BLOCK):
        block = x[:, start:].T @ x[:, start : start + _BLOCK]
        found[start:, start : start + _BLOCK], found[start : start + _BLOCK, start:] = block, block.T
    return found


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solutions of symmetric systems; zero for one that is not positive."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    found: Tensor = torch.cholesky_solve(right, factor)
    return torch.where(failed[..., None, None] == 0, found, 0.0)


def refitted(fit: Sums, held_out: Sums, free: int = 0, live: Tensor | None = None) -> Tensor:
    """(N, M) the change for all rows, at the damping under which that of `fit` errs least on `held_out`; zero where
    none errs less there than no change does. `free` and `live` as in `Sums.change`.
    """
    changes = [fit.change(damping, free, live) for damping in DAMPING]
    errors = [held_out.error(change) for change in changes]
    best = min(range(len(DAMPING)), key=errors.__getitem__)
    if not errors[best] < float(held_out.missing):
        return torch.zeros_like(changes[best])
    return (fit + held_out).change(DAMPING[best], free, live)
