"""What an audit found, from its artefacts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Result
from sukashi.experiments.audit.networks import Answers, unpacked
from sukashi.experiments.audit.run import subject
from sukashi.experiments.workspace import Workspace
from sukashi.report import words

TOLD = ("warnings", "notes")  # facts beside those of subjects


class AuditResult(Result):
    """Networks beside the first of them.

    models     of each: label, series and ratio (what pruned it and how far, where its recipe says so), accuracy,
               guesses (not shown to get more images right than guessing would), few (too few images to say anything),
               n_images
    saliency   what its maps are like, see `audit.saliency.summary`; and so for each subject that was looked at

    `verdict` and `lines` are the sentences the page begins with.
    """

    kind: ClassVar[str] = "audit"

    reference: str
    n_images: int
    models: list[dict[str, Any]]
    verdict: str
    lines: list[str]

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def subjects(self) -> dict[str, dict[str, Any]]:
        """What was looked at, by name."""
        return dict(self.model_extra or {})

    def text(self) -> str:
        parts = [subject(name, "summary").text(found, self.reference) for name, found in self.subjects.items()]
        said = [*parts, "", self.verdict, *self.lines, *self.remarks()]
        return "\n".join([*said, *words.where(self)])

    def table(self) -> list[dict[str, Any]]:
        return [
            {"subject": name, **row}
            for name, found in self.subjects.items()
            for row in subject(name, "summary").rows(found)
        ]


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
            f"{space.folder} has {len(records)} of {space.n_trials} trials finished: give the same audit command again"
        )
    answers, facts = answers_of(space)
    found = {
        name: subject(name, "summary").summary(records, answers, facts[name]) for name in facts if name not in TOLD
    }
    return AuditResult(
        reference=answers[0].label,
        n_images=len(answers[0].right),
        models=[
            {
                "label": one.label,
                "series": one.series,
                "ratio": one.ratio,
                "accuracy": float(one.right.mean()),
                "guesses": one.guesses,
                "few": one.few,
                "n_images": len(one.rows),
            }
            for one in answers
        ],
        verdict=" ".join(of["verdict"] for of in found.values()),
        lines=[line for of in found.values() for line in of["lines"]],
        warnings=[*facts["warnings"], *_trained(answers)],
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
        if name not in TOLD
        for file, content in subject(name, "summary").tables(records).items()
    }


def _trained(answers: Sequence[Answers]) -> list[str]:
    """That trainings differ by more than images do, where a model was trained after its cut."""
    trained = [one.label for one in answers[1:] if one.trained]
    if not trained:
        return []
    return [
        f"trained after the cut: {', '.join(trained)}; intervals are for new images, and another training can say the "
        "opposite: audit several seeds before a change is laid to the cut"
    ]
