"""A study: a trial is a whole experiment, in a folder of its own by its name."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from sukashi.core.errors import UsageError
from sukashi.core.experiment import Prepared, Trial
from sukashi.experiments.executor import execute, part, prepare_of, room_of
from sukashi.experiments.kinds import kinds
from sukashi.experiments.methods import codes
from sukashi.experiments.study.file import OUT
from sukashi.experiments.study.settings import Study
from sukashi.experiments.workspace import EXPERIMENT, TRIAL, Desk, Workspace


def prepare(settings: Study) -> Prepared:
    """Every experiment is prepared, so that what is wrong with a later one does not show after hours of work; but for
    those that read what others have yet to make. Raises UsageError for folders of other experiments too.
    """
    trials: list[Trial] = []
    # Absolute: a model's name is part of what a folder is for, wherever the study is run from.
    home = str(Path(settings.out).resolve())
    owned = {name: settings_of(asked, home, name) for name, asked in settings.experiments.items()}
    for own in owned.values():
        Workspace(own.out).check_place(room_of(own))  # of all, before the first model is loaded
    for name, asked in settings.experiments.items():
        own = owned[name]
        about: dict[str, Any] = {"name": name, "kind": asked["kind"]}
        needs: tuple[str, ...] = ()
        if OUT.search(str(asked)):
            # By what stands for the study's folder, so that it may be moved.
            unfilled = settings_of(asked, "$OUT", name).identity()
            about |= {"settings": unfilled, "after": [trial.key for trial in trials], "code": _code(own)}
            needs = tuple(trial.key for trial in trials)
        else:
            with warnings.catch_warnings(action="ignore"):  # it is said when the experiment's turn comes
                prepared = prepare_of(own)
            about["identity"] = dict(prepared.identity)
            about["trials"] = [trial.key for trial in prepared.trials]
            Workspace(own.out).check(room_of(own), about["identity"], own.grows)
        trials.append(Trial(about, partial(_run, own, name), needs=needs, label=name, together=True))
        _check_there(settings, trials[-1], own)
    identity = {"experiments": {name: asked["kind"] for name, asked in settings.experiments.items()}}
    return Prepared(identity, trials, {"title": settings.title, "pairs": settings.pairs})


def _code(own: Any) -> dict[str, str]:
    """{name: a hash of its code} of all that decides an experiment which can't be prepared yet."""
    found: dict[str, str] = getattr(part(room_of(own), "run"), "code", codes)(own)
    return found


def _check_there(settings: Study, trial: Trial, own: Any) -> None:
    """Refuse an experiment that the study has finished and whose folder somebody has removed."""
    kept = Path(settings.out) / trial.folder
    if (kept / TRIAL).exists() and not (Path(own.out) / EXPERIMENT).exists():
        raise UsageError(f"{own.out} is gone, which the study has finished: remove {kept} too, and run it again")


def settings_of(asked: dict[str, Any], out: str, name: str) -> Any:
    """The settings of one of its experiments, which goes into a folder by its name."""
    given = {key: _filled(value, out) for key, value in asked.items() if key != "kind"}
    return kinds()[asked["kind"]].model_validate(given | {"out": str(Path(out) / name)})


def _filled(value: Any, out: str) -> Any:
    if isinstance(value, list):
        return [_filled(part, out) for part in value]
    return OUT.sub(lambda _: out, value) if isinstance(value, str) else value


def _run(settings: Any, name: str, desk: Desk) -> None:
    command = desk.space.logged("run")[-1]["command"]
    execute(settings, command=command)
    desk.finish({"name": name})
