"""Rules: a canonical model computes what it did, but a gradient through it carries what a method's rules say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from sukashi.core.errors import ModelError
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Mean, active, called, owner, performs
from sukashi.network.insert import Inserted
from sukashi.network.layers import PadShortcut

# rule(module, *inputs) -> output; None where autograd's own is right.
Rule = Callable[..., Tensor] | None

# They move values, or do nothing in eval mode: a gradient, a multiplier and relevance all go back the way they came.
MOVES: Mapping[type[nn.Module], Rule] = dict.fromkeys(
    (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, StochasticDepth, nn.Flatten, nn.Unflatten, PadShortcut)
)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, Mean)
_MOVING_FUNCTIONS = {
    *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.movedim),
    *(torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.roll),
    operator.getitem,
    *("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "movedim", "contiguous", "clone"),
    *("expand", "expand_as", "chunk", "split", "unbind", "narrow", "roll"),
}


def ruled(form: fx.GraphModule, rules: Mapping[type[nn.Module], Rule], method: str) -> None:
    """Give each layer of a canonical model its rule, in place.

    Raises ModelError, naming the operation, where one that changes activations has none.
    """
    for node in form.graph.nodes:
        if not active(node) or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module":
            module = form.get_submodule(node.target)
            if isinstance(module, Inserted):
                assert module.rule is not None, "without one it is traced"
                module.forward = partial(module.rule, module.module)  # type: ignore[method-assign]
                continue
            # (A pool that gives indices too gives two tensors, a rule one.)
            alone = not getattr(module, "return_indices", False)
            found = [rule for cls, rule in rules.items() if alone and performs(module, cls)]
            what = f"{type(module).__name__} (layer {node.target!r})"
            if found and found[0] is not None:
                module.forward = partial(found[0], module)
        else:
            found = [None] if node.target in _MOVING_FUNCTIONS else []
            what = f"the operation {called(node)!r} (in {owner(node) or 'the forward of the model'!r})"
        if not found:
            raise ModelError(
                f"{method} has no rule for {what}, and nothing is approximated: use an attribution made of gradients, "
                "such as gradient_x_activation"
            )


def plain(module: nn.Module, *inputs: Any) -> Tensor:
    """What a layer computes without its rule."""
    return cast(Tensor, type(module).forward(module, *inputs))


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None, None


def carry(z: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """`value` going forward; going back, the gradient times `factor` reaches z. All three have one shape."""
    return cast(Tensor, _Carry.apply(z, value.detach(), factor.detach()))


def replaced(linear: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, the gradient of `linear` going back."""
    return linear + (value - linear).detach()


def passed(module: nn.Module, x: Tensor, *constants: Tensor) -> Tensor:
    """What a layer computes going forward; going back, what it got: relevance passes through."""
    return carry(x, plain(module, x, *constants), x.new_ones(()).expand_as(x))


def stable(z: Tensor, epsilon: float) -> Tensor:
    """z, further from zero by epsilon."""
    return z + torch.where(z < 0, -epsilon, epsilon)


def weighted(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution or linear layer with other parameters."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return cast(Tensor, cast(nn.Conv2d, module)._conv_forward(x, weight, bias))


def ones(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The seed of multipliers: 1 at each output."""
    return outputs, torch.ones_like(outputs)


def carried(
    form: fx.GraphModule, x: Tensor, sites: Sequence[Site], seed: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[dict[Site, list[Tensor]], dict[Site, list[Tensor]]]:
    """What is read at each site, and what one backward pass carries there.

    `seed(logits)` gives the outputs to start from and the values to start with.
    """
    with torch.enable_grad(), hooks.recorded(form, sites) as seen:
        outputs, start = seed(form(x.detach().requires_grad_()))
        reads = {site: list(seen[site]) for site in sites}
        flat = [tensor for tensors in reads.values() for tensor in tensors]
        found = iter(torch.autograd.grad(outputs, flat, start, materialize_grads=True))
    return (
        {site: [tensor.detach() for tensor in tensors] for site, tensors in reads.items()},
        {site: [next(found) for _ in tensors] for site, tensors in reads.items()},
    )
