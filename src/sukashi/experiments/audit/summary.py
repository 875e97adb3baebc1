"""What an audit found, from its artefacts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Columns, Result
from sukashi.experiments.audit.networks import Answers, unpacked
from sukashi.experiments.audit.run import subject
from sukashi.experiments.columns import as_json, shared
from sukashi.experiments.workspace import Workspace
from sukashi.report import words

CLASSES = 12  # of which each is counted in words
NAMED = 5  # classes at most that a warning names
TOLD = ("warnings", "notes", "split_of_class")  # facts beside those of subjects


class AuditResult(Result):
    """Networks beside the first of them.

    models     of each: label, series, ratio and repair (what pruned it, how far, and what mended it, where its recipe
               says so), accuracy, guesses (not shown to get more images right than guessing would), few (too few images
               to say anything), n_images, images_of_class (how many of each class it is audited on), right_of_class
               (the share of the test images of each class that it gets right)
    tested_of_class, split_of_class   how many test images of each class are looked at, and how many the split has
    audited    the same in words
    options    of each attribution and measure, those that were given
    saliency   what its maps are like, see `audit.saliency.summary`; and so for each subject that was looked at

    `verdict` and `lines` are the sentences the page begins with.
    """

    kind: ClassVar[str] = "audit"
    columns: ClassVar[Columns] = {
        "subject": (str, "what was looked at"),
        **shared("data"),
        "reference_model": (str, "the network that others are held against"),
        "model": (str, "the network beside it"),
        "attribution": (str, "what made the maps; empty where a measure reads none"),
        "attribution_options": (str, "its options, those that were given, as JSON"),
        "measure": (str, "what was measured of each image"),
        "measure_options": (str, "its options, those that were given, as JSON"),
        "better": (str, "whether higher or lower is better; none where neither is"),
        "n": (int, "images on which both networks have a value"),
        "reference": (
            float,
            "mean over these images of the reference's value; of a likeness that to itself, rounded or by others",
        ),
        "mean": (float, "mean over these images of the model's value; of a likeness that to the reference's maps"),
        "difference": (float, "mean of the model's value less the reference's on the same image; none of a likeness"),
        "low": (float, "its 95 % interval, of a likeness that of its mean, a bootstrap over images: from"),
        "high": (float, "to"),
        "p": (float, "of the paired t test; none of a likeness, which is not tested"),
        "p_holm": (float, "the same after Holm's correction: over what sentences may speak of, the rest by itself"),
        "changed": (bool, "whether it is shown to have changed"),
        "size": (float, "the difference in standard deviations of the reference's values; none where these are equal"),
        "weight": (str, "the size in a word"),
        "said": (str, "what was found, in words"),
    }

    reference: str
    data: str
    options: dict[str, dict[str, Any]]
    n_images: int
    tested_of_class: dict[str, int]
    split_of_class: dict[str, int]
    models: list[dict[str, Any]]
    verdict: str
    lines: list[str]
    audited: list[str]

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def subjects(self) -> dict[str, dict[str, Any]]:
        """What was looked at, by name."""
        return dict(self.model_extra or {})

    def text(self) -> str:
        parts = [subject(name, "summary").text(found, self.reference) for name, found in self.subjects.items()]
        said = [*parts, "", self.verdict, *self.lines, *self.audited, *self.remarks()]
        return "\n".join([*said, *words.where(self)])

    def table(self) -> list[dict[str, Any]]:
        """A row for each comparison of a model with the reference, likenesses of maps last."""
        rows = []
        for name, found in self.subjects.items():
            for row in subject(name, "summary").rows(found):
                measure = row["measure"].partition("/")[0]  # of one concept, or one class
                whole = {
                    **row,
                    **{"subject": name, "data": self.data, "reference_model": self.reference},
                    "attribution_options": as_json(self.options.get(row["attribution"], {})),
                    "measure_options": as_json(self.options.get(measure, {})),
                }
                rows.append({column: whole[column] for column in self.columns})
        return rows


def answers_of(space: Workspace) -> tuple[list[Answers], dict[str, Any]]:
    """What each network answers, and what was found out before anything was measured."""
    record = space.records()[0]
    facts = record.result
    return unpacked(facts.pop("models"), record.arrays("answers")), facts


def summary(space: Workspace) -> AuditResult:
    """Raises UsageError where trials are not finished."""
    records = space.records()
    if len(records) < space.n_trials:
        raise UsageError(
            f"{space.folder} has {len(records)} of {words.several(space.n_trials, 'trial')} finished: "
            "give the same `sukashi.audit` again"
        )
    answers, facts = answers_of(space)
    found = {
        name: subject(name, "summary").summary(records, answers, facts[name]) for name in facts if name not in TOLD
    }
    return AuditResult(
        reference=answers[0].label,
        data=space.identity["data"]["spec"],
        options={name: of for what in ("attributions", "measures") for name, of in space.identity[what].items()},
        n_images=len(answers[0].right),
        tested_of_class=answers[0].tested_of_class,
        split_of_class=facts["split_of_class"],
        models=[
            {
                "label": one.label,
                "series": one.series,
                "ratio": one.ratio,
                "repair": one.repair,
                "accuracy": float(one.right.mean()),
                "guesses": one.guesses,
                "few": one.few,
                "n_images": len(one.rows),
                "images_of_class": one.images_of_class,
                "right_of_class": one.right_of_class,
            }
            for one in answers
        ],
        verdict=" ".join(of["verdict"] for of in found.values()),
        lines=[line for of in found.values() for line in of["lines"]],
        # Concepts say themselves which images they are of.
        audited=_audited(answers) if "saliency" in found else [],
        warnings=[*(_gone(answers) if "saliency" in found else []), *facts["warnings"], *_trained(answers)],
        notes=facts["notes"],
        **found,
    )


def tables(space: Workspace) -> dict[str, bytes]:
    """The Parquet tables of what was looked at."""
    _, facts = answers_of(space)
    records = space.records()
    return {
        file: content
        for name in facts
        if name not in TOLD and hasattr(subject(name, "summary"), "tables")
        for file, content in subject(name, "summary").tables(records).items()
    }


def _audited(answers: Sequence[Answers]) -> list[str]:
    """On how many images of each class models are audited, a sentence for those of whom it is the same."""
    found: dict[str, list[str]] = {}
    for one in answers[1:] if len(answers) > 1 else answers:
        counts = one.images_of_class
        some = [f"{n} of {words.of_class(name)}" for name, n in counts.items() if n]
        none = [words.of_class(name) for name, n in counts.items() if not n]
        if len(counts) > CLASSES:
            few = words.between([n for n in counts.values() if n])
            some = [f"{few} of each of {words.several(len(some), 'class', 'classes')}"]
            none = [words.several(len(none), "class", "classes")] if none else []
        images = words.several(len(one.rows), "image")
        said = f"{images}: {', '.join(some)}{f', none of {words.listed(none)}' if none else ''}"
        found.setdefault(said, []).append(one.label)
    return [f"audited ({', '.join(labels)}): {said}" for said, labels in found.items()]


def _gone(answers: Sequence[Answers]) -> list[str]:
    """Of which classes no image is audited, and how much of them the reference and the model get right."""
    first, found = answers[0], []
    for one in answers[1:]:
        gone = [name for name, n in one.images_of_class.items() if not n]
        right = {name: (first.right_of_class[name], one.right_of_class[name]) for name in gone[:NAMED]}
        n_of = first.tested_of_class
        told = [
            f"{words.of_class(name)} ({first.label}: {a:.0%} of {n_of[name]} right, {one.label}: {b:.0%})"
            for name, (a, b) in right.items()
        ]
        if gone:
            more = [f"{words.several(len(gone) - NAMED, 'more class', 'more classes')}"] if len(gone) > NAMED else []
            found.append(
                f"{one.label} is audited on no image of {words.listed([*told, *more])}: no figure here tells of "
                f"{'that class' if len(gone) == 1 else 'those classes'}"
            )
    return found


def _trained(answers: Sequence[Answers]) -> list[str]:
    """That trainings differ by more than images do, where a model was trained after its cut."""
    trained = [one.label for one in answers[1:] if one.trained]
    if not trained:
        return []
    return [
        f"trained after the cut: {', '.join(trained)}; intervals are for new images, and another training can say the "
        "opposite: audit several seeds before a change is laid to the cut"
    ]
