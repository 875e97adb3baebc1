"""The embedded main job: a small network trained on scikit-learn's digits, for `sukashi demo` and the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sukashi.models import Loaded, load
from sukashi.types import Batch


def train_digits(spec: str, data: Batch, *, epochs: int = 20, seed: int = 0) -> Loaded:
    """A digits network of ours (`sukashi:digits_cnn` or `sukashi:digits_vit`), trained on `data` in a few seconds.

    AdamW with a one-cycle schedule, batches of 64, on the CPU; the same seed gives the same weights on one machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load(spec)
        model: nn.Module = loaded.model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        steps = epochs * -(-len(data) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(data)).split(64):
                batch = data[rows]
                loss = F.cross_entropy(model(batch.x), batch.target)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
    model.eval()
    return loaded
