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
from html import escape
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from sukashi.core.errors import UsageError

Columns = Mapping[str, tuple[type, str]]
"""Of each column of a table its type, and what it holds."""
NOTE = "note: "
"""How a line of `Result.text` begins that tells no more than how things were done."""
SHOWN = 20  # rows in a notebook


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
    columns: ClassVar[Columns] = {}
    """Those of `table`, and of results.parquet."""

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
        """Tidy rows, all with the same keys."""
        raise NotImplementedError

    def frame(self) -> Any:
        """`table` as a pandas.DataFrame; what columns hold is in its `attrs`, by name.

        Raises UsageError where pandas is not installed, which sukashi does without.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("a DataFrame needs pandas, which is not installed: pip install pandas") from None
        frame = pandas.DataFrame(self.table(), columns=list(self.columns) or None)
        numbers = {name: "float64" for name, (kind, _) in self.columns.items() if kind is float}
        frame = frame.astype(numbers)  # a column of None alone is one of NaN
        frame.attrs |= {name: told for name, (_, told) in self.columns.items()}
        return frame

    def overview(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Header and rows of the table that tells most, as text."""
        rows = self.table()
        return [*rows[0]] if rows else [], [[str(value) for value in row.values()] for row in rows]

    def _repr_html_(self) -> str:
        """For a notebook: what the result says in a sentence, what to take note of, and its main table."""
        header, rows = self.overview()
        said = [f"<p><strong>{escape(self.to_json().get('verdict', ''))}</strong></p>"]
        said += [f"<p>{escape(f'warning: {warning}')}</p>" for warning in self.warnings]
        for kind, row in [("th", header), *(("td", row) for row in rows[:SHOWN])]:
            cells = "".join(f'<{kind} style="text-align: left">{escape(cell)}</{kind}>' for cell in row)
            said.append(f"{'<table>' * (kind == 'th')}<tr>{cells}</tr>")
        more = f"<p>{len(rows) - SHOWN} more rows: .frame()</p>" if len(rows) > SHOWN else ""
        page = f"<p>Report: {escape(self.report)}</p>" if self.report else ""
        return "\n".join([*said, f"</table>{more}{page}"])

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
