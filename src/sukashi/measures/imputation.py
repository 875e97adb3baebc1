"""Noisy linear imputation without the noise: missing pixels become the weighted mean of what surrounds them.

Rong et al. 2022 (sec. 4.3, appendix) take pixels away so that the hole gives away little of its shape: every missing
pixel equals the mean of its eight neighbours, weighted 1/6 at its sides and 1/12 at its corners (those outside the
image left out). With S the sum over a neighbourhood by [1, 2, 1] x [1, 2, 1] and D the sum of a pixel's weights that
lie inside the image, that is

    A u = D u - (S/12 - 1/3) u = (S/12 - 1/3) of the known pixels,    at the missing ones,

symmetric and positive definite as long as one pixel is known. Others build this sparse matrix and factorise it image
by image; here conjugate gradients run over all images and channels at once, preconditioned by one multigrid V-cycle: a
Jacobi sweep, the same on a grid half as fine (a coarse pixel is missing where its four fine ones are; residuals add up,
corrections spread unchanged), a Jacobi sweep. In two dimensions the same stencil serves on every grid. No damping: the
spectrum of D^-1 A reaches 4/3 and its rough half starts at 2/3, so 1 is the best factor.

Columns lie innermost, (H, W * columns), because then every shift and every coarsening is a slice of long runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sukashi.errors import DataError, UsageError

# Numbers in one vector of the solver: a dozen such vectors should lie in a processor's cache.
CACHED = 2**17
# On noise and on smooth holes, at 8 to 512 pixels, 1e-4 takes some ten steps and 1e-11 thirty.
LIMIT = 500
COARSEST = 8


def impute(x: Tensor, missing: Tensor, *, tolerance: float = 1e-4) -> Tensor:
    """Images (B, C, H, W) with each missing pixel the weighted mean of its neighbours; the known ones keep their bits.

    `missing` (B, H, W) bool. Solved in the precision of x until the error, in the norm of A and of each image and
    channel by itself, is about `tolerance` of that of the mean colour of the known pixels. The result follows scale and
    shift of the pixels, so normalised images are imputed as the pixels are, and does not depend on the other images.

    Raises UsageError where an image has no known pixel, and for a tolerance that the precision cannot reach; DataError
    for pixels that are not finite.
    """
    least = 10 * torch.finfo(x.dtype).eps
    if not least <= tolerance < 1:
        raise UsageError(f"tolerance must be in [{least:.0e}, 1) for {x.dtype}, got {tolerance}: give a larger one")
    if missing.flatten(1).all(dim=1).any():
        raise UsageError("an image has no known pixel to impute the others from: remove fewer than all")
    if not x.isfinite().all():
        raise DataError("an image holds NaN or Inf: nothing can be imputed from it; check the preprocessing")
    # A GPU is the faster the more it gets at once, a processor as long as all lies in its cache.
    rows = len(x) if x.is_cuda else max(1, CACHED // max(1, x[0].numel()))
    parts = zip(x.split(rows), missing.split(rows), strict=True)
    return torch.cat([_solve(images, holes, tolerance) for images, holes in parts])


def _solve(x: Tensor, missing: Tensor, tolerance: float) -> Tensor:
    """Preconditioned conjugate gradients, one system a column; columns that are done stand still."""
    (n_images, n_channels, height, width), n_columns = x.shape, x.shape[0] * x.shape[1]

    def columns(images: Tensor) -> Tensor:
        return images.permute(2, 3, 0, 1).reshape(height, width * n_columns).contiguous()

    def row(values: Tensor) -> Tensor:
        """(columns,) as a row of the grid: added in long runs, where broadcasting would go by threes."""
        return values.repeat(width)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return torch.mul(one, other, out=product).sum(0).view(width, n_columns).sum(0)

    known = ~missing[:, None]
    mean = (x * known).sum((2, 3)) / known.sum((2, 3))
    solution = columns((x - mean[:, :, None, None]) * known)
    holes = columns((~known).to(x.dtype).expand_as(x))
    product, applied = torch.empty_like(solution), torch.empty_like(solution)
    grids = _grids(holes.view(height, width, n_columns))
    step = _Plane(height, width, n_columns, x)
    step.values.copy_(solution)
    # Outside the holes the residual is no residual, and nothing reads it: the V-cycle starts with a product by 0 there.
    residual = step.around() / 12
    step.values.copy_(_v_cycle(grids, residual))
    whole = (_weights(height, width, x) + 1 / 3).repeat_interleave(n_columns, dim=1)
    energy = dot(step.values, residual)
    stop = tolerance**2 * energy
    for _ in range(LIMIT):
        active = energy > stop
        if not active.any():
            filled = (solution + row(mean.flatten())).view(height, width, n_images, n_channels).permute(2, 3, 0, 1)
            return torch.where(known, x, filled)
        torch.mul(whole, step.values, out=applied).add_(step.around(), alpha=-1 / 12)
        length = row(torch.where(active, energy / dot(step.values, applied), 0))
        solution.addcmul_(step.values, length)
        residual.addcmul_(applied, length, value=-1)
        towards = _v_cycle(grids, residual)
        after = dot(towards, residual)
        torch.addcmul(towards, step.values, row(torch.where(active, after / energy, 0)), out=step.values)
        energy = torch.where(active, after, energy)
    raise DataError(f"imputation did not reach tolerance {tolerance} in {LIMIT} steps: give a larger one")


class _Plane:
    """Columns of (height, width) numbers with zeros around them, and room to sum over neighbourhoods."""

    def __init__(self, height: int, width: int, n_columns: int, like: Tensor) -> None:
        n = n_columns

        def room(rows: int, cells: int) -> Tensor:
            return torch.empty(rows, cells * n, dtype=like.dtype, device=like.device)

        framed = room(height + 2, width + 2).zero_()
        self.values = framed[1:-1, n:-n]
        pairs, threes, rows = room(height + 2, width + 1), room(height + 2, width), room(height + 1, width)
        self.total = room(height, width)
        # [1, 2, 1] is [1, 1] twice, and so is each direction: four additions in all.
        self._additions = (
            (framed[:, :-n], framed[:, n:], pairs),
            (pairs[:, :-n], pairs[:, n:], threes),
            (threes[:-1], threes[1:], rows),
            (rows[:-1], rows[1:], self.total),
        )

    def around(self) -> Tensor:
        """(height, width * columns) sums over neighbourhoods by [1, 2, 1] x [1, 2, 1]; overwritten by the next."""
        for one, other, out in self._additions:
            torch.add(one, other, out=out)
        return self.total


class _Grid(NamedTuple):
    """One grid of the V-cycle: its plane, 1 / D where pixels are missing and 0 elsewhere, and the next one's share.

    `quarters` are views of the plane, one for each of the four fine pixels of every coarse one.
    """

    plane: _Plane
    inverse: Tensor
    folds: tuple[tuple[Tensor, Tensor, Tensor], ...]
    quarters: tuple[Tensor, ...]


def _grids(holes: Tensor) -> list[_Grid]:
    """From the image's own grid to the coarsest that has missing pixels; `holes` (H, W, columns) is 1 at those.

    The last row or column of an odd number has no coarse pixel.
    """
    found: list[_Grid] = []
    while True:
        height, width, n_columns = holes.shape
        h, w = height // 2, width // 2
        plane = _Plane(height, width, n_columns, holes)
        weights = _weights(height, width, holes)
        total, values = (t.unflatten(1, (width, n_columns)) for t in (plane.total, plane.values))
        halved, folded = holes.new_empty(h, width, n_columns), holes.new_empty(h, w, n_columns)
        found.append(
            _Grid(
                plane,
                (holes / weights[..., None]).flatten(1),
                (
                    (total[0 : 2 * h : 2], total[1 : 2 * h : 2], halved),
                    (halved[:, 0 : 2 * w : 2], halved[:, 1 : 2 * w : 2], folded),
                ),
                tuple(values[i : 2 * h : 2, j : 2 * w : 2] for i in (0, 1) for j in (0, 1)),
            )
        )
        both = holes[0 : 2 * h : 2] * holes[1 : 2 * h : 2]
        holes = both[:, 0 : 2 * w : 2] * both[:, 1 : 2 * w : 2]
        if min(height, width) < COARSEST or not holes.any():
            return found


def _v_cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """About A^-1 residual, 0 outside the holes; symmetric and positive definite, as conjugate gradients need it."""
    grid, *coarser = grids
    values = grid.plane.values
    torch.mul(grid.inverse, residual, out=values)
    if coarser:
        # After a sweep from zero the residual is that of the neighbours alone: (S - 4) / 12.
        grid.plane.around().add_(values, alpha=-4)
        for one, other, out in grid.folds:
            torch.add(one, other, out=out)
        correction = _v_cycle(coarser, grid.folds[-1][-1].flatten(1))
        for quarter in grid.quarters:
            quarter.add_(correction.unflatten(1, quarter.shape[1:]), alpha=1 / 12)
    total = grid.plane.around().add_(values, alpha=-4)
    torch.add(residual, total, alpha=1 / 12, out=total)
    return torch.mul(grid.inverse, total, out=values)


def _weights(height: int, width: int, like: Tensor) -> Tensor:
    """(height, width) D: the sum of the weights of a pixel's neighbours that lie inside the image."""

    def line(length: int) -> Tensor:
        inside = torch.full((length,), 4.0, dtype=like.dtype, device=like.device)
        inside[0] -= 1
        inside[-1] -= 1
        return inside

    return torch.outer(line(height), line(width)) / 12 - 1 / 3
