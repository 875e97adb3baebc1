"""How often do the intervals that are printed hold the truth, and how often is something claimed that is not so?

    python benchmarks/coverage.py [--studies 2000]

Studies are drawn from a known truth and go through the functions that tables and pages use. An interval of 95 % should
hold the truth in 95 %; what is said to be shown should be false in 2.5 % at most, a difference of nothing found in 5 %.
A standard error is half a point at 2,000 studies. Prints the table of docs/statistics.md; the last line is one JSON
object with the lowest coverage, and the highest share of false claims, of each function.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import norm
from sklearn.metrics import average_precision_score

from sukashi.core import stats
from sukashi.core.types import Curve
from sukashi.experiments.audit.concepts.summary import likeness
from sukashi.experiments.schedule.summary import Outcome, of_outcomes
from sukashi.measures import classwise, curves, precision

Row = tuple[str, str, str, float]  # function, what was drawn, "covers" or "false", share of the studies


def held(found: stats.Interval, truth: float) -> bool:
    return bool(found.low <= truth <= found.high)


def over_seeds(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Seeds that end at one of two values: few of them may have met but one."""
    for seeds in (2, 3, 5):
        drawn = (
            rng.normal(0, 0.1, (seeds, 1)) + (rng.random((seeds, 1)) < 0.3) - 0.3 + rng.normal(0, 0.5, (1, 225))
            for _ in range(n)
        )
        covered = np.mean([held(stats.crossed(of), 0.0) for of in drawn])
        yield "crossed", f"{seeds} seeds, 225 images, 70 % near one value, 30 % near another", "covers", covered


def answers(rng: np.random.Generator, seeds: int, images: int, right: float, of_seeds: float) -> np.ndarray:
    """(seeds, images) right answers: images differ in how hard they are, seeds by `of_seeds` in how good they are."""
    hard = rng.normal(0, 1, images)
    skill = rng.normal(0, of_seeds, seeds)[:, None]
    threshold = np.sqrt(2 + of_seeds**2) * norm.ppf(right)
    return (threshold + skill - hard + rng.normal(0, 1, (seeds, images)) > 0).astype(float)


def over_seeds_and_images(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """SAUCE, accuracy at a fraction, levels of a schedule, differences."""
    for seeds in (1, 2, 3, 5):
        for images, right, of_seeds in ((225, 0.9, 0.1), (2000, 0.9, 0.1), (500, 0.5, 0.3)):
            if seeds == 1 and of_seeds > 0.1:
                continue
            spread = 0.0 if seeds == 1 else of_seeds
            told = f"{seeds} seed{'s' * (seeds > 1)}, {images} images, {right:.0%} right"
            for bounds in (None, (0.0, 1.0)):
                drawn = (answers(rng, seeds, images, right, spread) for _ in range(n))
                covered = np.mean([held(stats.crossed(of, bounds=bounds), right) for of in drawn])
                name = "crossed" if bounds is None else "crossed, within bounds"
                yield name, told + (", new images alone" if seeds == 1 else ""), "covers", covered
    for seeds in (1, 3):
        for images in (20, 225):
            drawn = (answers(rng, seeds, images, 0.99, 0.0) for _ in range(n))
            covered = np.mean([held(stats.crossed(of, bounds=(0, 1)), 0.99) for of in drawn])
            told = f"{seeds} seed{'s' * (seeds > 1)}, {images} images, 99% right"
            yield "crossed, within bounds", told, "covers", covered
    for seeds in (2, 3, 5):
        found = [
            stats.crossed_test(answers(rng, seeds, 500, 0.8, 0.2) - answers(rng, seeds, 500, 0.8, 0.2)) < 0.05
            for _ in range(n)
        ]
        yield "crossed_test", f"{seeds} seeds, 500 images, no difference", "false", np.mean(found)


def a_curve(rng: np.random.Generator, losses: np.ndarray, images: int, right: float = 0.95) -> Curve:
    """Cuts 5 % apart, each of which loses so much more than the dense network, and wins a tenth of it back."""
    dense = rng.random(images) < right
    fall, luck = rng.random(images), rng.random(images)
    gained = 0.1 * losses / (1 - right)
    rows = [np.where(dense, fall >= 1.1 * loss / right, luck < more) for loss, more in zip(losses, gained, strict=True)]
    place = np.arange(len(losses))
    correct = np.stack(rows)
    return Curve(
        ratio=0.05 * place,
        n_removed=place,
        fraction=0.05 * place,
        flops=place[::-1],
        answer=correct.astype(int),
        correct=correct,
        target=np.ones(images, dtype=int),
        image_ids=tuple(map(str, range(images))),
    )


def areas(rng: np.random.Generator, n: int) -> Iterator[Row]:
    losses = np.array([0.0, 0.01, 0.05, 0.2, 0.5])
    for images in (225, 2000):
        for relative in (False, True):
            accuracy = 0.95 - losses
            truth = curves.sauce(0.05 * np.arange(5), accuracy, 0.1, relative=relative)
            found = [curves.areas(a_curve(rng, losses, images), 0.1, relative=relative) for _ in range(n)]
            bounds = None if relative else (0, 100)
            covered = np.mean([held(stats.crossed([of], bounds=bounds), truth) for of in found])
            yield "areas", f"{'relative ' * relative}SAUCE, 1 seed, {images} images", "covers", covered


def lossless(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """The cut named is beyond the largest that loses no more than the margin."""
    for images, margin in ((225, 0.05), (500, 0.01), (500, 0.05), (2000, 0.05)):
        losses = margin * np.arange(12) / 5.5  # the sixth cut is the first that loses more
        beyond = [curves.lossless([a_curve(rng, losses, images)], margin) > 0.251 for _ in range(n)]
        yield "lossless", f"{images} images, margin {margin:.0%}, cuts that lose ever more", "false", np.mean(beyond)


def levels(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """A schedule names a level, of nine that all lose exactly two points."""
    figures = {"removed": 0.0, "parameters": 10, "zeros_in_masked_layers": 0.0}
    ratios = [round(0.1 * i, 1) for i in range(1, 10)]
    for seeds, images, contenders in ((1, 250, 1), (1, 500, 1), (3, 500, 1), (1, 500, 4)):
        identity = {"schedule": "", "scope": None, "round_to": 1, "ratios": ratios, "seeds": seeds}
        named = 0
        for _ in range(n // 10):
            found = []
            for seed in range(seeds):
                dense = rng.random(images) < 0.95
                found.append(Outcome("dense", seed, 0.0, dense, figures))
                for place in range(contenders):
                    for ratio in ratios:
                        lost = rng.random(images) < 0.02 / 0.95
                        found.append(Outcome(f"criterion {place}", seed, ratio, dense & ~lost, figures))
            named += any(row["shown"] for row in of_outcomes(found, identity)["levels"])
        told = (
            f"{seeds} seed{'s' * (seeds > 1)}, {images} images, {contenders} criteri{'a' if contenders > 1 else 'on'}"
        )
        yield "levels", told, "false", named / (n // 10)


def not_lower(rng: np.random.Generator, n: int) -> Iterator[Row]:
    for images, gained, margin in ((189, 0.0, 0.02), (250, 0.01, 0.02), (500, 0.02, 0.05), (2000, 0.01, 0.01)):
        lost = gained + margin
        counts = rng.multinomial(images, [gained, lost, 1 - gained - lost], size=10 * n)
        found = stats.not_lower(counts[:, 0], counts[:, 1], images, margin)
        yield (
            "not_lower",
            f"{images} images, margin {margin:.0%}, {gained:.0%} gained, {lost:.0%} lost",
            "false",
            found.mean(),
        )


def changes_of_accuracy(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Cut networks, of a seed each, beside one dense network on the same images."""
    for images, gained, lost in ((50, 0.0, 0.02), (225, 0.0, 0.0), (225, 0.01, 0.03), (2000, 0.02, 0.07)):
        counts = rng.multinomial(images, [gained, lost, 1 - gained - lost], size=n)
        drawn = (np.repeat((1, -1, 0), row) for row in counts)
        covered = np.mean([held(stats.paired(of[None]), gained - lost) for of in drawn])
        yield "paired", f"1 seed, {images} images, {gained:.0%} gained, {lost:.0%} lost", "covers", covered
    for seeds, images, of_seeds in ((2, 225, 0.1), (3, 225, 0.1), (3, 2000, 0.3), (5, 500, 0.3)):
        covered = []
        for _ in range(n):
            hard = rng.normal(0, 1, images)
            dense = np.sqrt(2) * norm.ppf(0.9) - hard + rng.normal(0, 1, images) > 0
            skill = rng.normal(0, of_seeds, (seeds, 1))
            cut = np.sqrt(2 + of_seeds**2) * norm.ppf(0.85) + skill - hard + rng.normal(0, 1, (seeds, images)) > 0
            covered.append(held(stats.paired(cut.astype(int) - dense), -0.05))
        yield "paired", f"{seeds} seeds, {images} images, from 90% to 85% right", "covers", np.mean(covered)


def shares(rng: np.random.Generator, n: int) -> Iterator[Row]:
    for images in (20, 225, 2000):
        for right in (0.5, 0.9, 0.99):
            covered = [held(stats.share(int(k), images), right) for k in rng.binomial(images, right, n)]
            yield "share", f"{images} images, {right:.0%} right", "covers", np.mean(covered)


def by_class(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Balanced accuracy and areas under the ROC curve of three classes of unequal size, and classes that are said to
    have fallen where none did."""
    sizes, right = (25, 100, 100), (0.8, 0.9, 0.95)
    target = np.repeat(np.arange(3), sizes)
    found: dict[str, list[bool]] = {"balanced_accuracy": [], "auc": [], "changes": []}
    for _ in range(n):
        correct = rng.random(len(target)) < np.repeat(right, sizes)
        found["balanced_accuracy"].append(held(classwise.balanced_accuracy(correct, target, 3), float(np.mean(right))))
        for shift, truth in ((1.0, norm.cdf(1 / np.sqrt(2))), (3.0, norm.cdf(3 / np.sqrt(2)))):
            scores = rng.normal(0, 1, (len(target), 3)) + shift * (target[:, None] == 0)
            (area, *_) = classwise.auc(scores, target, 3)
            found["auc"].append(area is not None and held(area, float(truth)))
        both = [answers(rng, 1, len(target), 0.8, 0.0) for _ in range(2)]
        found["changes"].append(any(change.fell for change in classwise.changes(*both, target, 3)))
    yield "balanced_accuracy", "25, 100, 100 images; 80, 90, 95% right", "covers", np.mean(found["balanced_accuracy"])
    yield "auc", "25 images against 200; areas of .76 and .98", "covers", np.mean(found["auc"])
    yield "changes", "three classes, none fell", "false", np.mean(found["changes"])


def precisions(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Average precision of scores of images that have something, a shift above those of others."""
    for own, others in ((10, 90), (25, 200), (250, 250)):
        has = np.arange(own + others) < own
        many = np.repeat(has, 400)
        for shift in (0.0, 1.0, 3.0):
            truth = average_precision_score(many, rng.normal(0, 1, len(many)) + shift * many)
            drawn = (rng.normal(0, 1, len(has)) + shift * has for _ in range(n))
            covered = np.mean([held(precision.average_precision(score, has), truth) for score in drawn])
            yield "average_precision", f"{own} images of {own + others}; precision {truth:.2f}", "covers", covered


def bootstraps(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Differences of an audit, image by image."""
    draws: dict[str, tuple[Callable[[int], np.ndarray], float]] = {
        "normal": (lambda size: rng.normal(0, 1, size), 0.0),
        "lognormal": (lambda size: rng.lognormal(0, 1, size), float(np.exp(0.5))),
        "0 in 96 of 100": (lambda size: (rng.random(size) < 0.04).astype(float), 0.04),
    }
    for name, (draw, truth) in draws.items():
        for images in (20, 50, 500):
            covered = [
                held(stats.bootstrap(draw(images), generator=rng, n_resamples=1000), truth) for _ in range(n // 4)
            ]
            yield "bootstrap", f"{images} images, {name}", "covers", np.mean(covered)


def times(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """Two networks timed in turns on a machine that slows down for both, and for one of them now and then."""
    for turns in (6, 20):
        for name, spikes in (("noise of 5 %", 0.0), ("and every tenth pass three times as long", 0.1)):
            covered = []
            for _ in range(n):
                both = np.linspace(1, 2, turns)
                first, second = (
                    both * rng.lognormal(0, 0.05, turns) * np.where(rng.random(turns) < spikes, 3, 1) for _ in range(2)
                )
                covered.append(held(stats.ratio(first, 0.8 * second), 0.8))
            yield "ratio", f"{turns} turns, {name}", "covers", np.mean(covered)


def likenesses(rng: np.random.Generator, n: int) -> Iterator[Row]:
    """How alike paired concepts are in crops, of which those of one image are alike."""

    def crops(images: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image = np.repeat(np.arange(images), 9)
        one = np.exp(rng.normal(0, 1, (images, 4))[image] + rng.normal(0, 0.7, (len(image), 4)))
        both = rng.normal(0, noise, (images, 4))[image] + rng.normal(0, noise, (len(image), 4))
        return one, one * np.exp(both), image

    for noise in (0.3, 1.0):
        *both, image = crops(40_000, noise)
        truth = likeness([(both[0], both[1])], image, 0, n_resamples=2)["mean"]
        for images in (20, 50, 200):
            covered = []
            for number in range(n // 8):
                *both, image = crops(images, noise)
                found = likeness([(both[0], both[1])], image, number)
                covered.append(found["low"] <= truth <= found["high"])
            told = f"{images} images of 9 crops, 4 concepts; rank correlation {truth:.2f}"
            yield "likeness", told, "covers", np.mean(covered)


STUDIES = (
    over_seeds,
    over_seeds_and_images,
    areas,
    lossless,
    levels,
    not_lower,
    changes_of_accuracy,
    shares,
    by_class,
    bootstraps,
    times,
    precisions,
    likenesses,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| function | drawn | holds the truth | claims what is not so |\n|---|---|---|---|")
    worst: dict[str, float] = {}
    for study in STUDIES:
        for name, drawn, what, share in study(rng, given.studies):
            told = [f"{100 * share:.1f} %", ""] if what == "covers" else ["", f"{100 * share:.1f} %"]
            print("|", " | ".join([f"`{name}`", drawn, *told]), "|", flush=True)
            key = f"{name}_{what}"
            worst[key] = min(worst.get(key, 1.0), share) if what == "covers" else max(worst.get(key, 0.0), share)
    print(json.dumps({name: round(float(share), 4) for name, share in worst.items()}))


if __name__ == "__main__":
    main()
