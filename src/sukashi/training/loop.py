"""Training and fine-tuning, under a mask or none: one loop that a kill does not change and that processes share.

A run is its settings (`Training`), what it starts from and its images. Every random number follows from the seed and
the step, so nothing but `checkpoint.State` needs to be kept: on one CPU process a run that was killed and given again
ends in the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sukashi import models
from sukashi.core import progress
from sukashi.core.errors import ModelError, ResourceError, SukashiError, writing
from sukashi.core.precision import exact
from sukashi.core.types import pass_size
from sukashi.data import Data, Split
from sukashi.data.augment import AUGMENTS, derived, draws, view
from sukashi.data.frames import Frames, unit
from sukashi.models import Loaded
from sukashi.network import sparsity
from sukashi.training import checkpoint
from sukashi.training.checkpoint import State
from sukashi.training.distributed import World, lost, starts_again, unused, world
from sukashi.training.inputs import about, check_training, logits_of, n_batches, splits, trained_on
from sukashi.training.settings import Finetuning, Training

__all__ = ["MEMORY", "Finetuning", "Fitted", "Training", "fit"]

MEMORY = 2**31

_SETTLE = {"cpu": 1, "cuda": 20}  # steps from one look at the losses to the next: a GPU is waited for


@dataclass(frozen=True)
class Fitted:
    """A trained network and how it came about.

    `history` has an entry an epoch: `epoch`, `train_loss`, `val_loss` and `val_accuracy` (None without validation
    images), `lr` (at its end), `images_per_second`, `waiting` (the share of its time spent on getting images ready).
    `epoch` is the one whose weights these are, `zeros` the share of zeros among the weights a mask speaks of, `removed`
    the share it removes (both None without a mask), `resumed` the step this call went on from.
    """

    loaded: Loaded
    history: tuple[Mapping[str, Any], ...]
    epoch: int
    zeros: float | None
    removed: float | None
    resumed: int
    notes: tuple[str, ...]


def fit(
    loaded: Loaded,
    data: Data,
    training: Training,
    *,
    out: Path,
    device: torch.device | None = None,
    workers: int = 0,
    memory: int = MEMORY,
    tensorboard: Path | None = None,
    seconds: float = 10.0,
    until: int | None = None,
) -> Fitted:
    """A copy of the network, trained on `data.train` less what is held out; the given one is left alone.

    With `until` it is the network after so many of the epochs, on its way to where all of them would lead.

    `loaded.mask` is enforced after every step. Minimises the mean cross entropy of each batch of about `batch_size`
    images (an epoch is cut into batches as equal as can be, no image is left out). On CUDA forward passes are in
    bfloat16 where autocast thinks so. Under torchrun each process takes a part of every batch, and BatchNorm sees the
    whole: but for the order of sums, and what dropout draws, nothing changes.

    `out` holds the run: `checkpoint.safetensors`, written every `seconds` and after every epoch, and `history.jsonl`;
    `tensorboard` is a folder for its log. The same call goes on from there. Images are kept in `memory` bytes of each
    process where they fit and decoded by `workers` threads. The test split is not touched.

    Raises UsageError for settings that contradict each other or a folder of another run, DataError for too few images,
    ModelError for a mask of another architecture and where the loss is not finite (the last checkpoint is kept),
    ResourceError where nothing can be written, another process holds the folder, or one of the run's is gone.
    """
    device = next(loaded.model.parameters()).device if device is None else device
    loaded = replace(loaded, trained_on=trained_on(loaded, data, training))
    train, validation, notes = splits(data, training)
    notes += check_training(training, train, validation, loaded, tensorboard is not None)
    checkpoints = checkpoint.Checkpoints(out, about(loaded, data, training), seconds)
    with world(device) as processes, contextlib.ExitStack() as stack, _told_once(processes, out):
        if processes.rank == 0:
            stack.enter_context(checkpoint.held(out, checkpoints.described))
        stack.enter_context(torch.random.fork_rng([processes.device] if device.type == "cuda" else []))
        read = functools.partial(Frames.read, preprocess=loaded.preprocess, memory=memory, workers=workers)
        run = _Run(loaded, train, validation, training, processes, checkpoints.keep, read)
        run.until = until or training.epochs
        if processes.rank == 0 and not (out / checkpoint.FILE).exists():
            checkpoints.keep(run.state)
        processes.total(torch.zeros(1, device=processes.device))  # now every process finds the checkpoint
        checkpoint.restore(out / checkpoint.FILE, run.state)
        resumed = run.state.step
        asked = stack.enter_context(_interrupts())
        task = stack.enter_context(progress.task("training", training.epochs * run.n_batches))
        task.advance(resumed)
        while not run.ended:
            run.epoch(task, asked, checkpoints.due)
            if tensorboard is not None and processes.rank == 0:
                _log(tensorboard, run.state.history)
        return run.fitted(resumed, notes)


@contextlib.contextmanager
def _told_once(processes: World, out: Path) -> Iterator[None]:
    """Of several processes that fail inside one speaks, and the others end with its exit code."""
    try:
        yield
    except (SukashiError, RuntimeError) as error:
        found = error if isinstance(error, SukashiError) else _meant(error, out)
        if processes.size == 1 or found is None:
            raise
        # All processes may find it, or only the one whose share of the images it is in.
        if not checkpoint.claim(out):
            raise SystemExit(found.exit_code) from None
        found.alone = True
        raise found from None


def _meant(error: RuntimeError, out: Path) -> SukashiError | None:
    """What an error of torch's means in a run of several processes, where that is known."""
    if unused(error):
        return ModelError("some weights take no part in the model's logits: train it in one process, or leave them out")
    if not lost(error):
        return None
    kept = out / checkpoint.FILE
    where = f"from step {checkpoint.facts(kept)['step']}" if kept.exists() else "from the start"
    how = "torchrun starts it again" if starts_again() else "give the same command again"
    return ResourceError(f"a process of this run is gone, its connection broke: {how}, {out} goes on {where}")


class _Run:
    """One training under way in this process."""

    def __init__(
        self,
        loaded: Loaded,
        train: Split,
        validation: Split | None,
        training: Training,
        processes: World,
        keep: Callable[[State], None],
        frames: Callable[[Split], Frames],
    ) -> None:
        self.loaded, self.training, self.processes, self.keep = loaded, training, processes, keep
        self.n_images, self.n_batches = len(train), n_batches(len(train), training.batch_size)
        model = copy.deepcopy(loaded.model).to(processes.device).to(memory_format=torch.channels_last)
        model.requires_grad_().train()
        self.weights, self.keeps = ([], []) if loaded.mask is None else sparsity.weights_of(model, loaded.mask)
        if self.weights:
            # Each process has made its own mask: where one bit differed, their weights would drift apart unseen.
            self.keeps = [processes.first(keep) for keep in self.keeps]
            torch._foreach_mul_(self.weights, self.keeps)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training.optimizer]
        chosen = {"momentum": training.momentum} if training.optimizer == "sgd" else {}
        optimizer = kind(model.parameters(), lr=training.lr, weight_decay=training.weight_decay, **chosen)
        self.state = State(model, optimizer, copy.deepcopy(model).eval() if training.ema else None)
        self.net = processes.parallel(model)
        self.objective = train.objective
        self.train_frames, self.train_target = frames(train), train.targets
        self.validation = None if validation is None else (frames(validation), validation.targets)
        self.until = training.epochs
        self.pending: list[Tensor] = []  # loss and wish to stop of each step since the last look
        self.stop = False

    @property
    def ended(self) -> bool:
        done, patience = len(self.state.history), self.training.patience
        return done >= self.until or bool(patience and done and done - 1 - self.chosen >= patience)

    @property
    def chosen(self) -> int:
        """The past epoch whose weights count: the last, or with patience that of the lowest validation loss."""
        history = self.state.history
        if not self.training.patience:
            return len(history) - 1
        return min(range(len(history)), key=lambda epoch: history[epoch]["val_loss"])

    @property
    def result(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.state.model if self.state.average is None else self.state.average

    def epoch(self, task: progress.Task, asked: threading.Event, due: Callable[[], bool]) -> None:
        """Do what is left of the present epoch and validate; `asked` to stop, raise KeyboardInterrupt after a step."""
        training, state, processes = self.training, self.state, self.processes
        number = len(state.history)
        generator = torch.Generator().manual_seed(derived(training.seed, number, 0))
        order = torch.randperm(self.n_images, generator=generator)
        uniform = None if training.augment == "none" else draws(self.n_images, training.seed, number)
        batches = order.tensor_split(self.n_batches)[state.step - number * self.n_batches :]
        note = f"epoch {number + 1}"
        with contextlib.closing(self.train_frames.batches([processes.share(rows) for rows in batches])) as frames:
            for rows in batches:
                start, own = time.perf_counter(), processes.share(rows)
                x = self._views(next(frames), None if uniform is None else uniform[own])
                target = self.train_target[own].to(processes.device)
                ready = time.perf_counter()
                self._step(x, target, len(rows), asked.is_set())
                done = time.perf_counter()
                for name, value in (("images", len(rows)), ("waiting", ready - start), ("seconds", done - start)):
                    state.sums[name] = state.sums.get(name, 0.0) + value
                if not self.pending and (self.stop or due()):
                    self._keep()
                if self.stop:
                    raise KeyboardInterrupt
                if not self.pending:
                    note = f"epoch {number + 1}, loss {state.sums['loss'] / state.sums['images']:.3f}"
                task.advance(1, note=note)
        loss, accuracy = self._validate()
        state.history.append(
            {
                "epoch": number + 1,
                "train_loss": state.sums["loss"] / state.sums["images"],
                "val_loss": loss,
                "val_accuracy": accuracy,
                "lr": state.optimizer.param_groups[0]["lr"],
                "images_per_second": state.sums["images"] / state.sums["seconds"],
                "waiting": state.sums["waiting"] / state.sums["seconds"],
            }
        )
        state.sums = {}
        if training.patience and self.chosen == number:
            state.best = {name: tensor.clone() for name, tensor in self.result.state_dict().items()}
        self._keep()

    def _views(self, pixels: Tensor, uniform: Tensor | None) -> Tensor:
        """Pixels as the network reads them, (B, C, H, W) on its device."""
        preprocess = self.loaded.preprocess
        x = unit(pixels.to(self.processes.device, non_blocking=True, memory_format=torch.channels_last))
        if uniform is not None:
            x = view(x, AUGMENTS[self.training.augment](uniform, preprocess.height, preprocess.width))
        shape = (1, preprocess.channels, 1, 1)
        return (x - x.new_tensor(preprocess.mean).view(shape)) / x.new_tensor(preprocess.std).view(shape)

    def _step(self, x: Tensor, target: Tensor, n_images: int, asked: bool) -> None:
        """One step on this process's part of a batch of `n_images`."""
        training, state, processes = self.training, self.state, self.processes
        torch.manual_seed(derived(training.seed, state.step, 2 + processes.rank))  # for dropout and its like
        rate = training.rate(state.step, self.n_batches)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        on_gpu = processes.device.type == "cuda"
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=on_gpu):
            logits = logits_of(self.net(x))
        loss = self.objective.loss(logits.float(), target, label_smoothing=training.label_smoothing)
        self.pending.append(processes.total(torch.stack([loss.detach(), loss.new_tensor(float(asked))])))
        last = (state.step + 1) % self.n_batches == 0
        if last or len(self.pending) >= _SETTLE[processes.device.type]:
            self._settle()
        state.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes, the loss is a mean over all of their images.
        (loss * (processes.size / n_images)).backward()
        state.optimizer.step()
        if self.weights and training.enforce_mask:
            torch._foreach_mul_(self.weights, self.keeps)
        if state.average is not None:
            self._follow(state.average, min(training.ema, (1 + state.step) / (10 + state.step)))
        state.step += 1

    @torch.no_grad()
    def _follow(self, average: nn.Module, decay: float) -> None:
        """Move the average towards the weights and buffers; counts are copied. Zeros stay zero."""
        both = zip(average.state_dict().values(), self.state.model.state_dict().values(), strict=True)
        # Tied weights have two names and move once.
        pairs = list({old.data_ptr(): (old, new) for old, new in both}.values())
        slow = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([old for old, _ in slow], [new for _, new in slow], 1 - decay)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)

    def _settle(self) -> None:
        """Look at the losses since last time: they are finite, or the run ends here with its last checkpoint."""
        first = self.state.step + 1 - len(self.pending)
        found = torch.stack(self.pending).tolist()
        self.pending.clear()
        for step, (loss, asked) in enumerate(found, first + 1):
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss} in step {step}")
            self.state.sums["loss"] = self.state.sums.get("loss", 0.0) + loss
            self.stop = self.stop or asked > 0

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, float | None]:
        """Mean loss and mean outcome (the share of right answers) on the validation images, in float32."""
        if self.validation is None:
            return None, None
        frames, targets = self.validation
        rows = self.processes.share(torch.arange(len(targets)))
        parts = rows.split(pass_size(torch.empty(1, *frames.shape)))
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        model = self.result.eval()
        with exact(), contextlib.closing(frames.batches(parts)) as images:
            for part, pixels in zip(parts, images, strict=True):
                logits, target = model(self._views(pixels, None)), targets[part].to(sums.device)
                sums[0] += self.objective.loss(logits, target)
                sums[1] += self.objective.outcome(logits, target).sum()
        self.state.model.train()
        loss, right = (self.processes.total(sums) / len(targets)).tolist()
        if not math.isfinite(loss):
            self._refuse(f"the loss on validation images is {loss} after step {self.state.step}")
        return loss, right

    def _keep(self) -> None:
        """Write a checkpoint, of a finite state only."""
        finite = torch.stack([weight.isfinite().all() for weight in self.state.model.parameters()])
        if not finite.all():
            self._refuse(f"weights are NaN or Inf after step {self.state.step}")
        if self.processes.rank == 0:
            self.keep(self.state)

    def _refuse(self, fault: str) -> NoReturn:
        raise ModelError(
            f"{fault}: the last checkpoint is kept; give a lower `lr` or a longer `warmup`, with another `out`"
        )

    def fitted(self, resumed: int, notes: tuple[str, ...]) -> Fitted:
        model = copy.deepcopy(self.loaded.model).to(self.processes.device)
        # What is only on its way is not yet chosen among.
        on_the_way = self.until < self.training.epochs
        best = None if on_the_way else self.state.best
        model.load_state_dict(best or self.result.state_dict())
        mask, enforced = self.loaded.mask, self.training.enforce_mask
        zeros = removed = None
        if mask is not None:
            zeros, removed = sparsity.zeros(model, mask)["sparsity"], mask.n_removed / mask.n_units
            if not enforced:
                notes += (
                    f"the mask was not enforced: it removes {removed:.1%} of the weights it speaks of, {zeros:.1%} of "
                    "them are zero after training",
                )
        loaded = replace(
            self.loaded,
            model=model.eval(),
            weights_sha256=models.digest(model),
            mask=mask if enforced else None,
        )
        history = tuple(self.state.history)
        epoch = len(history) if on_the_way else self.chosen + 1
        return Fitted(loaded, history, epoch, zeros, removed, resumed, notes)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM inside, so that a step is finished; a second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(*_: object) -> None:
        asked.set()
        for kind in kinds:
            signal.signal(kind, before[kind])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield asked
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def _log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Add the last epoch to the TensorBoard log, in place of what a killed run wrote of it."""
    from torch.utils.tensorboard import SummaryWriter  # an extra

    entry = history[-1]
    with writing(folder), SummaryWriter(folder, purge_step=entry["epoch"]) as log:
        for name, value in entry.items():
            if name != "epoch" and value is not None:
                log.add_scalar(name, value, entry["epoch"])
