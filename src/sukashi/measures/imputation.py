"""Noisy linear imputation without the noise: missing pixels become the weighted mean of what surrounds them.

Rong et al. 2022 (sec. 4.3, appendix) take pixels away so that the hole gives away little of its shape: every missing
pixel equals the mean of its eight neighbours, weighted 1/6 at its sides and 1/12 at its corners, those outside the
image left out. With S the sum over a neighbourhood by [1, 2, 1] x [1, 2, 1] and W what S makes of ones, that is twelve
times

    W u - S u = S known,    at the missing pixels, u and known being 0 elsewhere,

symmetric and positive definite as long as one pixel is known. Others build this sparse matrix and factorise it image
by image; here conjugate gradients run over all images and channels at once, preconditioned by one multigrid V-cycle:
two Jacobi sweeps, the same on a grid half as fine (a coarse pixel is missing where its four fine ones are; residuals
add up, corrections spread unchanged), two Jacobi sweeps. In two dimensions the same stencil serves on every grid.

Columns lie innermost, (H, W * columns), because then every shift and every coarsening is a slice of long runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sukashi.core.errors import DataError, UsageError

# Numbers in one vector of the solver: a dozen such vectors should lie in a processor's cache.
CACHED = 2**17
# On noise and on smooth holes, at 8 to 256 pixels, 1e-4 takes three to eight steps.
LIMIT = 500
COARSEST = 8
# Chebyshev's two for [5/9, 13/9], where the rough half of D^-1 A lies (in an image's interior it is [2/3, 4/3]).
SWEEPS = (1 / (1 + math.sqrt(8) / 9), 1 / (1 - math.sqrt(8) / 9))


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
        """(columns,) as a row of the grid: taken in long runs, where broadcasting would go by threes."""
        return values.repeat(width)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return torch.mul(one, other, out=product).sum(0).view(width, n_columns).sum(0)

    known = ~missing[:, None]
    mean = (x * known).sum((2, 3)) / known.sum((2, 3))
    solution = columns((x - mean[:, :, None, None]) * known)
    grids = _grids(columns((~known).to(x.dtype).expand_as(x)).view(height, width, n_columns))
    product, step = torch.empty_like(solution), _Plane(height, width, n_columns, x)
    step.values.copy_(solution)
    # Outside the holes this is no residual, and nothing reads it: the V-cycle starts with a product by 0 there.
    residual = step.around().clone()
    step.values.copy_(_v_cycle(grids, residual))
    energy = dot(step.values, residual)
    stop = tolerance**2 * energy
    for _ in range(LIMIT):
        active = energy > stop
        if not active.any():
            filled = (solution + row(mean.flatten())).view(height, width, n_images, n_channels).permute(2, 3, 0, 1)
            return torch.where(known, x, filled)
        # minus the system's matrix times the step
        applied = step.around().addcmul_(step.whole, step.values, value=-1)
        length = row(torch.where(active, energy / -dot(step.values, applied), 0))
        solution.addcmul_(step.values, length)
        residual.addcmul_(applied, length)
        towards = _v_cycle(grids, residual)
        after = dot(towards, residual)
        torch.addcmul(towards, step.values, row(torch.where(active, after / energy, 0)), out=step.values)
        energy = torch.where(active, after, energy)
    raise DataError(f"imputation did not reach tolerance {tolerance} in {LIMIT} steps: give a larger one")


class _Plane:
    """Columns of (height, width) numbers with zeros around them, and room to sum over neighbourhoods.

    `whole` is W: the sum of the weights that lie inside the image, the pixel's own of 4 among them.
    """

    def __init__(self, height: int, width: int, n_columns: int, like: Tensor) -> None:
        n = n_columns

        def room(rows: int, cells: int) -> Tensor:
            return torch.empty(rows, cells * n, dtype=like.dtype, device=like.device)

        framed = room(height + 2, width + 2).zero_()
        pairs, threes, rows = room(height + 2, width + 1), room(height + 2, width), room(height + 1, width)
        self.values = framed[1:-1, n:-n]
        self.total = room(height, width)
        # [1, 2, 1] is [1, 1] twice, and so is each direction: four additions in all.
        self._additions = (
            (framed[:, :-n], framed[:, n:], pairs),
            (pairs[:, :-n], pairs[:, n:], threes),
            (threes[:-1], threes[1:], rows),
            (rows[:-1], rows[1:], self.total),
        )
        self.values.fill_(1)
        self.whole = self.around().clone()

    def around(self) -> Tensor:
        """(height, width * columns) sums over neighbourhoods by [1, 2, 1] x [1, 2, 1]; overwritten by the next."""
        for one, other, out in self._additions:
            torch.add(one, other, out=out)
        return self.total


class _Grid(_Plane):
    """One grid of the V-cycle: a plane, its diagonal's inverse, and what it shares with the next, coarser grid.

    `inverse` is 0 at known pixels. `folds` are the additions that sum the four fine pixels of every coarse one, into
    `folded`, and `quarters` views of the values at each of the four; the last row or column of an odd number has no
    coarse pixel.
    """

    def __init__(self, holes: Tensor) -> None:
        height, width, n_columns = holes.shape
        h, w = height // 2, width // 2
        super().__init__(height, width, n_columns, holes)
        self.inverse = holes.flatten(1) / (self.whole - 4)
        total, values = (t.unflatten(1, (width, n_columns)) for t in (self.total, self.values))
        halved, folded = holes.new_empty(h, width, n_columns), holes.new_empty(h, w, n_columns)
        self.folds = (
            (total[0 : 2 * h : 2], total[1 : 2 * h : 2], halved),
            (halved[:, 0 : 2 * w : 2], halved[:, 1 : 2 * w : 2], folded),
        )
        self.folded = folded.view(h, w * n_columns)
        self.quarters = [values[i : 2 * h : 2, j : 2 * w : 2] for i in (0, 1) for j in (0, 1)]

    def left(self, residual: Tensor) -> Tensor:
        """What the values leave of a residual, in `total`; right at missing pixels only."""
        return self.around().addcmul_(self.whole, self.values, value=-1).add_(residual)


def _grids(holes: Tensor) -> list[_Grid]:
    """From the image's own grid to the coarsest that has missing pixels; `holes` (H, W, columns) is 1 at those."""
    found = [_Grid(holes)]
    while min(holes.shape[:2]) >= COARSEST:
        h, w = holes.shape[0] // 2, holes.shape[1] // 2
        both = holes[0 : 2 * h : 2] * holes[1 : 2 * h : 2]
        holes = both[:, 0 : 2 * w : 2] * both[:, 1 : 2 * w : 2]
        if not holes.any():
            break
        found.append(_Grid(holes))
    return found


def _v_cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """About the solution for a residual, 0 outside the holes; symmetric and positive definite, as CG needs it."""
    grid, *coarser = grids
    first, *others = SWEEPS
    torch.mul(grid.inverse, residual, out=grid.values).mul_(first)
    for weight in others:
        grid.values.addcmul_(grid.inverse, grid.left(residual), value=weight)
    if coarser:
        grid.left(residual)
        for one, other, out in grid.folds:
            torch.add(one, other, out=out)
        correction = _v_cycle(coarser, grid.folded)
        for quarter in grid.quarters:
            quarter.add_(correction.unflatten(1, quarter.shape[1:]))
    for weight in reversed(SWEEPS):
        grid.values.addcmul_(grid.inverse, grid.left(residual), value=weight)
    return grid.values
