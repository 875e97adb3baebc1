"""Imputation by its definition: one equation a missing pixel, and a sparse direct solve."""

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch

WEIGHTS = {(dy, dx): 1 / 6 if 0 in (dy, dx) else 1 / 12 for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)}


def solved(image, missing):
    """The same by the definition: one equation a missing pixel, a sparse direct solve, one image (C, H, W)."""
    height, width = missing.shape
    numbers = {tuple(place): n for n, place in enumerate(np.argwhere(missing.numpy()))}
    system = scipy.sparse.lil_matrix((len(numbers), len(numbers)))
    right = np.zeros((len(numbers), len(image)))
    for (y, x), n in numbers.items():
        for (dy, dx), weight in WEIGHTS.items():
            there = y + dy, x + dx
            if not (0 <= there[0] < height and 0 <= there[1] < width):
                continue
            system[n, n] += weight
            if there in numbers:
                system[n, numbers[there]] -= weight
            else:
                right[n] += weight * image[:, there[0], there[1]].numpy()
    filled = image.clone()
    if not numbers:
        return filled
    values = scipy.sparse.linalg.spsolve(system.tocsc(), right).reshape(len(numbers), -1)
    for (y, x), n in numbers.items():
        filled[:, y, x] = torch.from_numpy(values[n])
    return filled
