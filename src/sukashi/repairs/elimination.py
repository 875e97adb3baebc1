"""Units of a layer's input eliminated one after another, the layer refitted each time: the optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sukashi.repairs.rows import windows

DAMPING = 1e-3  # of the mean square of what is read
_PUT_OFF = 256  # rows: a product of so many is no slower than the memory it goes through


class Elimination:
    """A layer y = W x + b whose inputs go, a unit's at a time, while what is left of W and b makes up for them.

    With H = sum x x' + lambda over rows x that were read (lambda is a thousandth of the mean of x^2; the intercept, the
    last of x, costs nothing), and R the inputs that go, the change that raises sum |y' - y|^2 + lambda |W' - W|^2 least
    (Hassibi and Stork 1993; Frantar and Alistarh 2022, eq. 3 and 4, for several weights at once) is

        W' = W - W_R L,  L = (H^-1_RR)^-1 H^-1_R,      rise = sum over outputs of W_R (H^-1_RR)^-1 W_R'

    and H^-1 loses H^-1_R' L, one step of Gauss. One after another they come to the least squares solution of all
    together. Rises need no W, but of S = W' F W, where errors of outputs count by F, each unit's own block:

        rise = tr((H^-1_RR)^-1 S_RR),      S' = S - C' L - L' C,  C = S_R - S_RR L / 2

    A layer without a bias is taken to have one of zero: what follows it, a BatchNorm as a rule, can have it.
    """

    def __init__(self, inverse: Tensor, errors: Tensor, inputs: Tensor) -> None:
        """`inverse` and `errors` (N + 1, N + 1) are H^-1, as `inverse_of` gives it, and S of a layer before anything
        goes, which stay as they are; `inputs` (U, k) those of each unit.
        """
        self._inverse, self._errors = _Falling(inverse.clone(), inputs), _Falling(errors.clone(), inputs)
        self._gone = torch.zeros(len(inputs), dtype=torch.bool, device=inverse.device)

    def rises(self) -> Tensor:
        """(U,) by how much the loss of each unit alone raises the error; infinite for one that is gone."""
        priced = torch.linalg.solve(self._inverse.blocks, self._errors.blocks)
        found: Tensor = priced.diagonal(dim1=1, dim2=2).sum(1)
        return found.masked_fill(self._gone, torch.inf)

    def remove(self, unit: int) -> None:
        """Take a unit out for good."""
        rows, errors = self._inverse.rows(unit), self._errors.rows(unit)
        lever = torch.linalg.solve(self._inverse.blocks[unit], rows)
        half = errors - self._errors.blocks[unit] @ lever / 2
        self._inverse.subtract(rows, lever)
        self._errors.subtract(torch.cat([half, lever]), torch.cat([lever, half]))
        self._inverse.blocks[unit] = torch.eye(len(rows)).to(rows)
        self._gone[unit] = True


class _Falling:
    """A symmetric matrix (N, N) from which products are taken off, of which each unit's own block, `blocks` (U, k, k),
    is kept up to date, and what the rest loses is put off until `_PUT_OFF` rows have come together.
    """

    def __init__(self, matrix: Tensor, inputs: Tensor) -> None:
        self.blocks = matrix[inputs[:, :, None], inputs[:, None, :]]
        self._matrix, self._inputs = matrix, inputs
        self._left, self._right = (matrix.new_empty(_PUT_OFF + 2 * inputs.shape[1], len(matrix)) for _ in range(2))
        self._n = 0

    def rows(self, unit: int) -> Tensor:
        """(k, N) those of a unit's inputs."""
        of = self._inputs[unit]
        return self._matrix[of] - self._left[: self._n, of].T @ self._right[: self._n]

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Take left' right off, of rows (R, N)."""
        after = self._n + len(left)
        self._left[self._n : after], self._right[self._n : after], self._n = left, right, after
        self.blocks -= left[:, self._inputs].permute(1, 2, 0) @ right[:, self._inputs].permute(1, 0, 2)
        if self._n >= _PUT_OFF:
            self._matrix -= self._left[: self._n].T @ self._right[: self._n]
            self._n = 0


def inverse_of(gram: Tensor) -> Tensor:
    """H^-1 (N + 1, N + 1) of the sums of what a layer read, as `gram_of` gives them."""
    penalty = torch.zeros_like(gram.diagonal())
    penalty[:-1] = DAMPING * gram.diagonal()[:-1].mean()
    penalty[gram.diagonal() + penalty <= 0] = 1.0  # what is always zero has no part in what is written
    return torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(penalty)))


def weight_of(layer: nn.Module) -> Tensor:
    """(M, N + 1) the weights of a layer with its bias, of none zero, as the last."""
    weight, bias = cast(Tensor, layer.weight).flatten(1).double(), cast(Tensor | None, layer.bias)
    column = torch.zeros_like(weight[:, 0]) if bias is None else bias.double()
    return torch.cat([weight, column[:, None]], 1)


def gram_of(layer: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """(N + 1, N + 1) sum x x' over what a layer reads for its outputs at places (B, P), and a 1 at the end; float64."""
    rows = windows(layer, x, at).double()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows


def inputs_of(layer: nn.Module, index: Sequence[Sequence[int]]) -> Tensor:
    """(U, k) where the positions of each unit stand among a layer's inputs: of a convolution, with all taps."""
    taps = cast(Tensor, layer.weight)[0, 0].numel()
    return (torch.tensor(index)[:, :, None] * taps + torch.arange(taps)).flatten(1)
