"""Labels that move with values through one forward pass.

Each output of a convolution or linear layer is a label of its own. Beside every tensor of the pass goes another that
says which label lies where: what moves values moves labels in the same way, what computes a value from several ties
their labels, and a layer that reads labels owns them at the positions where it reads. What is unknown here fixes its
labels. `coupling` makes units of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from sukashi.network import surgery
from sukashi.network.layers import AttentionCore

Side = Literal["in", "out"]
# A tensor that broadcasts to what it speaks of: > 0 a label, 0 padding, < 0 a source that no cut changes; or such a
# source alone.
Labels = Tensor | int

_SAME = {"clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy", "to", "dropout", "native_dropout"}
_SPLIT = {"split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"}
_MOVED = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"),
    *("permute", "transpose", "t", "numpy_T", "movedim"),
    *("expand", "slice", "select", "unsqueeze", "squeeze", "cat", "stack", "roll", "flip", "index_select", "narrow"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "repeat", "constant_pad_nd"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "im2col", "unfold", "pad"),
    *("index", "gather", "diagonal"),
}
# They mix places of a map, each channel for itself: {name: axes of the map}.
_LOCAL = {
    **{
        f"{kind}_pool{n}d": n
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "_adaptive_avg")
        for n in (1, 2, 3)
    },
    **{"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "mkldnn_max_pool2d": 2},
    **{f"upsample_{how}2d": 2 for how in ("nearest", "_nearest_exact", "bilinear", "bicubic")},
    **{f"_upsample_{how}2d_aa": 2 for how in ("bilinear", "bicubic")},
    **{"_upsample_nearest_exact2d": 2, "upsample_linear1d": 1, "upsample_nearest1d": 1, "grid_sampler_2d": 2},
}
# What is elementwise and torch does not say so.
_POINTWISE = {"hardswish", "prelu", "_prelu_kernel", "log_sigmoid_forward", "rsub", "copy", "rrelu_with_noise"}
_REDUCED = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"),
    *("logsumexp", "prod", "argmax", "argmin", "median", "nansum"),
}
_ALONG = {"softmax", "_safe_softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk"}
_PRODUCTS = {
    *("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "mv", "dot"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_attention_math", "_fused_sdp_choice"),
}


@dataclass
class _Call:
    """One operation of the pass, with the tensors that it reads and makes."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    read: list[Tensor]
    made: list[Tensor]

    def argument(self, name: str) -> Any:
        """What the operation is given by a name, or its default."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                given = self.args[position] if position < len(self.args) else argument.default_value
                return self.kwargs.get(name, given)
        return None


@dataclass
class Pass(TorchDispatchMode):
    """The labels of one pass, and what it says of them."""

    model: nn.Module
    calls: list[str] = field(default_factory=list)
    n_labels: int = 0
    ties: list[Tensor] = field(default_factory=list)
    """(2, n) each: labels that are one unit."""
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    """Labels that can't be cut, and why; the first word holds."""
    together: list[tuple[int, str]] = field(default_factory=list)
    """A label that was tied to all others on its axis, and by what."""
    sources: list[str] = field(default_factory=list)
    """What a label < 0 stands for: number -1 the first."""
    places: dict[tuple[str, Side], Tensor] = field(default_factory=dict)
    """The label of each position on a layer's side."""
    others: dict[str, str] = field(default_factory=dict)
    """Layers that have no units of their own, and why."""

    def __post_init__(self) -> None:
        super().__init__()
        self._labels = WeakTensorKeyDictionary()
        self._parameters = {id(p): name for name, p in self.model.named_parameters()}
        self._path: list[str] = []
        self._layer = ""  # the layer inside whose pass nothing is followed
        for name, module in self.model.named_modules():
            self._share_out(name, module)

    def _share_out(self, name: str, module: nn.Module) -> None:
        """Give the heads of an attention labels, where its own parameters and buffers have a place for each."""
        if surgery.heads(module) < 2:
            return
        self.places[name, "out"] = at = self._fresh(surgery.heads(module))
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            axis = surgery.head_axis(module, tensor)
            if axis is not None:
                self._labels[tensor] = _on(axis, at, tensor.dim())

    # What the labels of tensors are.

    def source(self, what: str) -> int:
        """The number of what no cut changes."""
        if what not in self.sources:
            self.sources.append(what)
        return -1 - self.sources.index(what)

    def labels(self, tensor: Tensor) -> Labels:
        """What lies where in a tensor."""
        known = self._labels.get(tensor)
        if known is not None:
            return cast(Labels, known)
        name = self._parameters.get(id(tensor))
        if name is None:
            return self.source("its units meet values that no layer makes")
        return self.source(
            f"its units meet the bare parameter {name!r} (in a transformer: the residual stream, whose token width is "
            "fixed)"
        )

    def label(self, tensor: Tensor, labels: Labels) -> None:
        """Say what lies where in a tensor."""
        self._labels[tensor] = labels if isinstance(labels, int) else _compact(labels)

    def full(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor in its shape."""
        labels = self.labels(tensor)
        if isinstance(labels, int):
            labels = torch.full((1,) * tensor.dim(), float(labels))
        return labels.expand(tensor.shape)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Make labels at the same places one unit; a label at the place of a fixed source is fixed."""
        pairs = torch.stack([t.reshape(-1) for t in torch.broadcast_tensors(one, other)])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != 0).all(0)]
        if not pairs.numel():
            return
        pairs = pairs.unique(dim=1)
        alive = (pairs > 0).all(0)
        self.ties.append(pairs[:, alive].long())
        for low, high in zip(*(pairs[:, ~alive].sort(0).values.long().tolist()), strict=True):
            if high > 0:
                self.fixed.append((torch.tensor([high]), self.sources[-1 - low]))

    def fix(self, labels: Labels, reason: str) -> None:
        """Say why labels can't be cut."""
        if isinstance(labels, Tensor):
            self.fixed.append((labels[labels > 0].unique().long(), reason))

    def where(self) -> str:
        """The module that runs now, for people."""
        path = self._path[-1] if self._path else ""
        kind = type(self.model.get_submodule(path)).__name__
        return f"layer {path!r}, a {kind}," if path else f"this {kind}"

    # Layers: each is one step, whatever it does inside.

    def enter(self, name: str, module: nn.Module) -> None:
        self.calls.append(name)
        self._path.append(name)
        if not self._layer and _followed_whole(module):
            self._layer = name

    def leave(self, name: str, module: nn.Module, x: Any, output: Any) -> None:
        self._path.pop()
        if self._layer != name:
            return
        self._layer = ""
        if self._normalised(module, x, output):
            return
        reason = surgery.unfit(module, name)
        if reason or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            reason = reason or f"layer {name!r} is called in a way that cannot be followed"
            self._stop(_tensors(x), _tensors(output), reason)
            self.others.setdefault(name, reason)
            return
        sides = surgery.sizes(module)
        if "in" in sides:
            self._read(name, module, x)
        if isinstance(module, AttentionCore):
            at, inner = self.places.get((name, "in")), sum(module.widths)
            self._labels[output] = self.labels(x) if at is None else _on(-1, at[:inner], output.dim())
        elif "in" in sides:
            self._write(name, sides["out"], _axis(module), output)
        else:
            self._pass(name, module, x, output)

    def _normalised(self, module: nn.Module, x: Any, output: Any) -> bool:
        """Whether a layer normalises units in parts, as the queries of each head: those of a part are one unit."""
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or len(module.normalized_shape) > 1:
            return False
        labels = self.labels(x) if isinstance(x, Tensor) else 0
        if isinstance(labels, int) or (isinstance(module, nn.LayerNorm) and surgery.axis_of(module) != -1):
            return False
        joined = labels.amax(-1, keepdim=True)
        if joined.numel() > 1:
            self.tie(joined, labels)
            self.label(output, joined)
        return joined.numel() > 1

    def _read(self, name: str, module: nn.Module, x: Tensor) -> None:
        labels = self.labels(x)
        if isinstance(labels, int):
            return
        at = self._each(labels, _axis(module), x)
        if isinstance(module, AttentionCore):
            q, k, v = at.chunk(3)
            self.tie(q, k)
            self.tie(q, v)
        self._own(name, "in", at)

    def _own(self, name: str, side: Side, at: Tensor) -> None:
        """Note what lies where on a side of a layer; in a second call the same units must lie there."""
        if (name, side) in self.places:
            self.tie(self.places[name, side], at)
        self.places[name, side] = at

    def _each(self, labels: Tensor, axis: int, x: Tensor) -> Tensor:
        """The label of each position on an axis, whose labels at all other places are tied to it."""
        labels = labels.movedim(axis, 0).flatten(1)
        at = labels.amax(1)
        self.tie(at[:, None], labels)
        return at.expand(x.shape[axis])

    def _write(self, name: str, n_units: int, axis: int, output: Tensor) -> None:
        if n_units == 1:
            self._labels[output] = self.source(f"its units meet the one unit of layer {name!r}, which always stays")
            self.others.setdefault(name, "it has one unit, and one always stays")
            return
        if (name, "out") not in self.places:
            self.places[name, "out"] = self._fresh(n_units)
        self._labels[output] = _on(axis, self.places[name, "out"], output.dim())

    def _fresh(self, n: int) -> Tensor:
        self.n_labels += n
        return torch.arange(self.n_labels - n + 1, self.n_labels + 1, dtype=torch.float32)

    def _pass(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A layer whose units are those that it reads."""
        labels = self.labels(x)
        if isinstance(labels, int):
            self._labels[output] = labels
            self.others.setdefault(name, self.sources[-1 - labels])
            return
        at, axis = self._each(labels, _axis(module), x), _axis(module)
        n_units, n_blocks = surgery.sizes(module)["out"], surgery.blocks(module)
        if n_blocks < max(len(at), n_units):
            of_block = at.view(n_blocks, -1)
            first = of_block.amax(1)
            self.tie(first[:, None], of_block)
            at = first.repeat_interleave(n_units // n_blocks)
        self._own(name, "out", at)
        if x.shape == output.shape and n_blocks == len(at):
            self._labels[output] = labels  # it may differ from place to place
        else:
            self._labels[output] = _on(axis, at, output.dim())

    # Operations between layers.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._layer:
            self._follow(func, args, kwargs or {}, output)
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = func._schema.name.partition("::")[2]
        call = _Call(func, name.removesuffix("_"), args, kwargs, _tensors((args, kwargs)), _tensors(output))
        if not any(isinstance(self.labels(tensor), Tensor) for tensor in call.read):
            known = [cast(int, self.labels(tensor)) for tensor in call.read]
            source = min(known, default=self.source("its units meet values that no layer makes"))
            for tensor in call.made:
                self._labels.setdefault(tensor, source)
            return
        rule = next((follow for names, follow in self._rules() if call.name in names), self._unknown)
        if torch.Tag.pointwise in func.tags or call.name in _POINTWISE:
            rule = self._join
        try:
            rule(call)
        except (RuntimeError, TypeError, ValueError, IndexError):  # called in a way that its rule does not know
            self._unknown(call)

    def _rules(self) -> Iterator[tuple[Collection[str], Callable[[_Call], None]]]:
        yield _SAME, self._kept
        yield _MOVED, self._moved
        yield _SPLIT, self._split
        yield _LOCAL, self._local
        yield _REDUCED, self._reduced
        yield _ALONG, self._along
        yield _PRODUCTS, self._product
        yield {"glu"}, self._gated

    def _unknown(self, call: _Call) -> None:
        self._stop(
            call.read,
            call.made,
            f"its units go through {call.name!r} in {self.where()} which is not known to keep them apart",
        )

    def _stop(self, read: list[Tensor], made: list[Tensor], reason: str) -> None:
        for tensor in read:
            self.fix(self.labels(tensor), reason)
        for tensor in made:
            self._labels[tensor] = self.source(reason)

    def _kept(self, call: _Call) -> None:
        for tensor in call.made:
            self._labels[tensor] = self.labels(call.read[0])

    def _moved(self, call: _Call) -> None:
        """Labels move as values do."""
        if call.func._schema.is_mutable:
            self._stop(call.read, call.made, f"its units are moved in place in {self.where()} which cannot be followed")
            return
        swap = lambda t: self.full(t).contiguous() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        args = (*call.args[:2], 0.0) if call.name == "constant_pad_nd" else call.args
        moved = call.func(*tree_map(swap, args), **tree_map(swap, call.kwargs))
        for tensor, labels in zip(call.made, tree_leaves(moved), strict=True):
            self.label(tensor, labels)

    def _split(self, call: _Call) -> None:
        """Parts must stay as wide as each other, so that units of one place go together."""
        self._moved(call)
        dim = call.argument("dim")
        whole = self.labels(call.read[0])
        if isinstance(whole, int) or whole.shape[dim] == 1 or len(call.made) == 1:
            return
        if len({tensor.shape for tensor in call.made}) > 1:
            if not self._heads()[1]:
                self.fix(whole, f"its units are split at a fixed place in {self.where()} into parts of unequal width")
            return
        for tensor in call.made[1:]:
            self.tie(self.full(call.made[0]), self.full(tensor))

    def _gated(self, call: _Call) -> None:
        """One half times the sigmoid of the other."""
        half, other = self.full(call.read[0]).chunk(2, call.argument("dim"))
        self.tie(half, other)
        self.label(call.made[0], half)

    def _local(self, call: _Call) -> None:
        labels = self.full(call.read[0])
        dims = tuple(range(labels.dim() - _LOCAL[call.name], labels.dim()))
        joined = labels.amax(dims, keepdim=True)
        self.tie(joined, labels)
        for tensor in call.made:
            self.label(tensor, joined.expand(tensor.shape))

    def _reduced(self, call: _Call) -> None:
        if call.name in ("max", "min") and len(call.read) > 1:
            self._join(call)
            return
        joined, dims = self._joined(call, call.read[0])
        for tensor in call.made:
            kept = joined if tensor.dim() == joined.dim() else joined.squeeze(dims)
            self.label(tensor, kept.expand(tensor.shape))

    def _along(self, call: _Call) -> None:
        joined, _ = self._joined(call, call.read[0])
        for tensor in call.made:
            self.label(tensor, joined.expand(tensor.shape))

    def _joined(self, call: _Call, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The labels of x where those along the dims of an operation are one, and the dims."""
        given = call.argument("dim")
        dims = (given,) if isinstance(given, int) else tuple(given or range(x.dim()))
        labels = self.labels(x)
        assert isinstance(labels, Tensor)
        joined = labels.amax(dims, keepdim=True) if dims else labels
        self.tie(joined, labels)
        if joined.numel() == 1 and labels.numel() > 1:
            self.together.append((int(joined), f"its units are joined in {self.where()} so that each depends on all"))
        return joined, dims

    def _product(self, call: _Call) -> None:
        """In an attention that is not written out each head is one unit; any other product has fixed widths."""
        path, n_heads = self._heads()
        factors = [t for t in call.read if t.dim() > 2]
        if n_heads < 2 or len(factors) < 2:
            self._stop(
                call.read, call.made, f"its units meet in a product of tensors in {self.where()} whose widths are fixed"
            )
            return
        joined = torch.zeros((1,) * factors[0].dim())
        for labels in (self.labels(t) for t in factors):
            if isinstance(labels, Tensor):
                head = labels.amax((-1, -2), keepdim=True)
                self.tie(head, labels)
                self.tie(joined, head)
                joined = torch.maximum(*torch.broadcast_tensors(joined, head))
        found = joined[joined > 0].unique()
        if len(found) == n_heads:
            self.tie(self.places[path, "out"], found)
        else:
            self.fix(joined, f"its units meet in a product of tensors in {self.where()} which are not its heads")
        for tensor in call.made:
            if tensor.dim() == joined.dim():
                self.label(tensor, joined)

    def _heads(self) -> tuple[str, int]:
        """The innermost module that runs now, and how many heads it has."""
        path = self._path[-1] if self._path else ""
        return path, surgery.heads(self.model.get_submodule(path))

    def _join(self, call: _Call) -> None:
        """Place by place: labels that meet are one unit."""
        n_dims = max(t.dim() for t in call.made)
        result: Tensor | None = None
        for labels in (self.labels(t) for t in call.read):
            if isinstance(labels, Tensor):
                labels = labels.reshape((1,) * (n_dims - labels.dim()) + labels.shape)
                if result is not None:
                    self.tie(result, labels)
                result = labels if result is None else torch.maximum(*torch.broadcast_tensors(result, labels))
        assert result is not None
        for tensor in call.read:
            source, shape = self.labels(tensor), (1,) * (n_dims - tensor.dim()) + tensor.shape
            if isinstance(source, int) and any(a > 1 and b > 1 for a, b in zip(result.shape, shape, strict=True)):
                self._meet(result, source, shape)
        for tensor in call.made:
            self.label(tensor, result)

    def _meet(self, labels: Tensor, source: int, shape: Sequence[int]) -> None:
        """Fix the labels that differ along an axis on which a fixed tensor has positions."""
        held = [d for d, n in enumerate(labels.shape) if n > 1 and shape[d] > 1]
        rest = [d for d in range(labels.dim()) if d not in held]
        slices = labels.permute(*held, *rest).reshape(*(labels.shape[d] for d in held), -1)
        if any((slices.amax(d) != slices.amin(d)).any() for d in range(len(held))):
            self.fix(labels, self.sources[-1 - source])


def _followed_whole(module: nn.Module) -> bool:
    """Whether a layer is one step of the pass; a PReLU of one slope is an operation like any other."""
    return isinstance(module, surgery.LAYERS) and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)


def _axis(module: nn.Module) -> int:
    return cast(int, surgery.axis_of(module))  # each of surgery.LAYERS that can lose units has one


def _tensors(given: Any) -> list[Tensor]:
    return [t for t in tree_leaves(given) if isinstance(t, Tensor)]


def _on(axis: int, at: Tensor, n_dims: int) -> Tensor:
    shape = [1] * n_dims
    shape[axis] = len(at)
    return at.reshape(shape)


def _compact(labels: Tensor) -> Tensor:
    """The same labels with one place on each axis along which they do not differ."""
    for d, n in enumerate(labels.shape):
        if n > 1 and (labels.stride(d) == 0 or bool((labels == labels.narrow(d, 0, 1)).all())):
            labels = labels.narrow(d, 0, 1)
    return labels.clone()
