"""Circuits: the smallest part of a network that still tells one class from the others, as a mask of its nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError
from sukashi.core.precision import without_tf32
from sukashi.core.types import Batch, Site
from sukashi.data.augment import derived
from sukashi.decompositions.nodes import Nodes
from sukashi.network import hooks

_START, _NOISE = 0.5, 0.01  # of the logits of masks
_FALL = 0.2  # of the rate, after each third of the epochs


class _Step(torch.autograd.Function):
    """1 above 0, else 0; its slope is taken for that of the sigmoid (eq. 13, 15 with tau = 1)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        on: Tensor = (logits > 0).to(logits)
        return on

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        share: Tensor = logits.sigmoid()
        slope: Tensor = gradients[0] * share * (1 - share)
        return slope


def balanced(target: Tensor, k: int, n: int, *seed: int) -> Tensor:
    """(2 n,) which images a binary task has: n of class k, then n of all others, drawn without replacement.

    Raises DataError for a class of fewer images, or with fewer others.
    """
    own, others = (target == k).nonzero()[:, 0].cpu(), (target != k).nonzero()[:, 0].cpu()
    if min(len(own), len(others)) < n:
        raise DataError(
            f"class {k} has {len(own)} images and {len(others)} others, a circuit needs {n} of each: give more images"
        )
    generator = torch.Generator().manual_seed(derived(*seed, k))
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:n]] for of in (own, others)])


def find_circuits(
    model: nn.Module,
    nodes: Nodes,
    data: Batch,
    classes: Sequence[int],
    means: Mapping[Site, Tensor],
    *,
    penalty: float,
    epochs: int = 20,
    lr: float = 0.03,
    batch_size: int = 16,
    seed: int = 0,
    rows: int = 512,
) -> Tensor:
    """(K, N) bool for each of K classes which of N nodes are its circuit (Zhang 2026, sec. 3.4; Gao et al. 2025).

        minimise  cross entropy of class or other + penalty |active nodes|   over logits in [-1, 1]
        node = logit > 0, its slope that of the sigmoid;  off, an activation a is its mean: m a + (1 - m) mean

    The binary logit of a class is log p / (1 - p) of its probability p (`binary`). An epoch goes through the images of
    a class, of which `data` has as many for each, and as many others, drawn anew; AdamW's rate is a fifth after each
    third of the epochs. (Zhang's rate is .01, for many more steps; in few no logit would cross 0.) All classes are
    found in one batch, in which every row has the masks of its own class: `batch_size` images a class and step, at most
    `rows` in one pass. Which classes are found together changes none but in rounding. `means` are those of
    `hooks.means`.

    Raises DataError for a class without images, UsageError for a penalty below 0.
    """
    if not (penalty >= 0 and math.isfinite(penalty)):
        raise UsageError(f"penalty must be 0 or more, got {penalty}: it is what a node costs")
    n, size = max(1, int((data.target == classes[0]).sum())), max(1, batch_size // 2)
    noise = [torch.randn(nodes.n_nodes, generator=torch.Generator().manual_seed(derived(seed, k))) for k in classes]
    logits = (_START + _NOISE * torch.stack(noise)).to(data.x.device).requires_grad_()
    optimiser = torch.optim.AdamW([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, -(-epochs // 3)), _FALL)
    with without_tf32(), progress.task("circuits", epochs) as shown:
        for epoch in range(epochs):
            task = torch.stack([balanced(data.target, k, n, seed, 1 + epoch) for k in classes]).view(len(classes), 2, n)
            for part in task.split(size, dim=2):
                loss, slope = _slope(model, nodes, data, classes, means, logits, part.flatten(1), rows)
                (cost,) = torch.autograd.grad(penalty * _Step.apply(logits).sum(), logits)
                logits.grad = slope + cost
                optimiser.step()
                with torch.no_grad():
                    logits.clamp_(-1, 1)
            schedule.step()
            shown.advance(note=f"loss {loss:.3f}, {float((logits > 0).float().mean()):.1%} of the nodes")
    return logits.detach() > 0


def _slope(
    model: nn.Module,
    nodes: Nodes,
    data: Batch,
    classes: Sequence[int],
    means: Mapping[Site, Tensor],
    logits: Tensor,
    images: Tensor,
    rows: int,
) -> tuple[float, Tensor]:
    """The mean cross entropy of each class on its images (K, B), mean over classes, and the slope of its sum over them
    by the logits (K, N)."""
    whose = torch.arange(len(classes)).repeat_interleave(images.shape[1])
    total, slope = 0.0, torch.zeros_like(logits)
    for at, of in zip(images.flatten().split(rows), whose.split(rows), strict=True):
        part, own = data[at], of.to(data.x.device)
        with torch.enable_grad():
            gates = gated(nodes, _Step.apply(logits), own)
            with hooks.ablated(model, gates, means):
                found = binary(part, model(part.x.clone()), torch.tensor(classes, device=own.device)[own])
            loss = F.binary_cross_entropy_with_logits(*found, reduction="sum") / images.shape[1]
        slope += torch.autograd.grad(loss, logits)[0]
        total += float(loss.detach()) / len(classes)
    return total, slope


def gated(nodes: Nodes, masks: Tensor, whose: Tensor) -> dict[Site, Tensor]:
    """{place: (B, U)} the gates of each image, those of masks (K, N) by the number of its own in `whose` (B,)."""
    parts = masks[whose].split([place.n_units for place in nodes.places], dim=1)
    return dict(zip(nodes.places, parts, strict=True))


def binary(data: Batch, output: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the logit of each image being of class k (B,), log p / (1 - p) = F_k - log sum exp of the others, and 1
    where it is."""
    answers, place = data.objective.answers(output), data.objective.place(k)[:, None]
    own = answers.gather(1, place)[:, 0]
    others = answers.scatter(1, place, -torch.inf).logsumexp(1)
    return own - others, (data.target == k).to(own)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    nodes: Nodes,
    data: Batch,
    classes: Sequence[int],
    masks: Tensor | None,
    means: Mapping[Site, Tensor],
    *,
    seed: int = 0,
) -> Tensor:
    """(K, 2 n) bool whether each image of a class's balanced task is told right by the nodes of masks (K, N), or by the
    whole network where None; the n images of the class first.

    A tie, as of a network of which everything is off, counts as other.
    """
    n = max(1, min(int((data.target == k).sum()) for k in classes))
    images = torch.stack([balanced(data.target, k, n, seed) for k in classes])
    whose = torch.arange(len(classes)).repeat_interleave(2 * n)
    found = []
    size = next(data.in_passes()).x.shape[0]
    with without_tf32():
        for at, of in zip(images.flatten().split(size), whose.split(size), strict=True):
            part, own = data[at], of.to(data.x.device)
            gates = {} if masks is None else gated(nodes, masks.to(part.x), own)
            with hooks.ablated(model, gates, means):
                logit, has = binary(part, model(part.x.clone()), torch.tensor(classes, device=own.device)[own])
            found.append((logit > 0) == has.bool())
    return torch.cat(found).view(len(classes), -1).cpu()


def random_masks(nodes: Nodes, masks: Tensor, generator: torch.Generator) -> Tensor:
    """(K, N) bool as many nodes of each place as masks (K, N) have, drawn."""
    found = []
    for part in masks.cpu().split([place.n_units for place in nodes.places], dim=1):
        order = torch.rand(part.shape, generator=generator).argsort(1).argsort(1)
        found.append(order < part.sum(1, keepdim=True))
    return torch.cat(found, 1)


def edges(model: nn.Module, nodes: Nodes, masks: Tensor, *, ends: str = "both") -> Tensor:
    """(K,) which share of the weights between nodes a circuit (K, N) has: those that are not zero and whose input and
    output are both active (`both`), or whose output is (`out`), of all, zero or not.

    `out` comes near what Zhang 2026 prints, whose text says neither. Weights of layers without a node on one side, as
    the first that reads pixels, count by the other; those of layers without nodes do not count.
    """
    # A last node that is always active stands for what is no node.
    active = torch.cat([masks.cpu().double(), torch.ones(len(masks), 1, dtype=torch.float64)], 1)
    kept, total = torch.zeros(len(masks), dtype=torch.float64), 0
    for layer in nodes.layers:
        module = model.get_submodule(layer.name)
        weight = module.get_parameter("weight").detach().cpu()
        groups = int(getattr(module, "groups", 1))
        nonzero = (weight != 0).flatten(2).sum(2) if weight.dim() > 2 else (weight != 0).long()
        nonzero = nonzero.double().unflatten(0, (groups, -1))  # (G, outputs, inputs)
        writes = active[:, torch.tensor(layer.writes)].unflatten(1, (groups, -1))
        reads = active[:, torch.tensor(layer.reads)].unflatten(1, (groups, -1))
        reads = reads if ends == "both" else torch.ones_like(reads)
        kept += torch.einsum("goi,kgo,kgi->k", nonzero, writes, reads)
        total += weight.numel()
    return kept / total
