"""One story: an experiment is settings plus a list of trials; a trial has a key, what it needs, and leaves artefacts.

Of every kind of experiment there is a folder in `sukashi/experiments` with the same files:

    settings.py   the settings, a `core.schema.Settings`: command line, keywords, TOML and identity come from them
    run.py        `prepare(settings) -> Prepared`: what is loaded and checked, and the trials
    summary.py    `summary(space) -> Result`, from the folder alone: the artefacts, and of its log what a clock
                  decides; `tables(space)`, where there are more than the result's own
    page.py       `page(result, space) -> Page`, from the summary, the artefacts that it names and the log

Claiming the folder, resuming, growth, refusal of a foreign folder, leases, results.json, tables and the page are
written once, in `experiments.workspace` and `experiments.executor`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

NOTE = "note: "
"""How a line of `Result.text` begins that tells no more than how things were done."""


@dataclass(frozen=True)
class Trial:
    """A piece of an experiment that is done or not done.

    `about` is all that decides what comes out, as JSON, with a hash of the code of each method that has a part in it,
    under "code"; its own hash is the `key`. `needs` are the keys of trials whose
    artefacts it reads. `run(desk)` does the work at a `workspace.Desk`, leaves artefacts and ends with
    `desk.finish(result)`; what it returns is told of this very call. `place` is its folder inside the experiment's,
    trials/KEY where nobody looks for it by name. `label` is what progress calls it. Processes that torchrun has started
    run it `together`, as a training, or the first one alone.
    """

    about: Mapping[str, Any]
    run: Callable[[Any], Mapping[str, Any] | None] = field(compare=False, repr=False)
    needs: tuple[str, ...] = ()
    place: str = ""
    label: str = ""
    together: bool = False

    @cached_property
    def json(self) -> str:
        """Canonical JSON of `about`: sorted keys, no spaces, no NaN."""
        return json.dumps(self.about, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @property
    def folder(self) -> str:
        return self.place or f"trials/{self.key}"


@dataclass(frozen=True)
class Prepared:
    """An experiment whose model and data are loaded and found to fit.

    `identity` is what its folder is for: another identity is refused there, but for what may grow. `shown` is what no
    trial depends on and the summary does, as a margin. `log` are facts about this very run, such as the hardware.
    `before(missing trials)` may refuse what only they need, `after(space)` measures what a clock decides, once all are
    finished.
    """

    identity: Mapping[str, Any]
    trials: Sequence[Trial]
    shown: Mapping[str, Any] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Sequence[Trial]], None] | None = None
    after: Callable[[Any], None] | None = None


class Result(BaseModel):
    """What an experiment found: typed, printable, JSON.

    `warnings` are sentences on what may make its figures mean something else, `notes` on how they came about.
    `versions` are those by which its trials were done: {"trials": how many, package: its version}, one for each set.
    `out` is its folder, `report` its page, `finished` whether it was all there before this call: these, and what else
    `of_call` names, are no part of results.json.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]
    of_call: ClassVar[tuple[str, ...]] = ("out", "report", "finished")

    warnings: list[str] = []
    notes: list[str] = []
    versions: list[dict[str, Any]] = []
    out: str = ""
    report: str = ""
    finished: bool = False

    def remarks(self, *more: str) -> list[str]:
        """Lines of `text`: the warnings, with `more` that a clock decides, and below them the notes."""
        warned = (f"warning: {warning}" for warning in (*self.warnings, *more))
        return [*warned, *(f"{NOTE}{note}" for note in self.notes)]

    def text(self) -> str:
        """What the command prints: tables and sentences for people."""
        raise NotImplementedError

    def table(self) -> list[dict[str, Any]]:
        """Tidy rows, all with the same keys: `pandas.DataFrame(result.table())`."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and words; None for what has no value."""
        return dict(finite(self.model_dump()))

    def __repr__(self) -> str:
        return self.text()

    __str__ = __repr__


def finite(value: Any) -> Any:
    """The same with None for NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
