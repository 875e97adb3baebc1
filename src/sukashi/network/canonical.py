"""A model in canonical form: every operation that needs a rule is a module of its own, called once."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.padding import pad_same
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from sukashi.core.errors import ModelError, SukashiError, brief
from sukashi.core.precision import exact
from sukashi.core.types import Site
from sukashi.network import functions, insert
from sukashi.network.functions import active, has, put
from sukashi.network.layers import MAKERS, AttentionCore, FeatureMap, PadShortcut

Layer = TypeVar("Layer", bound=nn.Module)

# Of the largest logit; folding BatchNorm rounds anew.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Affine(nn.BatchNorm1d):
    """A BatchNorm of features (B, C) that follows no linear layer: in eval mode a factor and a shift a feature."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def canonical(model: nn.Module, x: Tensor, sites: Sequence[Site] = ()) -> fx.GraphModule:
    """The same function as a private torch.fx module without in-place operations, in eval mode and frozen.

    A layer called once keeps its name, so that sites and hooks by name work; one called n times becomes n layers, named
    `name_0` and so on. Functions become the modules that do the same (activations, arithmetic, pooling, layers with
    weights of the model), named after the module that calls them; a difference becomes a sum with -1 times the second.
    A BatchNorm, frozen and synchronised ones too, is folded into the convolution or linear layer before it and leaves
    an Identity; one that follows none becomes a 1x1 depthwise convolution, or of features (B, C) an `Affine`. A layer
    of a class of its own that is a plain one and more (timm's norm with an activation, convolutions that pad or
    standardise their weights) is taken apart. What merely moves values stays as it is, and so does an operation unknown
    here: a method that needs a rule for it refuses it by name. Weights are shared with the model wherever they are
    neither folded nor computed, so they take no second memory.

    A block is not called any more, only the layers in it. Where one of `sites` is what a block reads or writes, an
    Identity of the block's name stands there, so that hooks find it; a BatchNorm behind a layer whose own output is one
    of them is not folded into it.

    `x` (B, C, H, W) is what the form is checked on: two of its images must give the model's own output, within 1e-10 of
    the largest logit in float64 and 1e-4 in float32. Raises ModelError where they do not, and where the model cannot be
    traced, changes activations in place in a way unknown here, or gives no single tensor.
    """
    root = share(model).eval()
    for module in root.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        _thaw(module)
    name = type(model).__name__
    places = [(member.module, member.side) for site in sites for member in site.members]
    tracer = Tracer(places, [module for module in root.modules() if _within(module) is not None])
    try:
        graph = tracer.trace(root)
    except SukashiError:
        raise
    except Exception as error:
        raise ModelError(
            f"torch.fx cannot trace this {name} ({brief(error)}): rewrite branches on data in its "
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
        functions.modules(graph, root)
        _fold(graph, root, {site.layer for site in sites if not site.consumers})
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
        raise ModelError(
            f"this {type(model).__name__} fails on images of shape {tuple(x.shape[1:])} ({brief(error)}): give "
            "images of the size and channels it was made for"
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
LEAVES = (AttentionCore, PadShortcut, FeatureMap, *MAKERS, _BatchNorm)


class Tracer(fx.Tracer):
    """Layers with a rule stay whole, and the images are the only input: other arguments keep their defaults.

    Those in `compounds` do not: what is in them has rules. Of `places`, (layer, side), those at a block become a call
    of the block's name, which must do nothing: `marked`.
    """

    def __init__(self, places: Collection[tuple[str, str]] = (), compounds: Collection[nn.Module] = ()) -> None:
        super().__init__(autowrap_functions=(pad_same,))
        self.compounds = frozenset(compounds)
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
        if m in self.compounds:
            return False
        return isinstance(m, (*LEAVES, StochasticDepth)) or super().is_leaf_module(m, module_qualified_name)


class _Activity(fx.Interpreter):
    """Notes, in one pass, which nodes hold activations: float tensors that depend on the pixels, not on the shape.

    And how many axes these have.
    """

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        parts = value if isinstance(value, tuple | list) else (value,)
        holds = any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
        n.meta["active"] = holds and (n.op == "placeholder" or any(map(active, _valued(n))))
        n.meta["axes"] = value.dim() if isinstance(value, Tensor) else 0
        return value


# Of the first that they read these take the shape or type, and of all but the first these do.
_LIKE = (torch.zeros_like, torch.ones_like, torch.full_like, "new_zeros", "new_ones", "new_full", "new_tensor")
_AS = ("to", "type_as", "expand_as", "view_as", "reshape_as")


def _valued(node: fx.Node) -> list[fx.Node]:
    """What a node takes values from."""
    if node.target in _LIKE:
        return node.all_input_nodes[1:]
    return node.all_input_nodes[:1] if node.target in _AS else node.all_input_nodes


def _single(graph: fx.Graph, root: nn.Module) -> None:
    """One module a call: a layer called n times becomes n layers with shared weights."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for name, n_calls in calls.items():
        if n_calls == 1:
            continue
        nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
        for number, node in enumerate(nodes):
            node.target = f"{name}_{number}"
            while has(root, node.target):
                node.target += "_"
            root.set_submodule(node.target, share(root.get_submodule(name)))


def _fold(graph: fx.Graph, root: nn.Module, kept: Collection[str]) -> None:
    """BatchNorms into the layers before them, but for layers whose own output is asked for."""
    for node in graph.nodes:
        norm = _layer(root, node, _BatchNorm, nn.SyncBatchNorm)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        before = node.args[0]
        while _layer(root, before, nn.Identity) is not None and len(before.users) == 1:
            before = before.args[0]
        layer = _layer(root, before, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        alone, n_axes = len(before.users) == 1 and before.target not in kept, node.meta["axes"]
        if alone and isinstance(layer, nn.modules.conv._ConvNd):
            put(root, before.target, fuse_conv_bn_eval(layer, norm))
            put(root, node.target, nn.Identity())
        elif alone and isinstance(layer, nn.Linear) and n_axes == 2:
            put(root, before.target, fuse_linear_bn_eval(layer, norm))
            put(root, node.target, nn.Identity())
        elif n_axes == 2:
            norm.__class__ = Affine
        else:
            put(root, node.target, _diagonal(norm, n_axes))
    root.requires_grad_(False)


def _layer(root: nn.Module, node: fx.Node, *classes: type[nn.Module]) -> nn.Module | None:
    """The layer that a node calls, if it does what one of the classes does."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if module is not None and any(performs(module, cls) for cls in classes) else None


def line(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a BatchNorm is in eval mode: a factor and a shift a channel, each (C,)."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return factor, (0 if norm.bias is None else norm.bias) - mean * factor


def _diagonal(norm: _BatchNorm, n_axes: int) -> nn.Module:
    """A BatchNorm of maps as a depthwise convolution of one pixel."""
    factor, shift = line(norm)
    n = norm.num_features
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[n_axes]
    conv = kind(n, n, 1, groups=n, device=shift.device, dtype=shift.dtype)
    conv.weight.data = factor.view_as(conv.weight)
    cast(Tensor, conv.bias).data = shift
    return conv.eval()


def is_compound(module: nn.Module) -> bool:
    """Whether a layer is a plain one and more, as timm's convolution that pads or norm that ends in an activation.

    So is each of a class of one's own that gives its weights, once, to the function of torch's that its kind is.
    """
    plain = _within(module)
    return plain is not None and plain.weight is module.weight


def _within(module: nn.Module) -> nn.Module | None:
    """The one plain layer, of its own kind, in a layer of a class of its own; its weights may be computed."""
    if not isinstance(module, (*MAKERS, _BatchNorm)):
        return None
    if type(module).forward.__module__.startswith("torch."):
        return None
    try:
        nodes = [node for node in Tracer().trace(module).nodes if node.target in functions.LAYERS]
        found = [functions.layer(node, module) for node in nodes if _of_images(node.args[0])]
    except Exception:
        return None
    return found[0] if len(found) == 1 and isinstance(module, type(found[0])) else None


def _of_images(node: Any) -> bool:
    return isinstance(node, fx.Node) and (node.op == "placeholder" or any(map(_of_images, node.all_input_nodes)))


# Norms whose statistics are never those of the batch in eval mode, and what they are then.
_THAWED: Mapping[type[nn.Module], type[nn.Module]] = {
    FrozenBatchNorm2d: nn.BatchNorm2d,
    FrozenBatchNormAct2d: BatchNormAct2d,
    SyncBatchNormAct: BatchNormAct2d,
}


def _thaw(module: nn.Module) -> None:
    """Make a frozen or synchronised norm the plain one that computes the same, in place."""
    plain = _THAWED.get(type(module))
    if plain is None:
        return
    module.__class__ = plain
    norm = cast(nn.BatchNorm2d, module)
    norm.num_features, norm.momentum, norm.affine, norm.track_running_stats = len(norm.weight), 0.1, True, True
    norm.num_batches_tracked = getattr(norm, "num_batches_tracked", None)
    for name in ("drop", "act") if plain is BatchNormAct2d else ():
        if name not in norm._modules:
            norm.add_module(name, nn.Identity())
