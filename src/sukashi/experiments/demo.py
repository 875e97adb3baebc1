"""The embedded main job: a small network trained on scikit-learn's digits, compared and cut, in a minute."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from sukashi import data
from sukashi.core import files, progress
from sukashi.core.types import Batch
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.functions import compare, prune
from sukashi.experiments.workspace import Workspace
from sukashi.models import Loaded, load

CRITERIA = ("random", "magnitude", "taylor", "cbp", "amp", "cswap", "drift")


def run(out: Path, *, command: str) -> CompareResult:
    """Train, compare all criteria over three seeds, cut half of the units with `drift`: everything lies in `out`.

    What an earlier call has finished is kept. Returns what `compare` does.

    Raises UsageError for a folder that holds anything else.
    """
    out = out.expanduser()
    weights, parts = out / "digits_cnn.safetensors", {"compare": "compare", "prune": "pruned"}
    Workspace(out).check_place("demo", {weights.name, *parts.values()})
    for kind, name in parts.items():
        Workspace(out / name).check_place(kind)
    if not weights.exists():
        loaded = load("sukashi:digits_cnn")
        digits = data.load("digits")
        trained = train_digits("sukashi:digits_cnn", digits.train.whole(loaded.preprocess, 0))
        out.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in random order.
        known = {"trained_on": json.dumps([[digits.splits_sha256, 0.0]])}
        files.write(weights, safetensors.torch.save(trained.model.state_dict(), known))
    result = compare(
        "sukashi:digits_cnn",
        "digits",
        CRITERIA,
        weights=weights,
        seeds=3,
        margin=0.05,  # the digits' 359 test images cannot show less
        out=out / "compare",
        command=command,
    )
    prune("sukashi:digits_cnn", "digits", "drift", 0.5, weights=weights, out=out / "pruned", command=command)
    return result


def train_digits(spec: str, images: Batch, *, width: int | None = None, epochs: int = 20, seed: int = 0) -> Loaded:
    """A digits network of ours (`sukashi:digits_cnn` or `sukashi:digits_vit`), trained on `images` in a few seconds.

    AdamW with a one-cycle schedule, batches of 64, on the CPU; the same seed gives the same weights on one machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load(spec, width=width)
        model: nn.Module = loaded.model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        steps = epochs * -(-len(images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        with progress.task("training", epochs) as shown:
            for _ in range(epochs):
                for rows in torch.randperm(len(images)).split(64):
                    batch = images[rows]
                    loss = batch.objective.loss(model(batch.x), batch.target) / len(batch)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                shown.advance()
    model.eval()
    return loaded
