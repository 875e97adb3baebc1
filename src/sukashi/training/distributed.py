"""The processes that torchrun starts: what they hear of the first, what they add up, BatchNorm over all of them."""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from sukashi.core import progress
from sukashi.core.errors import ResourceError
from sukashi.core.files import canonical

_LOOK = 0.05  # seconds from one look at whether the first process has spoken to the next


@dataclass(frozen=True)
class World:
    """This process among `size`, with its own device; `rank` 0 alone writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of the values (any shape) over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def first(self, values: Tensor) -> Tensor:
        """What the first process has, in all of them; in place."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the rows (B,): consecutive, as long as the others' or by one different."""
        return rows.tensor_split(self.size)[self.rank]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are the mean over all processes; the same object where there is one."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broadcast_buffers is about to be renamed
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


# All processes go through the same trainings, and hear the same.
_groups, _sayings = itertools.count(), itertools.count()


@cache
def _meeting() -> Store:
    """Where the processes find each other."""
    store: Store = next(iter(rendezvous("env://")))[0]
    return store


def _place(name: str) -> Store:
    """Keys of their own: torchrun's store outlives a group, and even processes that it starts again (--max-restarts).

    Else others would find there what was said before, and knock at closed doors.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt {attempt}, {name}", _meeting())


def size() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_first(value: Any) -> Any:
    """What the first process has, JSON, in all of them: the others wait for it as long as it takes.

    Raises ResourceError where the first process is gone.
    """
    if size() == 1:
        return value
    try:
        store, key = _place("said"), str(next(_sayings))
        if progress.first():
            store.set(key, canonical(value).decode())
        while not store.check([key]):  # `wait` would give up after a while, and not hear Ctrl-C
            time.sleep(_LOOK)
        return json.loads(store.get(key))
    except dist.DistError as error:
        raise ResourceError("the first process of this run is gone: give the same command again") from error


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The processes torchrun has started (its variables RANK, WORLD_SIZE, LOCAL_RANK), over NCCL on CUDA, else gloo."""
    if size() == 1:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    meeting = _place(f"group {next(_groups)}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=meeting, rank=int(os.environ["RANK"]), world_size=size())
    try:
        with _SyncedBatchNorm():
            yield World(device, dist.get_rank(), size())
    finally:
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone: gloo and NCCL have no class of their own for it."""
    said = str(error)
    return isinstance(error, dist.DistError) or any(
        words in said for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    )


def unused(error: BaseException) -> bool:
    """Whether an error says that parameters had no gradient, for which the other processes would wait."""
    return "Expected to have finished reduction" in str(error)


def starts_again() -> bool:
    """Whether torchrun has restarts left for processes that die (--max-restarts)."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < most


class _Total(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _over_all(values: Tensor) -> Tensor:
    return cast(Tensor, _Total.apply(values))


class _SyncedBatchNorm(TorchFunctionMode):
    """Inside, BatchNorm in training takes mean and variance over the images of all processes, on any device.

    torch.nn.SyncBatchNorm refuses the CPU, and takes the place of modules, of which timm has kinds of its own; this
    changes the one function they all call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm, its statistics over all processes where it is training."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input.float()
    over = [0, *range(2, x.dim())]
    count = x.new_tensor([x.numel() // x.shape[1]])
    sums = _over_all(torch.cat([x.sum(over), count]))
    n, shape = sums[-1].detach(), [1, -1, *[1] * (x.dim() - 2)]
    mean = sums[:-1] / n
    centred = x - mean.view(shape)
    var = _over_all(centred.square().sum(over)) / n  # of the centred values: a difference of squares loses digits
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * n / (n - 1), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    out = centred * scale.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(input.dtype)
