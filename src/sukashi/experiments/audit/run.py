"""Audits: do networks, side by side on the same images, still decide for the reasons of the first of them?

The first trial keeps what each network answers; those of the subjects look at them there. An audit that was interrupted
goes on from the trials it has, and models and attributions may be added, never taken away. Every number is that of an
image; means, intervals and tests are made of them in the end, pair by pair.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sukashi.core.errors import UsageError, nearest
from sukashi.core.experiment import Prepared, Trial
from sukashi.core.files import canonical
from sukashi.experiments.audit.networks import POPULATIONS, Answers, opened, packed
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.bench import hardware
from sukashi.experiments.workspace import Desk
from sukashi.report import words

# A folder each in `experiments/audit`.
SUBJECTS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/run.py")))


def subject(name: str, file: str) -> Any:
    """A file of what an audit looks at.

    run      `SETTINGS` that are about it, `check(settings)`, `code(settings)` with a hash of all that may have a part
             in a figure, and `Subject(settings, networks)`, a `looking.Looking`
    summary  `summary(records, answers, facts)` with `verdict` and `lines`; `text`, `rows`; `tables(records)`, where it
             has more than the audit's
    page     `panel(result, found, space)`; `settings(space)`, where more was decided than the identity says
    """
    return importlib.import_module(f"sukashi.experiments.audit.{name}.{file}")


def prepare(settings: Audit) -> Prepared:
    """The networks opened on the same images, and the trials of what is looked at.

    Raises UsageError for unknown names, models of different input sizes, DataError where there is no image to compare
    on, ModelError where every attribution refuses.
    """
    _check(settings)
    networks = opened(settings)
    looking = {name: subject(name, "run").Subject(settings, networks) for name in settings.subjects}
    reference = networks[0].setting
    asked: dict[str, Any] = {"attributions": {}, "measures": {}, "options": {}}
    asked |= {name: value for one in looking.values() for name, value in one.identity.items()}
    identity = reference.identity(
        settings,
        model=networks[0].identity,
        models={_name(one.answers): one.identity["spec"] for one in networks[1:]},
        **asked,
    )
    facts = {
        "warnings": [*dict.fromkeys(said for n in networks for said in n.setting.data.warnings)],
        "notes": [
            *dict.fromkeys(said for n in networks for said in n.setting.data.notes),
            *(note for one in looking.values() for note in one.notes),
        ],
        "split_of_class": dict(zip(reference.data.class_names, reference.data.test.counts.tolist(), strict=True)),
        **{name: one.facts for name, one in looking.items()},
    }
    first, *others = (network.answers for network in networks)
    areas = {concept: area for one in looking.values() for concept, area in one.areas.items()}
    answers = [replace(first, areas=areas), *others]
    about = {
        "answers": [[one.label, one.identity] for one in answers],
        "data": reference.data.sha256,
        "images": list(answers[0].image_ids),
        "population": settings.population,
        **facts,
    }
    kept = Trial(about, partial(_keep, answers, facts), label="answers")
    trials = [kept, *(trial for one in looking.values() for trial in one.trials(kept))]
    return Prepared(identity, trials, log={"hardware": hardware(reference.device)})


def code(settings: Audit) -> dict[str, str]:
    """{name: a hash of its code} of what may have a part in a figure."""
    return {part: of for name in settings.subjects for part, of in subject(name, "run").code(settings).items()}


def _name(one: Answers) -> str:
    """A model of the identity: what pruned it and how far, and a digest of it, wherever its folder lies."""
    digest = hashlib.sha256(canonical(dict(one.identity))).hexdigest()[:12]
    return digest if one.series is None else f"{one.series}, {one.ratio:g}, {digest}"


def _check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if len(settings.models) < 2:
        raise UsageError(
            f"an audit needs a reference and a model to hold against it, got {len(settings.models)}: give more"
        )
    for name in settings.subjects:
        if name not in SUBJECTS:
            raise UsageError(f"unknown subject {name!r}{nearest(name, SUBJECTS)}")
    if settings.population not in POPULATIONS:
        raise UsageError(f"unknown population {settings.population!r}{nearest(settings.population, POPULATIONS)}")
    for what in ("subjects", "attributions", "measures"):
        given = getattr(settings, what)
        if given is not None and (not given or len(set(given)) != len(given)):
            raise UsageError(f"{what} must be different names, at least one, got {given}")
    owners: dict[str, list[str]] = {}
    for name in SUBJECTS:
        for own in subject(name, "run").SETTINGS:
            owners.setdefault(own, []).append(name)
    for own, names in owners.items():
        given = getattr(settings, own) != type(settings).model_fields[own].get_default()
        if given and not {*names} & {*settings.subjects}:
            verb = "is" if len(names) == 1 else "are"
            raise UsageError(f"`{own}` is about {words.listed(names)}, which {verb} not among `subjects`: leave it out")
    for name in settings.subjects:
        subject(name, "run").check(settings)


def _keep(answers: Sequence[Answers], facts: dict[str, Any], desk: Desk) -> None:
    models, arrays = packed(answers)
    desk.save("answers", arrays)
    desk.finish({"models": models, **facts})
