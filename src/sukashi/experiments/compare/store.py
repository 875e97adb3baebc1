"""Results on disk: a study is a folder, a trial a folder in it, finished when its `result.json` exists.

    study.json             what the study is; it may grow by criteria and seeds, another study is refused
    trials/KEY/trial.json  the canonical JSON whose hash is KEY
               journal.jsonl  decisions so far, until the trial is finished
               plan.npz  curve.npz  result.json
    results.parquet        one row per finished trial and measured point
    log.jsonl              when, where and how fast: the one file that differs between a resumed and an undisturbed run

Every file but the two `.jsonl` appears whole or not at all, and all but `log.jsonl` hold the same bytes however often
the run was killed on the way.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sukashi.core.errors import DataError, ModelError, UsageError, writing
from sukashi.core.files import Journal, _held, append, canonical, lock, packed, read_json, refuse_other, unpacked, write
from sukashi.core.types import Curve, Plan, Site, Trial
from sukashi.criteria.plans import plan_bytes, read_plan

_TABLE = pa.schema(
    [
        ("trial", pa.string()),
        ("model", pa.string()),
        ("data", pa.string()),
        ("criterion", pa.string()),
        ("sampling", pa.string()),
        ("seed", pa.int64()),
        ("kind", pa.string()),
        ("ratio", pa.float64()),
        ("fraction", pa.float64()),
        ("units", pa.int64()),
        ("n_images", pa.int64()),
        ("n_correct", pa.int64()),
        ("accuracy", pa.float64()),
        ("sauce", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Record:
    """What is kept of one trial."""

    folder: Path

    @cached_property
    def trial(self) -> Trial:
        trial = Trial(**read_json(self.folder / "trial.json"))
        if trial.key != self.folder.name:
            raise DataError(f"{self.folder / 'trial.json'} was altered: its hash is {trial.key}; remove the folder")
        return trial

    @cached_property
    def result(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "result.json"))

    def plan(self, sites: Sequence[Site] | None = None) -> Plan | None:
        """The kept plan, or None; see `read_plan`."""
        path = self.folder / "plan.npz"
        return read_plan(path, sites) if path.exists() else None

    def curve(self) -> Curve:
        """The kept curve; a finished trial has one."""
        with unpacked(self.folder / "curve.npz") as arrays:
            image_ids = tuple(arrays["image_ids"].tolist())
            correct = np.unpackbits(arrays["correct"], axis=1, count=len(image_ids)).astype(bool)
            return Curve(arrays["ratio"], arrays["n_removed"], arrays["fraction"], correct, image_ids)


class Writer(Record):
    """A trial being worked on: `journal` and `plan()` hold what an interrupted run left."""

    @cached_property
    def journal(self) -> Journal:
        return Journal(self.folder / "journal.jsonl")

    def save_plan(self, plan: Plan) -> None:
        write(self.folder / "plan.npz", plan_bytes(plan))

    def save_curve(self, curve: Curve) -> None:
        content = packed(
            ratio=curve.ratio.astype(np.float64),
            n_removed=curve.n_removed.astype(np.int64),
            fraction=curve.fraction.astype(np.float64),
            correct=np.packbits(curve.correct.astype(bool), axis=1),
            image_ids=np.array(curve.image_ids, dtype=np.str_),
        )
        write(self.folder / "curve.npz", content)

    def finish(self, result: Mapping[str, Any]) -> None:
        """The trial is finished from here on. `result` is JSON that every run of the trial gives alike: no times."""
        assert (self.folder / "curve.npz").exists(), "a finished trial has a curve"
        write(self.folder / "result.json", canonical(result, indent=1) + b"\n")
        (self.folder / "journal.jsonl").unlink(missing_ok=True)


class Store:
    """The folder of one study: read it as it is, or change it inside `writing`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @cached_property
    def study(self) -> dict[str, Any]:
        """The study's configuration. Raises UsageError where the folder holds none."""
        path = self.folder / "study.json"
        if not path.exists():
            raise UsageError(
                f"{self.folder} holds no study (no study.json): give the folder `--out` of a compare named"
            )
        return dict(read_json(path))

    @contextmanager
    def writing(self, study: Mapping[str, Any]) -> Iterator[Store]:
        """Hold the folder for this process; it is made, or resumed when it holds the same study.

        A study may also have grown, by criteria or by seeds: trials that are finished stay.
        What a killed run left half-written is removed first. The lock goes with the process, however it ends. A new
        study that is refused (UsageError, DataError, ModelError) before a trial is finished leaves nothing behind.

        Raises: UsageError where the folder holds another study or anything else, ResourceError where another process
        holds it or nothing can be written.
        """
        self._refuse_foreign()
        with writing(self.folder):
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        with lock(self.folder):
            asked = json.loads(canonical(study))
            resumed = (self.folder / "study.json").exists()
            if resumed and not _grown(self.study, asked):
                refuse_other(self.folder, self.study, asked)
            else:
                write(self.folder / "study.json", canonical(asked, indent=1) + b"\n")
                self.__dict__.pop("study", None)
            for path in self.folder.rglob(".*.tmp"):
                path.unlink()
            for record in self.finished():
                (record.folder / "journal.jsonl").unlink(missing_ok=True)
            self._tabulate()
            try:
                yield self
            except (UsageError, DataError, ModelError):
                if not resumed and not self.finished():
                    self._remove()
                raise

    @contextmanager
    def run(self, trial: Trial) -> Iterator[Writer]:
        """Work on a trial that is not finished; what an interrupted run left of it is there to go on from."""
        assert self.folder.resolve() in _held, "a trial is run inside `writing`"
        writer = Writer(self.folder / "trials" / trial.key)
        with writing(writer.folder):
            writer.folder.mkdir(exist_ok=True)
        write(writer.folder / "trial.json", trial.json.encode() + b"\n")
        yield writer
        self._tabulate()

    def record(self, trial: Trial) -> Record | None:
        """The finished trial, or None."""
        folder = self.folder / "trials" / trial.key
        return Record(folder) if (folder / "result.json").exists() else None

    def finished(self) -> list[Record]:
        """Every finished trial, by model, data, criterion and seed."""
        records = [Record(path.parent) for path in self.folder.glob("trials/*/result.json")]
        return sorted(records, key=_order)

    def log(self, event: str, **facts: Any) -> None:
        """Add a line about this very run (command, machine, speed): kept apart from the results."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = canonical({"time": stamp, "event": event, **facts})
        with writing(self.folder):
            append(self.folder / "log.jsonl", b"\n" + line + b"\n")  # the first ends a line a kill has torn

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The facts of every such line, oldest first."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue  # torn by a kill
        return [entry for entry in entries if entry["event"] == event]

    def refused(self) -> dict[str, str]:
        """Why contenders have no finished trial, of those that refused the model."""
        finished = {record.trial.contender for record in self.finished()}
        entries = self.logged("refused")
        return {entry["contender"]: entry["reason"] for entry in entries if entry["contender"] not in finished}

    def _refuse_foreign(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: --out needs a folder")
        if self.folder.is_dir() and not (self.folder / "study.json").exists():
            ours = {"trials", ".lock"}
            foreign = sorted(p.name for p in self.folder.iterdir() if p.name not in ours and p.suffix != ".tmp")
            if foreign:
                raise UsageError(f"{self.folder} is not empty ({foreign[0]}) and holds no study: choose another --out")

    def _remove(self) -> None:
        shutil.rmtree(self.folder / "trials", ignore_errors=True)
        for name in ("study.json", "log.jsonl", "results.parquet", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # what else lies there is not ours
            self.folder.rmdir()

    def _tabulate(self) -> None:
        rows: list[dict[str, Any]] = []
        for record in self.finished():
            trial, curve = record.trial, record.curve()
            for point in range(len(curve.ratio)):
                passed = bool(np.isnan(curve.ratio[point]))
                n_correct = int(curve.correct[point].sum())
                rows.append(
                    {
                        "trial": trial.key,
                        "model": _name(trial.model),
                        "data": _name(trial.data),
                        "criterion": trial.criterion,
                        "sampling": trial.data.get("sampling", "random"),
                        "seed": trial.seed,
                        "kind": "pass" if passed else "ratio",
                        "ratio": None if passed else float(curve.ratio[point]),
                        "fraction": float(curve.fraction[point]),
                        "units": int(curve.n_removed[point]),
                        "n_images": len(curve.image_ids),
                        "n_correct": n_correct,
                        "accuracy": n_correct / len(curve.image_ids),
                        "sauce": record.result.get("sauce"),
                    }
                )
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_TABLE), content)
        write(self.folder / "results.parquet", content.getvalue())


def _order(record: Record) -> tuple[str, str, str, int, str]:
    trial = record.trial
    return _name(trial.model), _name(trial.data), trial.criterion, trial.seed, trial.key


def _name(about: Mapping[str, Any]) -> str:
    """What a table calls a model or a data set: its spec."""
    return str(about.get("spec", canonical(about).decode()))


def _grown(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a study is another only by more criteria or seeds, so that every trial kept is one of its own."""
    growing = ("criteria", "contenders", "seeds", "options")
    if {key: kept[key] for key in kept if key not in growing} != {k: asked[k] for k in asked if k not in growing}:
        return False
    criteria = kept.get("criteria", [])
    return (
        all(set(kept.get(key, ())) <= set(asked.get(key, ())) for key in ("criteria", "contenders"))
        and kept.get("seeds", 0) <= asked.get("seeds", 0)
        and all(kept.get("options", {}).get(name) == asked.get("options", {}).get(name) for name in criteria)
    )
