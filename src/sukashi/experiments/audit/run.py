"""Audits: do networks, side by side on the same images, still decide for the reasons of the first of them?

The first trial keeps what each network answers; those of the subjects look at them there. An audit that was interrupted
goes on from the trials it has, and models and attributions may be added. Every number is that of an image; means,
intervals and tests are made of them in the end, pair by pair.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from sukashi.core.experiment import Prepared, Trial
from sukashi.experiments.audit.networks import Answers, opened, packed
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.bench import hardware, versions
from sukashi.experiments.workspace import Desk


def subject(name: str, file: str) -> Any:
    """A file of what an audit looks at: run, summary or page."""
    return importlib.import_module(f"sukashi.experiments.audit.{name}.{file}")


def prepare(settings: Audit) -> Prepared:
    """The networks opened on the same images, and the trials of what is looked at.

    Raises UsageError for unknown names, models of different input sizes, DataError where there is no image to compare
    on, ModelError where every attribution refuses.
    """
    for name in settings.subjects:
        subject(name, "run").check(settings)
    networks = opened(settings.models, settings.data, settings.population, settings.opening())
    looking = {name: subject(name, "run").Subject(settings, networks) for name in settings.subjects}
    reference = networks[0].setting
    identity = {
        "data": reference.about_data,
        "population": settings.population,
        "seed": settings.seed,
        "reference": networks[0].identity,
        **{name: one.identity for name, one in looking.items()},
    }
    facts = {
        "notes": [*dict.fromkeys(note for n in networks for note in n.setting.data.notes)],
        **{name: one.facts for name, one in looking.items()},
    }
    answers = [network.answers for network in networks]
    about = {
        "answers": [[one.label, one.identity] for one in answers],
        "data": reference.data.sha256,
        "images": list(answers[0].image_ids),
        "population": settings.population,
        **facts,
    }
    first = Trial(about, partial(_keep, answers, facts), label="answers")
    trials = [first, *(trial for one in looking.values() for trial in one.trials(first))]
    return Prepared(identity, trials, {"versions": versions(), "hardware": hardware(reference.device)})


def _keep(answers: Sequence[Answers], facts: dict[str, Any], desk: Desk) -> None:
    models, arrays = packed(answers)
    desk.save("answers", arrays)
    desk.finish({"models": models, **facts})
