"""What a training gave, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.core.stats import share
from sukashi.experiments.columns import shared
from sukashi.experiments.workspace import Workspace
from sukashi.report import classes, words


class TrainResult(Result):
    """A trained network.

    accuracy           of the test images, measured once, at the end; `accuracy_before` that of the network that was
                       fine-tuned, on the same images
    epochs, epoch      how many were done, and whose weights these are; `validation` is {"loss", "accuracy"} there, on
                       `n_validation` images
    weights_removed, zeros_in_masked_layers   shares of the weights a mask speaks of that it removes, and that are zero
                       in the end; None without a mask
    classes            what it makes of each class: sensitivity, specificity, AUC, balanced accuracy, calibration,
                       confusion; and what was `before`, beside it, see `report.classes.by_class`
    history            of each epoch: train_loss, val_loss, val_accuracy, lr
    images_per_second, waiting (the share of the time spent on getting images ready), resumed (the step this call went
                       on from)   what a clock and a call decide
    """

    kind: ClassVar[str] = "train"
    of_call: ClassVar[tuple[str, ...]] = (*Result.of_call, "images_per_second", "waiting", "resumed")
    columns: ClassVar[Columns] = {
        **shared("model", "weights_sha256", "data", "seed"),
        "epoch": (int, "counted from 1"),
        "train_loss": (float, "mean over the training images of the epoch, while it trained"),
        "val_loss": (float, "of the validation images after it; none where nothing was held out"),
        "val_accuracy": (float, "the share of the validation images that are right after it"),
        "lr": (float, "learning rate at its end"),
        "saved": (bool, "whether the saved weights are those of this epoch"),
    }

    model: str
    weights_sha256: str
    data: str
    seed: int
    accuracy: float
    accuracy_before: float | None
    n_images: int
    epochs: int
    epoch: int
    validation: dict[str, float | None]
    weights_removed: float | None
    zeros_in_masked_layers: float | None
    class_names: list[str]
    classes: dict[str, Any]
    history: list[dict[str, Any]]
    verdict: str
    rule: str
    n_validation: int | None = None
    images_per_second: float | None = None
    waiting: float | None = None
    resumed: int | None = None

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        before = "" if self.accuracy_before is None else f" (before: {words.percent(self.accuracy_before)})"
        on = words.several(self.n_images, "test image")
        rows = [["test accuracy", f"{words.percent(self.accuracy)}{before} on {on}"]]
        if self.validation["accuracy"] is not None:
            on = "" if self.n_validation is None else f" on {words.several(self.n_validation, 'image')}"
            rows.append(["validation accuracy", f"{words.percent(self.validation['accuracy'])}{on}"])
        rows.append(["epochs", f"{self.epochs}, weights of epoch {self.epoch}"])
        if self.images_per_second is not None:
            rows.append(["images a second", f"{self.images_per_second:,.0f}"])
            rows.append(["waiting for images", f"{self.waiting:.1%}"])
        if self.zeros_in_masked_layers is not None:
            rows.append(["zeros", f"{self.zeros_in_masked_layers:.1%} of the masked layers' weights"])
        return rows[0], rows[1:]

    def text(self) -> str:
        said = [words.table(*self.overview()), "", classes.text(self.classes, self.networks), *self.remarks()]
        if self.resumed:
            said += ["", f"Went on from step {self.resumed}"]
        said += ["", self.rule]
        return "\n".join([*said, "", f"Saved: {self.out}", *words.where(self)])

    @property
    def networks(self) -> tuple[str, ...]:
        """What stands side by side class by class."""
        return _networks(self.accuracy_before)

    def table(self) -> list[dict[str, Any]]:
        """A row for each epoch."""
        about = {"model": self.model, "weights_sha256": self.weights_sha256, "data": self.data, "seed": self.seed}
        rows = [{**about, **entry, "saved": entry["epoch"] == self.epoch} for entry in self.history]
        return [{column: row[column] for column in self.columns} for row in rows]


def summary(space: Workspace) -> TrainResult:
    """Raises UsageError where the network is not there."""
    records = space.records()
    if not records:
        raise UsageError(f"{space.folder} holds no finished network: give the same command again to go on training")
    found, key, about = records[0].result, records[0].key, records[0].about
    reached = share(round(found["accuracy"] * found["n_images"]), found["n_images"])
    before = found["accuracy_before"]
    by_class = classes.by_class(records[0].arrays("answers"), found["class_names"], _networks(before))
    verdict = f"{words.percent(found['accuracy'])} of {found['n_images']:,} test images are right"
    if before is not None:
        verdict += f", {words.percent(before)} before ({100 * (found['accuracy'] - before):+z.1f})"
    timed = [logged["epochs"] for logged in space.logged("speed") if logged["trial"] == key]
    speed: dict[str, Any] = _speed(timed[-1]) if timed else {}
    epochs = words.several(found["epochs"], "epoch")
    return TrainResult(
        model=about["model"]["spec"],
        weights_sha256=about["model"]["weights_sha256"],
        data=about["data"]["spec"],
        seed=about["seed"],
        classes=by_class,
        verdict=f"{verdict}.",
        rule=f"Weights of epoch {found['epoch']} of {epochs}. 95% intervals for new images: accuracy "
        f"{words.percent(reached.low)} to {words.percent(reached.high)}{_changed(by_class)}; the test images chose "
        "nothing.",
        **found,
        **speed,
    )


def _changed(by_class: Mapping[str, Any]) -> str:
    """The interval of what training on changed, where it did."""
    of = by_class["accuracy_change"]
    if of is None:
        return ""
    low, high = (words.number(100 * of[name], sign=True) for name in ("low", "high"))
    return f", its change {low} to {high} points"


def _networks(before: float | None) -> tuple[str, ...]:
    return ("trained",) if before is None else ("before", "trained")


def _speed(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(1 / entry["images_per_second"] for entry in epochs)
    waiting = sum(entry["waiting"] / entry["images_per_second"] for entry in epochs)
    return {"images_per_second": len(epochs) / seconds, "waiting": waiting / seconds}
