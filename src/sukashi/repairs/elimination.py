"""Units of a layer's input eliminated one after another, the layer refitted each time: the optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sukashi.repairs.rows import windows

DAMPING = 1e-3  # of the mean square of what is read


class Elimination:
    """A layer y = W x + b whose inputs go, a few at a time, while what is left of W and b makes up for them.

    With H = sum x x' + lambda over rows x that were read (lambda is a thousandth of the mean of x^2; the intercept, the
    last of x, costs nothing), and R the inputs that go, the change that raises sum |y' - y|^2 + lambda |W' - W|^2 least
    (Hassibi and Stork 1993; Frantar and Alistarh 2022, eq. 3 and 4, for several weights at once) is

        W' = W - W_R (H^-1_RR)^-1 H^-1_R,      rise = sum over outputs of W_R (H^-1_RR)^-1 W_R'

    and H^-1 loses R by one step of Gauss. One after another they come to the least squares solution of all together.
    A layer without a bias is taken to have one of zero: what follows it, a BatchNorm as a rule, can have it.
    """

    def __init__(self, layer: nn.Module, gram: Tensor) -> None:
        """`gram` (N + 1, N + 1) are the sums of what the layer read, as `gram_of` gives them."""
        weight, bias = cast(Tensor, layer.weight).flatten(1).double(), cast(Tensor | None, layer.bias)
        column = torch.zeros_like(weight[:, 0]) if bias is None else bias.double()
        self.weight = torch.cat([weight, column[:, None]], 1)  # (M, N + 1)
        penalty = torch.zeros_like(gram.diagonal())
        penalty[:-1] = DAMPING * gram.diagonal()[:-1].mean()
        penalty[gram.diagonal() + penalty <= 0] = 1.0  # what is always zero has no part in what is written
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(penalty)))

    def rises(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """(U,) by how much the loss of each of these groups of inputs (U, k) alone raises the error, whose products of
        outputs count by `weights` (M, M): the unit matrix for the sum of squares.
        """
        own = self.inverse[inputs[:, :, None], inputs[:, None, :]]
        lost = self.weight[:, inputs].permute(1, 2, 0)  # (U, k, M)
        found: Tensor = ((lost @ weights) * torch.linalg.solve(own, lost)).sum((1, 2))
        return found

    def remove(self, inputs: Tensor) -> None:
        """Take these inputs (k,) out for good."""
        lever = torch.linalg.solve(self.inverse[inputs][:, inputs], self.inverse[inputs])
        self.weight = self.weight - self.weight[:, inputs] @ lever
        self.weight[:, inputs] = 0.0
        self.inverse = self.inverse - self.inverse[:, inputs] @ lever
        self.inverse[inputs] = self.inverse[:, inputs] = 0.0
        self.inverse[inputs, inputs] = 1.0


def gram_of(layer: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """(N + 1, N + 1) sum x x' over what a layer reads for its outputs at places (B, P), and a 1 at the end; float64."""
    rows = windows(layer, x, at).double()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.T @ rows


def inputs_of(layer: nn.Module, index: Sequence[Sequence[int]]) -> Tensor:
    """(U, k) where the positions of each unit stand among a layer's inputs: of a convolution, with all taps."""
    taps = cast(Tensor, layer.weight)[0, 0].numel()
    return (torch.tensor(index)[:, :, None] * taps + torch.arange(taps)).flatten(1)
