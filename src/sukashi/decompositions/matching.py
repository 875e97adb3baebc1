"""Concepts of one network held against those of another on the same crops: which is which, and how alike they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sukashi.core.errors import DataError


@dataclass(frozen=True)
class Matched:
    """`pairs` (M, 2) which concept of the one is which of the other, `likeness` (M,) their cosine, in the order of the
    one's."""

    pairs: Tensor
    likeness: Tensor


def matched(one: Tensor, other: Tensor) -> Matched:
    """The assignment of concepts with the largest sum of cosines between what two networks find in the same crops.

    `one` (N, K) and `other` (N, L) are how much of each concept is in each of N crops; M = min(K, L). Directions of two
    networks are in no common space, crops are. Concepts that are in no crop are like none.

    Raises DataError for other crops.
    """
    if len(one) != len(other) or not len(one):
        raise DataError(
            f"concepts of {len(one)} crops can't be held against those of {len(other)}: give the same crops"
        )
    unit = [of.double() / of.double().norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny) for of in (one, other)]
    cosine = (unit[0].T @ unit[1]).cpu()
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    pairs = torch.tensor(list(zip(rows.tolist(), columns.tolist(), strict=True)))
    return Matched(pairs, cosine[pairs[:, 0], pairs[:, 1]])
