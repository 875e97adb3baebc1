"""The page of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sukashi.experiments.train.summary import TrainResult
from sukashi.experiments.workspace import Workspace
from sukashi.report import figures, words
from sukashi.report.figures import INK
from sukashi.report.page import Page


def page(result: TrainResult, space: Workspace) -> Page:
    told = "trained" if result.accuracy_before is None else "fine-tuned"
    return Page(
        "experiments/train/page.html.j2",
        {"epochs": _draw_epochs(result.history, result.epoch)},
        {
            "result": result,
            "title": f"{result.model}, {told}",
            "warnings": result.warnings,
            "classes": list(zip(result.class_names, result.class_counts, result.class_accuracy, strict=True)),
            "settings": dict(words.flat(space.identity)),
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _draw_epochs(history: Sequence[Mapping[str, Any]], chosen: int) -> bytes:
    """Losses and, beside them, accuracy and learning rate by epoch."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    losses, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    validated = history[0]["val_loss"] is not None
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", ms=3, color="#0072B2", label="training")
    if validated:
        losses.plot(epochs, [entry["val_loss"] for entry in history], "o-", ms=3, color="#D55E00", label="validation")
        right.plot(epochs, [entry["val_accuracy"] for entry in history], "o-", ms=3, color="#D55E00", label="accuracy")
        right.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        right.plot(epochs, [entry["lr"] for entry in history], "o-", ms=3, color=INK)
    losses.set(xlabel="epoch", ylabel="cross entropy")
    right.set(xlabel="epoch", ylabel="accuracy on validation images" if validated else "learning rate")
    losses.legend(frameon=False)
    for axes in (losses, right):
        axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.calm(axes)
    return figures.png(figure)
