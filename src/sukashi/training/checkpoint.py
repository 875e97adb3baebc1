"""The state of a training in one safetensors file, written whole or not at all: what a killed run goes on from."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sukashi.core import files
from sukashi.core.bounded import from_json
from sukashi.core.errors import ModelError, UsageError, writing

FILE = "checkpoint.safetensors"
HISTORY = "history.jsonl"
_SAID = ".said"  # made by the process that says why a run of several ends
_PAUSE = 20  # a checkpoint that took t seconds is followed by this times t without another
_KEY = "training"  # of the header's metadata; one alone, for safetensors writes several in random order


@dataclass
class State:
    """Everything a training changes. Random numbers are no part of it: they follow from the seed and the step.

    `average` is the moving average of the model or None, `best` the weights of the best epoch on the validation images
    or None, `step` how many steps are done, `sums` the present epoch's so far, `history` one entry for each past epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    best: dict[str, Tensor] | None = None
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def save(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Put the state of the training that `about` (JSON) describes in place; the one before stays until then.

    Raises ResourceError where it can't be written.
    """
    tensors = {
        **_named("model", state.model.state_dict()),
        **_named("average", state.average.state_dict() if state.average else {}),
        **_named("best", state.best or {}),
    }
    for number, kept in state.optimizer.state_dict()["state"].items():
        tensors |= _named(f"optimizer.{number}", {name: value for name, value in kept.items() if value is not None})
    said = {"about": about, "step": state.step, "sums": state.sums, "history": state.history}
    files.write(path, safetensors.torch.save(tensors, {_KEY: files.canonical(said).decode()}))


def facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: `about`, `step`, `sums`, `history`. ModelError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(from_json(file.metadata()[_KEY]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def restore(path: Path, state: State) -> None:
    """Put what was saved into a state made for the same training. Raises ModelError where the file is damaged."""
    said = facts(path)
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    state.model.load_state_dict(parts["model"])
    if state.average is not None:
        state.average.load_state_dict(parts["average"])
    state.best = parts["best"] or None
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, rest = name.partition(".")
        kept.setdefault(int(number), {})[rest] = tensor
    state.optimizer.load_state_dict({"state": kept, "param_groups": state.optimizer.state_dict()["param_groups"]})
    state.step, state.sums, state.history = said["step"], said["sums"], said["history"]


class Checkpoints:
    """Writes the states of a run to its folder, `seconds` apart and more where that takes long."""

    def __init__(self, out: Path, described: Mapping[str, Any], seconds: float) -> None:
        self.out, self.described, self.seconds = out, described, seconds
        self.next = time.monotonic() + seconds

    def due(self) -> bool:
        return time.monotonic() >= self.next

    def keep(self, state: State) -> None:
        start = time.monotonic()
        save(self.out / FILE, state, self.described)
        files.write(self.out / HISTORY, b"".join(files.canonical(entry) + b"\n" for entry in state.history))
        end = time.monotonic()
        self.next = end + max(self.seconds, _PAUSE * (end - start))


@contextlib.contextmanager
def held(out: Path, described: Mapping[str, Any]) -> Iterator[None]:
    """The folder of a run, held for this process; UsageError where it holds another run, or something else."""
    kept = out / FILE
    with contextlib.suppress(OSError):  # where there is none; and where nothing can be removed, nothing is held below
        # Before anything is refused: one that another run has left would keep everybody silent.
        (out / _SAID).unlink()
    if out.is_dir() and not kept.exists():
        foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if foreign:
            raise UsageError(f"{out} is not empty ({foreign[0]}) and holds no training: choose another `out`")
    elif out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: `out` needs a folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with files.lock(out):
        if kept.exists():
            files.refuse_other(out, facts(kept)["about"], described)
        for path in out.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        yield


def claim(out: Path) -> bool:
    """Whether this process is the first of its run to say why the run ends."""
    try:
        os.close(os.open(out / _SAID, os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    except OSError:
        pass  # no such folder, or no space in it: better said twice than not at all
    return True


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return {f"{part}.{name}": tensor for name, tensor in copies.items()}


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is damaged ({error}): remove it to train from the start")
