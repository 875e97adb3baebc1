"""Rules: a canonical model computes what it did, but a gradient through it carries what a method's rules say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from sukashi.core.errors import ModelError
from sukashi.core.types import Site
from sukashi.network import hooks
from sukashi.network.canonical import Affine, line, performs
from sukashi.network.functions import Mean, Sum, active, called, owner
from sukashi.network.insert import Inserted
from sukashi.network.layers import PadShortcut

# rule(module, *inputs) -> output; None where autograd's own is right.
Rule = Callable[..., Tensor] | None

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PADS = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
_SHUFFLES = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
# They move or copy values, or do nothing in eval mode: gradients, multipliers and relevance go back the way they came.
MOVES: Mapping[type[nn.Module], Rule] = dict.fromkeys(
    (nn.Identity, *_DROPOUTS, StochasticDepth, nn.Flatten, nn.Unflatten, nn.Unfold, PadShortcut, *_PADS, *_SHUFFLES)
)
_MOVING_FUNCTIONS = {
    *(torch.flatten, torch.unflatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.broadcast_to),
    *(torch.transpose, torch.permute, torch.movedim, torch.moveaxis, torch.swapaxes, torch.swapdims, torch.t),
    *(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack),
    *(torch.chunk, torch.tensor_split, torch.split, torch.unbind, torch.narrow, torch.select, torch.index_select),
    *(torch.roll, torch.flip, torch.fliplr, torch.flipud, torch.rot90, torch.tile, torch.repeat_interleave),
    *(operator.getitem, F.pad, pad_same, F.unfold),
    *("flatten", "unflatten", "reshape", "reshape_as", "view", "view_as", "squeeze", "unsqueeze", "broadcast_to"),
    *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "contiguous", "clone"),
    *("expand", "expand_as", "repeat", "tile", "repeat_interleave", "roll", "flip", "fliplr", "flipud", "rot90"),
    *("chunk", "tensor_split", "split", "unbind", "narrow", "select", "index_select", "unfold"),
    *("to", "type_as", "float", "double"),
}
_TRANSPOSES = ("T", "mT")

# Linear, without a shift, and with weights that are not negative.
AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, Mean, Sum),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Functions of one number: of straight lines through zero, whose slope is y / x; zero at zero, so that y / x is bounded;
# and all.
STRAIGHT = (nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU)
THROUGH_ZERO = (
    *(nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, nn.Tanhshrink, nn.Softsign, nn.Softshrink),
)
ACTIVATIONS = (*STRAIGHT, *THROUGH_ZERO, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus)


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
            found = [None] if _moves(node) else []
            what = f"the operation {called(node)!r} (in {owner(node) or 'the forward of the model'!r})"
        if not found:
            raise ModelError(
                f"{method} has no rule for {what}, and nothing is approximated: use an attribution made of gradients, "
                "such as gradient_x_activation"
            )


def _moves(node: fx.Node) -> bool:
    """Whether a function or method moves or copies values."""
    return node.target in _MOVING_FUNCTIONS or (node.target is getattr and node.args[1] in _TRANSPOSES)


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


def passed(module: nn.Module, x: Tensor, *constants: Tensor | float) -> Tensor:
    """What a layer computes going forward; going back, what it got: relevance passes through."""
    value = plain(module, x, *constants)
    return carry(x.expand_as(value), value, x.new_ones(()).expand_as(value))


def stable(z: Tensor, epsilon: float) -> Tensor:
    """z, further from zero by epsilon."""
    return z + torch.where(z < 0, -epsilon, epsilon)


def parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution or linear layer, factor and shift of a BatchNorm."""
    if isinstance(module, Affine):
        return line(module)
    return cast(Tensor, module.weight), cast(Tensor | None, module.bias)


def weighted(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution, linear layer or BatchNorm with other parameters."""
    if isinstance(module, Affine):
        return x * weight if bias is None else x * weight + bias
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
