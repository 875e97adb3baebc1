"""Layers of a network visited in the order in which they run, each after those before it are mended."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ModelError
from sukashi.network.branches import Branch, at_layers

_ABREAST = 2**28  # bytes of images
Visit = Callable[[str, Tensor, Tensor | None], None]


def in_order(
    model: nn.Module,
    layers: Mapping[str, Branch],
    batches: Sequence[Tensor],
    visit: Visit,
    mend: Callable[[str], None],
    *,
    what: str,
) -> None:
    """visit(layer, what it reads, what its branch is added to) for each batch and then mend(layer), one layer after
    another as the model comes to them: a layer whose branch joins a sum is visited at the sum, others, with None,
    before they run.

    What a layer reads comes through all layers before it as they are mended. Up to 256 MB of images go through the
    network once, all batches side by side: what they hold at one place of it is in memory together. More go as far as
    each layer, batch by batch.

    Raises ModelError for a layer that a pass calls not exactly once.
    """
    order: list[str] = []
    with at_layers(model, layers, lambda name, x, other: order.append(name)):
        model(batches[0][:1])
    if odd := [name for name in layers if order.count(name) != 1]:
        raise ModelError(
            f"layer {odd[0]!r} is called {order.count(odd[0])} times in a pass, and only a layer that is called once "
            "can be mended: leave `repair` out"
        )
    abreast = sum(x.numel() * x.element_size() for x in batches) <= _ABREAST
    with progress.task(what, len(order)) as shown, ExitStack() as running:
        passes = [running.enter_context(_Pass(model, layers, x, visit)) for x in batches] if abreast else []
        for name in order:
            for one in passes:
                one.resume(name)
            for x in batches if not abreast else ():
                with _Pass(model, {name: layers[name]}, x, visit) as one:
                    one.resume(name)
            mend(name)
            shown.advance(note=name)


def parts(x: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Batches of images: activations of one of 32 MiB take some hundred times as much."""
    found: Sequence[Tensor] = x.split(min(batch_size, max(1, 2**25 // (x[:1].numel() * x.element_size()))))
    return found


class _Ended(BaseException):  # no `except Exception` of a network holds it up
    pass


class _Pass:
    """The pass of a batch, in a thread that runs between `resume` and its next visit of a layer alone."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Branch], x: Tensor, visit: Visit) -> None:
        # Hooks of its own, and the same weights.
        self._model = copy.deepcopy(model, {id(of): of for of in (*model.parameters(), *model.buffers())})
        self._layers, self._x, self._visit = layers, x, visit
        self._stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._go, self._stops = threading.Semaphore(0), threading.Semaphore(0)
        self._at, self._ended = "", False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self, name: str) -> None:
        """Go on until the layer of this name was visited; what is raised there is raised here."""
        self._at = ""
        self._go.release()
        self._stops.acquire()
        if self._error is not None:
            raise self._error
        if self._at != name:
            raise ModelError(
                f"layer {name!r} runs in another order for other images, and can't be mended: leave `repair` out"
            )

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            with torch.no_grad(), torch.cuda.stream(self._stream), at_layers(self._model, self._layers, self._stop):
                self._model(self._x)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stops.release()

    def _stop(self, name: str, x: Tensor, other: Tensor | None) -> None:
        self._visit(name, x, other)
        self._at = name
        self._stops.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._ended:
            raise _Ended
