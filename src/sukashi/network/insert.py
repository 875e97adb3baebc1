"""Modules put into a network for a while: seen by hooks, traces and attributions, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from sukashi.core.errors import ModelError
from sukashi.network import hooks


class Inserted(nn.Module):
    """A module after a layer, whose child `inserted` it is; `rule` is what attributions take it for."""

    def __init__(self, module: nn.Module, rule: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.module = module
        self.rule = rule
        self.training = module.training

    def forward(self, x: Any) -> Any:
        if isinstance(x, tuple | list | dict):
            raise ModelError(
                f"a {type(x).__name__} reaches an inserted module: insert it after a layer that gives one tensor"
            )
        return self.module(x)


class _Followed:
    """What the class of a layer is mixed with while a module is inserted after it.

    The call is extended, not the forward: hooks on the layer, traces that keep it whole and cuts of its weights see the
    layer as it is, under its own name, and the module after it under another.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Hidden from the layer itself, for one that calls its children in turn would call it too.
        children = cast(nn.Module, self)._modules
        after = cast(nn.Module, children.pop("inserted"))
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            children["inserted"] = after
        return after(output)


@contextmanager
def inserted(
    model: nn.Module, layer: str, module: nn.Module, *, rule: Callable[..., Tensor] | None = None
) -> Iterator[str]:
    """Inside, what `layer` gives goes through `module` before anything else reads it; gives the name it has there.

    Layers and their weights keep their names and identity, so sites, masks and cuts by name go on working; the new one
    is `LAYER.inserted`, its parameters are `LAYER.inserted.module....`. A second one after the same layer comes behind
    the first. `sites.find` leaves it out and refuses sites whose cut it would not bear. Afterwards the model is as
    found, with what was done to its weights inside.

    `rule(module, x)` is what LRP, DeepLIFT and DL-Backtrace take the module for: it gives the output, and its gradient
    what goes back (see attributions.rules); `rules.plain` takes it for a linear map. Left out, they look into the
    module, and each layer in it needs a rule of its own.

    Raises ModelError for a layer that there is not, or is the model; in a pass for one that does not give a tensor.
    """
    host = hooks.layer(model, layer)
    if host is model:
        raise ModelError("nothing can be inserted after the whole model: give the name of one of its layers")
    name = f"{layer}.inserted"
    while isinstance(host, _Followed):
        host, name = cast(nn.Module, host.inserted), f"{name}.inserted"
    plain = type(host)
    # The same name and module: error messages tell them and torch.fx decides by them what is torch's own.
    follower = type(plain.__name__, (_Followed, plain), {"__module__": plain.__module__})
    host.add_module("inserted", Inserted(module, rule))
    host.__class__ = follower
    try:
        yield name
    finally:
        host.__class__ = plain
        del host.inserted


def uncouple(model: nn.Module) -> None:
    """Let no inserted module follow its layer any more, in place: for a traced copy, whose graph calls both."""
    for host in list(model.modules()):
        if isinstance(host, _Followed):
            host.__class__ = type(host).__bases__[1]


def remove(model: nn.Module) -> list[str]:
    """Take everything out of a copy, in place; the names of the layers that it came after."""
    hosts = {name: module for name, module in layers(model).items() if isinstance(module, _Followed)}
    uncouple(model)
    for host in hosts.values():
        del host.inserted
    return list(hosts)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by name, without what is inserted."""
    named = dict(model.named_modules())
    added = [f"{name}." for name, module in named.items() if isinstance(module, Inserted)]
    return {name: module for name, module in named.items() if not f"{name}.".startswith(tuple(added))}
