"""The page of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sukashi.experiments.train.summary import TrainResult
from sukashi.experiments.workspace import Workspace
from sukashi.report import classes, figures, words
from sukashi.report.figures import INK, WIDTH, Drawn
from sukashi.report.page import Page


def page(result: TrainResult, space: Workspace) -> Page:
    told = "trained" if result.accuracy_before is None else "fine-tuned"
    return Page(
        "experiments/train/page.html.j2",
        {"epochs": _draw_epochs(result.history, result.epoch)},
        {
            "result": result,
            "epochs_alt": _alt(result.history, result.epoch),
            "title": f"{result.model}, {told}",
            "warnings": result.warnings,
            "classes": result.classes,
            "networks": result.networks,
            "overall": classes.overall(result.classes, result.networks),
            "fell": classes.FELL,
            "small": classes.too_small(result.classes["rows"]),
            "settings": {
                # The hash by which other pages name the folder is that of what was saved, not of what it began with.
                **{
                    ("weights it began with, SHA-256" if name == "model.weights_sha256" else name): said
                    for name, said in words.flat(space.identity)
                },
                "weights that were saved, SHA-256": space.records()[0].kept["artefacts"].get("model.safetensors", "–"),
            },
            "run": (space.logged("run") or [{}])[-1],
        },
    )


def _alt(history: Sequence[Mapping[str, Any]], chosen: int) -> str:
    """What the figure shows, in words: the first epoch and the one whose weights were kept."""
    kept = next(entry for entry in history if entry["epoch"] == chosen)
    told = [
        f"training loss {history[0]['train_loss']:.3g} in the first epoch, {kept['train_loss']:.3g} in epoch {chosen}"
    ]
    if kept["val_loss"] is not None:
        told.append(f"validation loss {kept['val_loss']:.3g} and accuracy {words.percent(kept['val_accuracy'])} there")
    return f"By epoch, {words.several(len(history), 'epoch')}: {'; '.join(told)}."


def _draw_epochs(history: Sequence[Mapping[str, Any]], chosen: int) -> Drawn:
    """Losses and, below them, accuracy or learning rate by epoch."""
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    losses, right = figure.subplots(2, 1, sharex=True)
    epochs = [entry["epoch"] for entry in history]
    validated = history[0]["val_loss"] is not None
    losses.plot(epochs, [entry["train_loss"] for entry in history], "o-", ms=3, color="#0072B2", label="training")
    if validated:
        losses.plot(epochs, [entry["val_loss"] for entry in history], "s--", ms=3, color="#D55E00", label="validation")
        right.plot(epochs, [entry["val_accuracy"] for entry in history], "o-", ms=3, color="#D55E00", label="accuracy")
        figures.within(right, [entry["val_accuracy"] for entry in history])
        figures.percents(right.yaxis)
    else:
        right.plot(epochs, [entry["lr"] for entry in history], "o-", ms=3, color=INK)
    losses.set(ylabel="cross entropy")
    losses.set_ylim(bottom=0)
    right.set(xlabel="epoch", ylabel="validation accuracy" if validated else "learning rate")
    losses.legend(frameon=False)
    for axes in (losses, right):
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.axvline(chosen, color=INK, linewidth=0.9, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figures.calm(axes)
    return figures.drawn(figure)
