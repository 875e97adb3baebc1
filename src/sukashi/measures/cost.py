"""What a network costs to keep and to run, dense and cut: parameters, FLOPs, memory, file size, latency."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sukashi.core import progress
from sukashi.core.precision import exact
from sukashi.core.types import Mask
from sukashi.network import surgery

BATCH = 32  # images at once of what is told of memory
SPEED_BATCHES = 1, BATCH  # and of latency: what a device sees at a time, and what keeps a machine busy


def batch_of(images: Tensor, n: int = BATCH) -> Tensor:
    """So many images, those that there are again and again."""
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def sizes(model: nn.Module, example: Tensor, mask: Mask) -> dict[str, dict[str, int]]:
    """{"dense": figures, "cut": figures}: what no clock decides, the same on every run.

    As of `size`.
    """
    small = copy.deepcopy(model)
    surgery.cut(small, mask)
    return {"dense": size(model, example), "cut": size(small, example)}


def size(model: nn.Module, example: Tensor) -> dict[str, int]:
    """`parameters`, `flops` (of one image), `peak_bytes` (of a pass over `example`, of `batch_size` images) and `bytes`
    of one network."""
    return {
        "parameters": n_parameters(model),
        "flops": flops(model, example),
        "peak_bytes": peak_bytes(model, example),
        "batch_size": len(example),
        "bytes": n_bytes(model),
    }


def n_bytes(model: nn.Module) -> int:
    """How large the file of a network's weights is."""
    return len(safetensors.torch.save({name: t.clone() for name, t in model.state_dict().items()}))


def n_parameters(model: nn.Module) -> int:
    """How many numbers a model has learned; a shared parameter counts once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, example: Tensor) -> int:
    """FLOPs of one image, 2 a multiply-add, in convolutions, matrix products and attention; alike on every device.

    torch's counter passes over fused kernels that it has no rule for: of attention those of a CPU, of torch's own
    transformer layers all. Here attention runs as the matrix products it is made of.
    """
    counter, fused = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(example[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def peak_bytes(model: nn.Module, example: Tensor) -> int:
    """Most bytes alive at one time in a pass over `example`: parameters, buffers, input and every tensor made.

    On a GPU what CUDA's allocator saw; elsewhere counted tensor by tensor, without the kernels' own scratch memory.
    """
    if example.is_cuda:
        device = example.device
        torch.cuda.synchronize(device)
        elsewhere = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with exact():
            model(example)
        torch.cuda.synchronize(device)
        made = torch.cuda.max_memory_allocated(device) - elsewhere
    else:
        with torch.no_grad(), _Alive() as alive:
            model(example)
        made = alive.peak
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _held(model, example)}
    return sum(held.values()) + made


def latency(
    networks: Sequence[Callable[[Tensor], object]],
    example: Tensor,
    *,
    warmup: int = 3,
    repeats: int = 20,
    seconds: float = 20.0,
) -> list[list[float]]:
    """Milliseconds of each timed pass over `example`, one list a network, measured in turns.

    Turns (dense, cut, dense, ...) let both meet the same disturbances; the order flips from turn to turn. After
    `warmup` turns, `repeats` are timed, fewer (at least 6, see `stats.ratio`) where `seconds` have gone by.
    """
    times: list[list[float]] = [[] for _ in networks]
    with exact(), progress.task("timing", warmup + repeats) as shown:
        start = time.perf_counter()
        for turn in range(warmup + repeats):
            if turn >= warmup + 6 and time.perf_counter() - start > seconds:
                break
            for position in range(len(networks))[:: 1 if turn % 2 else -1]:
                taken = _timed(networks[position], example)
                if turn >= warmup:
                    times[position].append(taken)
            shown.advance()
    return times


class _Alive(TorchDispatchMode):
    """Bytes of the storages made inside that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known | self._seen:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, n_bytes = storage.data_ptr(), storage.nbytes()
        self._seen.add(place)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place, n_bytes)

    def _drop(self, place: int, n_bytes: int) -> None:
        self._seen.discard(place)
        self.now -= n_bytes


def _held(model: nn.Module, example: Tensor) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), example]


def _timed(network: Callable[[Tensor], object], batch: Tensor) -> float:
    """Milliseconds of one pass."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    network(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return 1e3 * (time.perf_counter() - start)
