"""A model in canonical form: every operation that needs a rule is a module of its own, called once."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from sukashi.core.errors import ModelError, SukashiError
from sukashi.core.precision import exact
from sukashi.core.types import Site
from sukashi.network import insert
from sukashi.network.layers import AttentionCore, PadShortcut

Layer = TypeVar("Layer", bound=nn.Module)

# Of the largest logit; folding BatchNorm rounds anew.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Add(nn.Module):
    """a + b; b may be a constant."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Mul(nn.Module):
    """a * b of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Scale(nn.Module):
    """An activation times a constant (LayerScale)."""

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor


class MatMul(nn.Module):
    """a @ b of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Mean(nn.Module):
    """The mean over axes."""

    def __init__(self, dim: int | list[int] | None, keepdim: bool) -> None:
        super().__init__()
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, self.keepdim)


def canonical(model: nn.Module, x: Tensor, sites: Sequence[Site] = ()) -> fx.GraphModule:
    """The same function as a private torch.fx module without in-place operations, in eval mode and frozen.

    A layer called once keeps its name, so that sites and hooks by name work; one called n times becomes n layers, named
    `name_0` and so on. Activations, sums, products, means, pooling and LayerNorm written as functions become modules,
    named after the module that calls them. A BatchNorm2d is folded into the convolution before it and leaves an
    Identity; one that follows none becomes a 1x1 depthwise convolution. What merely moves values stays as it is, and so
    does an operation unknown here: a method that needs a rule for it refuses it by name. Weights are shared with the
    model wherever they are not folded, so they take no second memory.

    A block is not called any more, only the layers in it. Where one of `sites` is what a block reads or writes, an
    Identity of the block's name stands there, so that hooks find it.

    `x` (B, C, H, W) is what the form is checked on: two of its images must give the model's own output, within 1e-10 of
    the largest logit in float64 and 1e-4 in float32. Raises ModelError where they do not, and where the model cannot be
    traced, changes activations in place in a way unknown here, or gives no single tensor.
    """
    root = share(model).eval()
    for module in root.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    name = type(model).__name__
    tracer = Tracer([(member.module, member.side) for site in sites for member in site.members])
    try:
        graph = tracer.trace(root)
    except SukashiError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"torch.fx cannot trace this {name} ({type(error).__name__}: {reason}): rewrite branches on data in its "
            "forward(), or use a method that needs no canonical form"
        ) from error
    insert.uncouple(root)
    for block in tracer.marked:
        block.__class__ = nn.Identity
    for node in graph.nodes:
        if node.op == "call_module" and not node.args:
            raise ModelError(f"layer {node.target!r} is called by keyword: call it as layer(x)")
    with exact():
        # Copies, for the model may write into what it is given.
        with evaluating(model):
            expected = answer(model, x[:2].clone())
        if not isinstance(expected, Tensor):
            raise ModelError(f"{name} gives a {type(expected).__name__}: it must give one tensor of logits; wrap it")
        _Activity(fx.GraphModule(root, graph)).run(x[:1].clone())
        _single(graph, root)
        _modules(graph, root)
        _fold(graph, root)
        form = fx.GraphModule(root, graph, class_name=name)
        form.recompile()
        off = (form(x[:2]) - expected).abs().max()
    if not off <= _TOLERANCE.get(x.dtype, 1e-2) * expected.abs().max():
        raise ModelError(
            f"the canonical form of this {name} gives other logits (off by {float(off):.1e}): an activation that is "
            "changed in place and read again, or a branch on data, is the usual reason; rewrite it"
        )
    return form


def answer(model: nn.Module, x: Tensor) -> Any:
    """What a model makes of images; ModelError where it fails on them, as a ViT does on images of another size."""
    try:
        return model(x)
    except (SukashiError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"this {type(model).__name__} fails on images of shape {tuple(x.shape[1:])} ({type(error).__name__}: "
            f"{reason}): give images of the size and channels it was made for"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in eval mode; then each of its layers is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def performs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module computes what its ancestor `cls` does: a subclass that keeps its forward does."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def share(module: Layer) -> Layer:
    """A copy whose parameters are frozen views of the original's."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


# Subclasses too, wherever they are defined: their weights are what a cut edits.
LEAVES = (
    AttentionCore,
    PadShortcut,
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
)


class Tracer(fx.Tracer):
    """Layers with a rule stay whole, and the images are the only input: other arguments keep their defaults.

    Of `places`, (layer, side), those at a block become a call of the block's name, which must do nothing: `marked`.
    """

    def __init__(self, places: Collection[tuple[str, str]] = ()) -> None:
        super().__init__()
        self.places = frozenset(places)
        self.marked: set[nn.Module] = set()

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        sides = {side for side in ("in", "out") if (name, side) in self.places}
        if not sides or self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if len(sides) == 2:
            raise ModelError(f"both what block {name!r} reads and what it writes are asked for: take them one by one")
        self.marked.add(m)
        if "in" in sides:
            args = (self.create_proxy("call_module", name, args[:1], {}), *args[1:])
        out = super().call_module(m, forward, args, kwargs)
        return self.create_proxy("call_module", name, (out,), {}) if "out" in sides else out

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for proxy in reversed(args[2:]):
            self.graph.erase_node(proxy.node)
        return fn, args[:2]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, insert.Inserted):
            return m.rule is not None
        return isinstance(m, (*LEAVES, StochasticDepth)) or super().is_leaf_module(m, module_qualified_name)


class _Activity(fx.Interpreter):
    """Notes, in one pass, which nodes hold activations: float tensors that depend on the pixels, not on the shape."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        parts = value if isinstance(value, tuple | list) else (value,)
        holds = any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
        n.meta["active"] = holds and (n.op == "placeholder" or any(map(active, n.all_input_nodes)))
        return value


def active(node: Any) -> bool:
    """Whether a node of a canonical graph holds activations."""
    return isinstance(node, fx.Node) and bool(node.meta.get("active"))


# Functions and methods of one activation, with the arguments that follow it -> the module that does the same.
_FUNCTIONS: Mapping[Any, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    "sigmoid_": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    F.softmax: lambda dim: nn.Softmax(dim),
    torch.softmax: lambda dim: nn.Softmax(dim),
    "softmax": lambda dim: nn.Softmax(dim),
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.mean: lambda dim=None, keepdim=False: Mean(dim, keepdim),
    "mean": lambda dim=None, keepdim=False: Mean(dim, keepdim),
}
_PAIRS: Mapping[Any, type[nn.Module]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), Add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), Mul),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), MatMul),
}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _modules(graph: fx.Graph, root: nn.Module) -> None:
    """Functions of activations become modules; refuses what would still write into an activation."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not any(map(active, node.all_input_nodes)):
            continue
        if node.target is F.dropout and not node.kwargs.get("training", (*node.args, 0.5, True)[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        made = _module(node, root)
        if made is not None:
            module, name, args = made
            node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}
            _put(root, name, module.eval())
        elif _writes(node):
            raise ModelError(
                f"{owner(node) or 'the model'} changes an activation in place with {called(node)}: whoever "
                "reads it twice would see the changed values; write it without"
            )
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _module(node: fx.Node, root: nn.Module) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    """The module that does what a function or method does, a name for it and its inputs; None for what has none."""
    if not node.args:  # all by keyword: some functions of torch take that
        return None
    first, *rest = node.args
    if node.target is F.layer_norm:
        return _layer_norm(node, root)
    if node.target in _PAIRS:
        if node.kwargs or len(node.args) != 2 or not isinstance(rest[0], fx.Node) or not isinstance(first, fx.Node):
            return None
        a, b = (first, rest[0]) if active(first) else (rest[0], first)
        pair = _PAIRS[node.target]
        if not active(b) and pair is MatMul:
            return None
        made = Scale() if pair is Mul and not active(b) else pair()
        return made, _vacant(root, node, made), (a, b)
    make = _FUNCTIONS.get(node.target)
    if make is None or any(isinstance(argument, fx.Node) for argument in (*rest, *node.kwargs.values())):
        return None
    try:
        made = make(*rest, **node.kwargs)
    except TypeError:  # an argument the module does not have
        return None
    return made, _vacant(root, node, made), (first,)


def _layer_norm(node: fx.Node, root: nn.Module) -> tuple[nn.Module, str, tuple[Any, ...]] | None:
    """F.layer_norm with parameters of the model, under the name of the layer that calls it (timm's LayerNorm does)."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if isinstance(given["normalized_shape"], fx.Node):
        return None
    norm = nn.LayerNorm(given["normalized_shape"], given.get("eps", 1e-5), elementwise_affine=False)
    for name in ("weight", "bias"):
        source = given.get(name)
        if isinstance(source, fx.Node):
            if source.op != "get_attr":
                return None
            setattr(norm, name, operator.attrgetter(str(source.target))(root))
    name = owner(node)
    taken = any(other.op == "call_module" and other.target == name for other in node.graph.nodes)
    own = isinstance(root.get_submodule(name), nn.LayerNorm) and not taken
    return norm, name if own else _vacant(root, node, norm), (given["input"],)


def _vacant(root: nn.Module, node: fx.Node, module: nn.Module) -> str:
    """A name for a function made a module: its caller's, and what it is; with _1, _2, ... where that is taken."""
    name = f"{owner(node)}.{type(module).__name__.lower()}".lstrip(".")
    return next(f"{name}{end}" for end in _endings() if not _has(root, f"{name}{end}"))


def _endings() -> Iterator[str]:
    yield ""
    for number in itertools.count(1):
        yield f"_{number}"


def _has(root: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    return hasattr(root.get_submodule(parent), own)


def _single(graph: fx.Graph, root: nn.Module) -> None:
    """One module a call: a layer called n times becomes n layers with shared weights."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for name, n_calls in calls.items():
        if n_calls == 1:
            continue
        nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
        for number, node in enumerate(nodes):
            node.target = f"{name}_{number}"
            while _has(root, node.target):
                node.target += "_"
            root.set_submodule(node.target, share(root.get_submodule(name)))


def _fold(graph: fx.Graph, root: nn.Module) -> None:
    for node in graph.nodes:
        norm = _layer(root, node, nn.BatchNorm2d)
        if norm is None or norm.running_mean is None:
            continue
        before = node.args[0]
        while _layer(root, before, nn.Identity) is not None and len(before.users) == 1:
            before = before.args[0]
        conv = _layer(root, before, nn.Conv2d)
        if conv is not None and len(before.users) == 1:
            _put(root, before.target, fuse_conv_bn_eval(conv, norm))
            _put(root, node.target, nn.Identity())
        else:
            _put(root, node.target, _diagonal(norm))
    root.requires_grad_(False)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """A module in the place of a layer, if there is one; what is inserted after that stays."""
    if _has(root, name):
        after = root.get_submodule(name)._modules.get("inserted")
        if after is not None:
            module.add_module("inserted", after)
    root.set_submodule(name, module)


def _layer(root: nn.Module, node: fx.Node, cls: type[Layer]) -> Layer | None:
    """The layer that a node calls, if it is one of `cls`."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return cast(Layer, module) if module is not None and performs(module, cls) else None


def _diagonal(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A BatchNorm in eval mode as what it is: one factor and one shift a channel."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    n = norm.num_features
    conv = nn.Conv2d(n, n, 1, groups=n, device=mean.device, dtype=mean.dtype)
    factor = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    conv.weight.data = factor.view(n, 1, 1, 1)
    cast(Tensor, conv.bias).data = (0 if norm.bias is None else norm.bias) - mean * factor
    return conv.eval()


def owner(node: fx.Node) -> str:
    """Dotted name of the module whose forward makes a call."""
    return next(reversed(node.meta.get("nn_module_stack", {"": ""})), "")


def called(node: fx.Node) -> str:
    """The name of a function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _writes(node: fx.Node) -> bool:
    method = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return method or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
