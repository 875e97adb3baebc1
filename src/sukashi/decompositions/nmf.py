"""Matrices taken apart into parts that only add up (Lee and Seung 1999)."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from sukashi.core.errors import DataError, UsageError

_EVERY = 5  # steps between two looks at the error


def nmf(x: Tensor, n_components: int, *, steps: int = 400, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """u (N, K) and w (K, D), neither negative, that minimise |x - u w|^2 for x (N, D), which isn't negative either.

    Coordinate descent on Gram matrices (HALS: Cichocki and Phan 2009; Gillis and Glineur 2012): with G = w w' and
    P = x w', column k of u becomes max(0, u_k + (P_k - u G_k) / G_kk), all columns in turn; then the same is done for
    w. It starts from singular vectors (NNDSVDa: Boutsidis and Gallopoulos 2008), so that nothing is drawn, and ends
    where the error falls by less than `tolerance` of itself in five steps. Rows of w have a norm of 1, the component
    with the largest u comes first.

    Raises DataError for negative or infinite numbers, UsageError for more components than rows or columns.
    """
    check_parts(x, n_components)
    across = x.T.contiguous()
    u, w = _started(x, n_components)
    errors = [float(x.double().square().sum())]
    for number in range(1, steps + 1):
        u = _swept(u, w @ w.T, w @ across)
        gram, cross = u @ u.T, u @ x
        w = _swept(w, gram, cross)
        if number % _EVERY == 0:
            fitted = float((gram * (w @ w.T)).double().sum() - 2 * (w * cross).double().sum())
            errors.append(errors[0] + fitted)
            if errors[-2] - errors[-1] < tolerance * errors[-1]:
                break
    return _ordered(u, w)


def semi_nmf(x: Tensor, n_components: int, *, steps: int = 400, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """u (N, K), not negative, and w (K, D) of any sign that minimise |x - u w|^2 (Ding et al. 2010).

    w is least squares, u coordinate descent as in `nmf`, in turn; it starts from k-means. Rows of w have a norm of 1,
    the component with the largest u comes first. Errors are those of `nmf`, but for negative numbers.
    """
    check_parts(x, n_components, signed=True)
    across, whole = x.T.contiguous(), float(x.double().square().sum())
    w = torch.from_numpy(KMeans(n_components, n_init=1, random_state=0).fit(x.cpu().numpy()).cluster_centers_).to(x)
    u, last = nnls(x, w).T.contiguous(), whole
    for number in range(1, steps + 1):
        gram, cross = (u @ u.T).double(), (u @ x).double()
        w = torch.linalg.lstsq(gram.cpu(), cross.cpu(), driver="gelsd").solution.to(x)
        u = _swept(u, w @ w.T, w @ across)
        if number % _EVERY == 0:
            error = whole + float(((u @ u.T) * (w @ w.T)).double().sum() - 2 * (w * (u @ x)).double().sum())
            if last - error < tolerance * error:
                break
            last = error
    return _ordered(u, w)


def nnls(x: Tensor, w: Tensor, *, tolerance: float = 1e-7, sweeps: int = 2000) -> Tensor:
    """u (N, K), not negative, that minimises |x - u w|^2 for given parts w (K, D): every row by itself, all at once.

    Coordinate descent as in `nmf`, until no number changes by more than `tolerance` of the largest.
    """
    gram, cross = w @ w.T, w @ x.T
    u = torch.zeros_like(cross)
    for _ in range(sweeps):
        new = _swept(u, gram, cross)
        done = (new - u).abs().max() <= tolerance * new.abs().max()
        u = new
        if done:
            break
    return u.T.contiguous()


def check_parts(x: Tensor, n_components: int, signed: bool = False) -> None:
    """Refuse what can't be taken apart into so many components that are not negative."""
    if not 1 <= n_components <= min(x.shape):
        raise UsageError(
            f"n_components must be 1 to {min(x.shape)}, for there are {x.shape[0]:,} rows of {x.shape[1]:,} numbers, "
            f"got {n_components}"
        )
    if not x.isfinite().all():
        raise DataError("activations hold NaN or Inf: check the preprocessing")
    if not signed and x.min() < 0:
        raise DataError("activations are negative here, and parts only add up: take a layer behind a ReLU")


def _ordered(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) and (K, D) of u (K, N) and w (K, D): rows of w of norm 1, the component with the largest u first."""
    length = w.norm(dim=1)
    u = u * length[:, None]
    order = u.square().sum(1).argsort(descending=True, stable=True)
    return u[order].T.contiguous(), w[order] / length.where(length > 0, 1)[order, None]


def _swept(u: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """u (K, N) after each of its rows was changed in turn to the minimum of |x - u' w|^2 that is not negative;
    gram = w w' (K, K), cross = w x' (K, N)."""
    u = u.clone()
    scale = gram.diagonal().clamp(min=torch.finfo(u.dtype).tiny)
    gram, cross = gram / scale[:, None], cross / scale[:, None]
    for k in range(len(u)):
        u[k].add_(cross[k] - gram[k] @ u).clamp_(min=0)
    return u


def _started(x: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """u (K, N) and w (K, D): of each pair of singular vectors the signs that say more, zeros filled with the mean."""
    values, right = torch.linalg.eigh(x.T.double() @ x.double())
    right = right.flip(1)[:, :n_components].T
    sigma = values.flip(0)[:n_components].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    left = (x.double() @ right.T / sigma).T
    one, other = [(left * sign).clamp(min=0) for sign in (1, -1)], [(right * sign).clamp(min=0) for sign in (1, -1)]
    sizes = torch.stack([u.norm(dim=1) * w.norm(dim=1) for u, w in zip(one, other, strict=True)])
    more = sizes.max(0).indices[:, None]
    u, w = torch.where(more == 0, one[0], one[1]), torch.where(more == 0, other[0], other[1])
    root = (sigma * sizes.amax(0)).sqrt()[:, None]
    u, w = (of / of.norm(dim=1, keepdim=True).clamp(min=1e-300) * root for of in (u, w))
    mean = float(x.mean())
    return torch.where(u == 0, mean, u).to(x), torch.where(w == 0, mean, w).to(x)
