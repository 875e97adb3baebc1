"""Sparse autoencoders, trained; a kill changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sukashi.core import progress
from sukashi.core.errors import DataError
from sukashi.core.precision import without_tf32
from sukashi.data.augment import derived
from sukashi.decompositions.sae import SparseAutoencoder
from sukashi.training import checkpoint
from sukashi.training.checkpoint import State

_FALLS = 0.2  # of the steps, at the end, over which the rate falls to 0


def fit_autoencoder(
    x: Tensor,
    n_latents: int,
    k: int,
    *,
    out: Path,
    about: dict[str, Any],
    epochs: int = 20,
    batch_size: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
    seconds: float = 10.0,
) -> SparseAutoencoder:
    """A BatchTopK autoencoder of rows x (N, D), by Adam on batches drawn anew each epoch; the rate is constant, and
    falls to 0 over the last fifth.

    `out` holds its checkpoint, written every `seconds`; the same call goes on from there, in the same bits on one
    device. `about` (JSON) says which rows these are: a checkpoint of others is refused.

    Raises DataError for fewer rows than two and for rows that are all the same or not finite, UsageError for k above
    the latents and a folder of another training.
    """
    if len(x) < 2:
        raise DataError(f"an autoencoder needs two rows at least, got {len(x)}")
    sae = SparseAutoencoder(x.shape[1], n_latents, k, generator=torch.Generator().manual_seed(seed)).to(x.device)
    sae.standardise(x)
    state = State(sae, torch.optim.Adam(sae.parameters(), lr=lr, fused=True), None)
    n_batches = -(-len(x) // batch_size)
    total = epochs * n_batches
    given = {"latents": n_latents, "k": k, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    kept = checkpoint.Checkpoints(out, {**about, **given}, seconds)
    with checkpoint.held(out, kept.described), without_tf32(), progress.task("autoencoder", total) as task:
        if (out / checkpoint.FILE).exists():
            checkpoint.restore(out / checkpoint.FILE, state)
        task.advance(state.step)
        while state.step < total:
            epoch, number = divmod(state.step, n_batches)
            generator = torch.Generator().manual_seed(derived(seed, epoch, 0))
            batches = torch.randperm(len(x), generator=generator).tensor_split(n_batches)
            for rows in batches[number:]:
                for group in state.optimizer.param_groups:
                    group["lr"] = lr * min(1.0, (total - state.step) / (_FALLS * total))
                loss = sae.step(x[rows.to(x.device)])
                state.optimizer.step()
                sae.settle()
                state.step += 1
                if kept.due():
                    kept.keep(state)
                task.advance(note=f"epoch {epoch + 1}, {_said(loss)}")
    return sae.requires_grad_(False).eval()


def _said(loss: Tensor) -> str:
    return f"loss {float(loss):.4f}"
