"""Which training images calibrate: drawn at random, or chosen by what the dense model makes of them.

The three of Sankarapu et al. 2025 (Interpretability-Aware Pruning, sec. 3.2), which takes ten images of each class:

    random      by seed, from the ids alone
    confidence  those of each class that the model is surest of
    clustering  k-means in feature space, class by class; the image nearest to each centre
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import DataError, ModelError, UsageError, nearest
from sukashi.core.precision import exact
from sukashi.core.types import pass_size
from sukashi.data import Split
from sukashi.models import Loaded
from sukashi.network import hooks
from sukashi.network.layers import MAKERS

SAMPLINGS = ("random", "confidence", "clustering")


@dataclass(frozen=True)
class View:
    """What a model makes of the images of a split: `features` (N, D), `confidence` (N,), `correct` (N,) bool.

    Features are what the last layer with weights reads, averaged over positions; confidence is the objective's
    score: the probability of the image's own class, in float64.
    """

    features: Tensor
    confidence: Tensor
    correct: Tensor


@exact()
def view(loaded: Loaded, split: Split, workers: int = 0) -> View:
    """The model's view of a split, from one pass over it.

    Raises ModelError for a model without a layer whose input could be features.
    """
    model = loaded.model
    device = next(model.parameters()).device
    two = split.subset(range(min(2, len(split)))).whole(loaded.preprocess)
    layers = [name for name in hooks.calls(model, two.x.to(device)) if isinstance(model.get_submodule(name), MAKERS)]
    if not layers:
        raise ModelError("the model calls no linear layer or convolution, so it has no features to cluster: use random")
    axis = -1 if isinstance(model.get_submodule(layers[-1]), nn.Linear) else 1
    features, confidence, correct = [], [], []
    batches = split.batches(loaded.preprocess, pass_size(two.x), workers)
    with progress.task("sampling", len(batches)) as shown, hooks.read_by(model, layers[-1]) as read:
        for batch in batches:
            logits = model(batch.x.to(device)).double().cpu()
            by_channel = read[0].movedim(axis, 1).cpu()
            features.append(by_channel.flatten(2).mean(2) if by_channel.dim() > 2 else by_channel.clone())
            confidence.append(batch.objective.score(logits, batch.target))
            correct.append(batch.objective.outcome(logits, batch.target) > 0.5)
            shown.advance()
    return View(torch.cat(features), torch.cat(confidence), torch.cat(correct))


def by_confidence(split: Split, seen: View, n_per_class: int) -> Split:
    """The `n_per_class` images of each class of which the model is surest; the same for every seed.

    Raises DataError where the model gets no image of a class right: the surest of wrong answers is no example.
    """
    right = split.objective.counts(split.targets[seen.correct], len(split.class_names))
    if (right == 0).any():
        name = split.class_names[int((right == 0).nonzero()[0])]
        raise DataError(
            f"class {name!r} has no image in {split.name} that the model classifies correctly, so confidence cannot "
            "choose any: use `sampling='random'`, or a model that has learned the class"
        )
    return split.highest(seen.confidence, n_per_class)


def check_sampling(sampling: str) -> None:
    """Refuse a sampling that there is not."""
    if sampling not in SAMPLINGS:
        raise UsageError(f"unknown sampling {sampling!r}{nearest(sampling, SAMPLINGS)}")
