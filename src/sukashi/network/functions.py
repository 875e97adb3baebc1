"""Functions of activations become modules, for a rule is looked up by what a module computes."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sukashi.core.errors import ModelError
from sukashi.network.layers import MAKERS


class Add(nn.Module):
    """a + b; b may be a constant."""

    def forward(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b


class Mul(nn.Module):
    """a * b of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Scale(nn.Module):
    """An activation times a constant: a tensor, as LayerScale's, or a number."""

    def forward(self, x: Tensor, factor: Tensor | float) -> Tensor:
        return x * factor


class Quotient(nn.Module):
    """An activation divided by a constant."""

    def forward(self, x: Tensor, divisor: Tensor | float) -> Tensor:
        return x / divisor


class MatMul(nn.Module):
    """a @ b of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Mean(nn.Module):
    """The mean over axes."""

    def __init__(self, dim: int | list[int] | None = None, keepdim: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, self.keepdim)


class Sum(Mean):
    """The sum over axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dim, self.keepdim)


class Resize(nn.Module):
    """Interpolation to a size that may depend on the images'."""

    def __init__(self, scale_factor: Any, mode: str, **options: Any) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.mode = mode
        self.options = options

    def forward(self, x: Tensor, size: Any) -> Tensor:
        return F.interpolate(x, size, self.scale_factor, self.mode, **self.options)


def active(node: Any) -> bool:
    """Whether a node of a canonical graph holds activations: float tensors that depend on the pixels."""
    return isinstance(node, fx.Node) and bool(node.meta.get("active"))


def owner(node: fx.Node) -> str:
    """Dotted name of the module whose forward makes a call."""
    # (The keys count calls: "block@1" is the second of "block".)
    return str(next(reversed(node.meta.get("nn_module_stack", {"": ("",)}).values()), ("",))[0])


def called(node: fx.Node) -> str:
    """The name of a function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def has(root: nn.Module, name: str) -> bool:
    """Whether a dotted name is taken."""
    parent, _, own = name.rpartition(".")
    return hasattr(root.get_submodule(parent), own)


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """A module in the place of a layer, if there is one; what is called in it, or was inserted after it, stays."""
    if has(root, name):
        for child, inner in root.get_submodule(name).named_children():
            module.add_module(child, inner)
    root.set_submodule(name, module)


def modules(graph: fx.Graph, root: nn.Module) -> None:
    """Functions of activations become modules, in place; refuses what would still write into an activation."""
    _arithmetic(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not any(map(active, node.all_input_nodes)):
            continue
        if node.target in _DROPOUTS and not _drops(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        made = _module(node, root)
        if made is not None:
            module, name, args = made
            node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}
            put(root, name, module.eval())
        elif _writes(node):
            raise ModelError(
                f"{owner(node) or 'the model'} changes an activation in place with {called(node)}: whoever "
                "reads it twice would see the changed values; write it without"
            )
    for node in reversed(list(graph.nodes)):
        if node.target is torch._assert or _unread(node):
            graph.erase_node(node)


def _unread(node: fx.Node) -> bool:
    """Whether nobody reads a number or weight that is computed."""
    computed = node.op in ("get_attr", "call_function", "call_method") and not active(node)
    return computed and not node.users and not _writes(node)


def _writes(node: fx.Node) -> bool:
    method = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return method or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


# Arithmetic.

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DIFFERENCES = (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract", "subtract_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_")
_QUOTIENTS = (
    *(operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide),
    *("div", "div_", "divide", "divide_", "true_divide", "true_divide_"),
)
_NEGATIVES = (operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative", "negative_")
_POWERS = (operator.pow, torch.pow, "pow", "pow_")
_SQUARES = (torch.square, "square", "square_")
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _arithmetic(graph: fx.Graph) -> None:
    """Differences and negatives become sums and products with a number, which gives the same bits; so do squares."""
    for node in list(graph.nodes):
        if not active(node) or node.op not in ("call_function", "call_method"):
            continue
        match node.args, dict(node.kwargs):
            case (x,), {**rest} if node.target in _NEGATIVES and not rest:
                _becomes(node, operator.mul, x, -1)
            case (x,), {**rest} if node.target in _SQUARES and not rest:
                _becomes(node, operator.mul, x, x)
            case (x, 2), {**rest} if node.target in _POWERS and not rest:
                _becomes(node, operator.mul, x, x)
            case (a, b), {**rest} if node.target in _DIFFERENCES and not rest:
                _becomes(node, operator.add, a, _times(node, b, -1))
            case (a, b), {"alpha": int() | float() as alpha, **rest} if not rest:
                if node.target in _DIFFERENCES or node.target in _SUMS:
                    _becomes(node, operator.add, a, _times(node, b, alpha if node.target in _SUMS else -alpha))


def _becomes(node: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}


def _times(node: fx.Node, value: Any, factor: float) -> Any:
    """A number, or a node of its own before `node`, that is `value` times a factor."""
    if not isinstance(value, fx.Node):
        return value * factor
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, (value, factor))
    product.meta = {**node.meta, "active": active(value)}
    return product


def _pair(node: fx.Node) -> tuple[nn.Module, tuple[Any, Any]] | None:
    """The module for a sum, product or quotient, and what it reads: the activation first."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(value, fx.Node | int | float) for value in node.args):
        return None
    pair, (a, b) = _PAIRS[node.target], node.args
    if pair is not Quotient and not active(a):
        a, b = b, a
    made = _WITH_CONSTANT.get(pair) if not active(b) else None if pair is Quotient else pair
    return None if made is None or not active(a) else (made(), (a, b))


_PAIRS: Mapping[Any, type[nn.Module]] = {
    **dict.fromkeys(_SUMS, Add),
    **dict.fromkeys(_PRODUCTS, Mul),
    **dict.fromkeys(_QUOTIENTS, Quotient),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), MatMul),
}
_WITH_CONSTANT: Mapping[type[nn.Module], type[nn.Module]] = {Add: Add, Mul: Scale, Quotient: Quotient}


# Functions of one activation.


def _module(node: fx.Node, root: nn.Module) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    """The module that does what a function or method does, a name for it and its inputs; None for what has none."""
    if not node.args:  # all by keyword: some functions of torch take that
        return None
    if node.target in LAYERS:
        return _layer(node, root)
    if node.target is F.interpolate:
        return _resize(node, root)
    if node.target in _PAIRS:
        pair = _pair(node)
        return None if pair is None else (pair[0], _vacant(root, node, pair[0]), pair[1])
    first, *rest = node.args
    make = _FUNCTIONS.get(node.target)
    if make is None or node.all_input_nodes != [first]:
        return None
    try:
        made = make(*rest, **node.kwargs)
    except TypeError:  # an argument the module does not have
        return None
    if made is None:
        return None
    if getattr(made, "inplace", False):
        made.inplace = False  # type: ignore[assignment]
    return made, _vacant(root, node, made), (first,)


def _clamp(min: float | None = None, max: float | None = None) -> nn.Module | None:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if low == 0 and high == math.inf:
        return nn.ReLU()
    return nn.Hardtanh(low, high) if low < high else None


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module | None:
    """(The module has its last two arguments the other way round; indices make a pair of the output.)"""
    return None if return_indices else nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)


def _rrelu(
    lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> nn.Module | None:
    return None if training else nn.RReLU(lower, upper)


# Functions and methods of one activation, with the arguments that follow it -> the module that does the same.
_FUNCTIONS: Mapping[Any, Callable[..., nn.Module | None]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"), _clamp),
    **dict.fromkeys((torch.clamp_min, "clamp_min", "clamp_min_"), lambda min: _clamp(min)),
    **dict.fromkeys((torch.clamp_max, "clamp_max", "clamp_max_"), lambda max: _clamp(None, max)),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: _clamp(min_val, max_val),
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.rrelu: _rrelu,
    F.elu: nn.ELU,
    **dict.fromkeys((F.celu, torch.celu), nn.CELU),
    **dict.fromkeys((F.selu, torch.selu), nn.SELU),
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid),
    F.logsigmoid: nn.LogSigmoid,
    F.softplus: nn.Softplus,
    F.softsign: nn.Softsign,
    F.softshrink: nn.Softshrink,
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), nn.Tanh),
    F.tanhshrink: nn.Tanhshrink,
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), lambda dim: nn.Softmax(dim)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    **dict.fromkeys((torch.mean, "mean"), Mean),
    **dict.fromkeys((torch.sum, "sum"), Sum),
    F.pixel_shuffle: nn.PixelShuffle,
    F.pixel_unshuffle: nn.PixelUnshuffle,
    **dict.fromkeys((F.channel_shuffle, torch.channel_shuffle), nn.ChannelShuffle),
}
# Functions that drop values where they are told to train, and what they do untold.
_DROPOUTS: Mapping[Any, bool] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), True),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), False),
}


def _drops(node: fx.Node) -> Any:
    return node.kwargs.get("training", node.args[2] if len(node.args) > 2 else _DROPOUTS[node.target])


def _resize(node: fx.Node, root: nn.Module) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, size = given.pop("input"), given.pop("size", None)
    if any(isinstance(value, fx.Node) for value in given.values()):
        return None
    made = Resize(given.pop("scale_factor", None), given.pop("mode", "nearest"), **given)
    return made, _vacant(root, node, made), (x, size)


# Functions of an activation and of parameters of the model.


def _linear(tensors: Mapping[str, Tensor]) -> nn.Module:
    n_out, n_in = tensors["weight"].shape
    return nn.Linear(n_in, n_out, bias=False, device="meta")


def _convolution(cls: type[nn.Module], tensors: Mapping[str, Tensor], groups: int = 1, **options: Any) -> nn.Module:
    n_out, n_in, *kernel = tensors["weight"].shape
    return cls(groups * n_in, n_out, tuple(kernel), groups=groups, bias=False, device="meta", **options)


def _batch_norm(
    tensors: Mapping[str, Tensor], training: bool = False, momentum: float = 0.1, eps: float = 1e-5
) -> nn.Module | None:
    if training or "running_mean" not in tensors:
        return None
    return nn.BatchNorm2d(len(tensors["running_mean"]), eps, affine=False, device="meta")


def _layer_norm(tensors: Mapping[str, Tensor], normalized_shape: Any, eps: float = 1e-5) -> nn.Module:
    return nn.LayerNorm(normalized_shape, eps, elementwise_affine=False)


def _group_norm(tensors: Mapping[str, Tensor], num_groups: int, eps: float = 1e-5) -> nn.Module | None:
    # How many channels there are, weights alone tell.
    return nn.GroupNorm(num_groups, len(tensors["weight"]), eps, affine=False) if "weight" in tensors else None


def _prelu(tensors: Mapping[str, Tensor]) -> nn.Module:
    return nn.PReLU(len(tensors["weight"]), device="meta")


_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# The arguments of a function, and what makes a module of those that are no tensors.
LAYERS: Mapping[Any, tuple[tuple[str, ...], Callable[..., nn.Module | None]]] = {
    F.linear: (("input", "weight", "bias"), _linear),
    F.conv1d: (_CONVOLVED, lambda tensors, **options: _convolution(nn.Conv1d, tensors, **options)),
    F.conv2d: (_CONVOLVED, lambda tensors, **options: _convolution(nn.Conv2d, tensors, **options)),
    F.conv3d: (_CONVOLVED, lambda tensors, **options: _convolution(nn.Conv3d, tensors, **options)),
    F.batch_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    **dict.fromkeys((F.prelu, torch.prelu), (("input", "weight"), _prelu)),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def layer(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The layer that a function with parameters of the model is, be they computed from others (standardised weights).

    None for any other call, where the images have a part in them, and for parameters of another layer.
    """
    if node.target not in LAYERS:
        return None
    names, make = LAYERS[node.target]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    given.pop("input")
    sources = {key: source for key in _TENSORS if (source := given.pop(key, None)) is not None}
    if any(isinstance(value, fx.Node) for value in given.values()):
        return None
    try:
        tensors = {key: _computed(source, root, owner(node)) for key, source in sources.items()}
    except LookupError:
        return None
    made = make(tensors, **given)
    if made is None:
        return None
    for key, tensor in tensors.items():
        shared = isinstance(tensor, nn.Parameter) or key in made._buffers
        setattr(made, key, tensor if shared else nn.Parameter(tensor, requires_grad=False))
    return made


@torch.no_grad()
def _computed(node: fx.Node, root: nn.Module, caller: str) -> Any:
    """The value of a node that is made of parameters of the caller, or of no layer that could be cut.

    (What two layers read would be cut in one of them.) Raises LookupError for any other node.
    """
    if node.op == "get_attr":
        holder = root.get_submodule(str(node.target).rpartition(".")[0])
        layers = (*MAKERS, nn.modules.batchnorm._BatchNorm)
        if isinstance(holder, layers) and holder is not root.get_submodule(caller):
            raise LookupError
        return operator.attrgetter(str(node.target))(root)
    if node.op not in ("call_function", "call_method") or _writes(node):
        raise LookupError
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: _computed(other, root, caller))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def _layer(node: fx.Node, root: nn.Module) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    """Such a layer, under the name of the layer that calls it where that is one of its kind."""
    x = node.args[0]
    made = layer(node, root) if active(x) else None
    if made is None:
        return None
    name = owner(node)
    taken = any(other.op == "call_module" and other.target == name for other in node.graph.nodes)
    own = isinstance(root.get_submodule(name), type(made)) and not taken
    return made, name if own else _vacant(root, node, made), (x,)


# Names.


def _vacant(root: nn.Module, node: fx.Node, module: nn.Module) -> str:
    """A name for a function made a module: its caller's, and what it is; with _1, _2, ... where that is taken."""
    name = f"{owner(node)}.{type(module).__name__.lower()}".lstrip(".")
    return next(f"{name}{end}" for end in _endings() if not has(root, f"{name}{end}"))


def _endings() -> Iterator[str]:
    yield ""
    for number in itertools.count(1):
        yield f"_{number}"
