"""The page of a trained folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sukashi.core.stats import share
from sukashi.report import figures, words
from sukashi.report.figures import INK


def trained(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    about, run = recipe["figures"], recipe["provenance"]
    reached = share(round(about["accuracy"] * about["n_images"]), about["n_images"])
    before = about.get("accuracy_before")
    verdict = f"{words.percent(about['accuracy'])} of {about['n_images']:,} test images are right"
    if before is not None:
        verdict += f", {words.percent(before)} before ({100 * (about['accuracy'] - before):+.1f})"
    epochs = f"{about['epochs']} epoch{'s' if about['epochs'] > 1 else ''}"
    shown_above = ("command", "versions", "history", "notes", "class_accuracy", "class_counts")
    shown = {
        "title": f"{recipe['model']['spec']}, {'trained' if before is None else 'fine-tuned'}",
        "verdict": f"{verdict}.",
        "rule": f"Weights of epoch {about['epoch']} of {epochs}. The 95% interval of the accuracy is "
        f"{words.percent(reached.low)} to {words.percent(reached.high)} (Wilson's); the test images chose nothing.",
        "warnings": about["notes"],
        "history": about["history"],
        "epoch": about["epoch"],
        "classes": list(zip(recipe["class_names"] or (), about["class_counts"], about["class_accuracy"], strict=False)),
        "settings": dict(words.flat({key: value for key, value in {**run, **about}.items() if key not in shown_above})),
        "run": run,
    }
    return shown, {"epochs": _draw_epochs(about["history"], about["epoch"])}


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
