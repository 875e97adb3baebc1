"""Layers of a network visited in the order in which they run, each after those before it are mended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ModelError
from sukashi.network import hooks


def in_order(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Tensor],
    visit: Callable[[str, Tensor], None],
    mend: Callable[[str], None],
    *,
    what: str,
) -> None:
    """visit(layer, what it reads) for each batch and then mend(layer), one layer after another as the model runs them.

    What a layer reads comes through all layers before it as they are mended. One batch goes through the network once;
    of several, all go as far as each of the layers, so that no activation is kept.

    Raises ModelError for a layer that a pass calls not exactly once.
    """
    order = [name for name in hooks.calls(model, batches[0][:1]) if name in layers]
    if len(order) != len(layers) or set(order) != set(layers):
        odd = next(name for name in layers if order.count(name) != 1)
        raise ModelError(
            f"layer {odd!r} is called {order.count(odd)} times in a pass, and only a layer that is called once can be "
            "mended: leave `repair` out"
        )
    with progress.task(what, len(order)) as shown:

        def finish(name: str) -> None:
            mend(name)
            shown.advance(note=name)

        if len(batches) == 1:

            def both(name: str, x: Tensor) -> None:
                visit(name, x)
                finish(name)

            with hooks.visited(model, {name: _bound(both, name) for name in order}):
                model(batches[0])
            return
        for name in order:
            for batch in batches:
                _as_far_as(model, name, batch, visit)
            finish(name)


def parts(x: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Batches of images: activations of one of 32 MiB take some hundred times as much."""
    found: Sequence[Tensor] = x.split(min(batch_size, max(1, 2**25 // (x[:1].numel() * x.element_size()))))
    return found


class _Reached(Exception):
    pass


def _as_far_as(model: nn.Module, name: str, batch: Tensor, visit: Callable[[str, Tensor], None]) -> None:
    def last(x: Tensor) -> None:
        visit(name, x)
        raise _Reached

    try:
        with hooks.visited(model, {name: last}):
            model(batch)
    except _Reached:
        pass


def _bound(both: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    return lambda x: both(name, x)
