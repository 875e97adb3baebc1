"""Where what a layer writes is added to something else, as the branch of a residual block to its stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from timm.layers.layer_scale import LayerScale, LayerScale2d
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from sukashi.network import hooks
from sukashi.network.canonical import line, performs

_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
_NORMS = nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d


@dataclass(frozen=True)
class Branch:
    """What becomes of what a layer writes: the norms and scalings that it goes through and nothing else reads, one
    after another, and whether what comes of it is then only added to a tensor of its shape.
    """

    links: tuple[str, ...] = ()
    joins: bool = False

    def line(self, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
        """(M,) the factor and the shift of each output of the layer along the links."""
        weight = cast(Tensor, model.get_submodule(layer).weight)
        factor = weight.new_ones(len(weight))
        shift = torch.zeros_like(factor)
        for link in self.links:
            of = model.get_submodule(link)
            by, plus = (of.gamma, 0.0) if isinstance(of, (LayerScale, LayerScale2d)) else line(cast(Any, of))
            factor, shift = factor * by, shift * by + plus
        return factor, shift

    def norm(self, model: nn.Module) -> str | None:
        """The BatchNorm that reads what the layer writes."""
        return next((link for link in self.links[:1] if isinstance(model.get_submodule(link), _NORMS)), None)

    def run(self, model: nn.Module, layer: str, x: Tensor) -> Tensor:
        """What comes of what the layer reads. No hook is called."""
        for name in (layer, *self.links):
            x = model.get_submodule(name).forward(x)
        return x


def branches(model: nn.Module, layers: Collection[str], x: Tensor) -> dict[str, Branch]:
    """{layer: its branch} of those of the layers that a pass calls once; `x` are two images at least.

    Where two of them meet in a sum, it is the branch of the one called later: what the other gives is known then.
    """
    following = _Following(model, layers, altered(model, x))
    with hooks.followed(model, following.leave, following.enter), following:
        model(x)
    return following.found()


def altered(model: nn.Module, x: Tensor) -> set[str]:
    """The layers whose output is another than their forward gives, for hooks of their own change it."""
    hooked = {name for name, module in model.named_modules() if name and hooks.registered(module)}
    found = set()

    def leave(name: str, layer: nn.Module, read: Any, output: Any) -> None:
        plain = isinstance(read, Tensor) and isinstance(output, Tensor)
        if name in hooked and not (plain and torch.equal(layer.forward(read), output)):
            found.add(name)

    if hooked:
        with hooks.followed(model, leave):
            model(x)
    return found


@contextmanager
def at_layers(
    model: nn.Module, layers: Mapping[str, Branch], visit: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[None]:
    """Inside, visit(layer, what it reads, what its branch is added to, or None) in each pass: before the sum where
    there is one, or else before the layer runs. A branch that joins a sum is run again after the visit, so that what
    the visit changed in the layer counts.
    """
    read: dict[str, Tensor] = {}

    def enter(name: str, x: Tensor) -> None:
        if layers[name].joins:
            read[name] = x
        else:
            visit(name, x, None)

    def meet(name: str, other: Tensor) -> Tensor:
        x = read.pop(name)
        visit(name, x, other)
        return layers[name].run(model, name, x)

    with hooks.visited(model, {name: partial(enter, name) for name in layers}), at_sums(model, layers, meet):
        yield


@contextmanager
def at_sums(
    model: nn.Module, layers: Mapping[str, Branch], meet: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, meet(layer, what its branch is added to) before each sum that one of the branches joins; what that gives,
    if anything, is added in place of what the branch gave.
    """
    ends = {(branch.links or (name,))[-1]: name for name, branch in layers.items() if branch.joins}
    meeting = _Meeting(meet)

    def leave(name: str, layer: nn.Module, read: Any, output: Any) -> None:
        if name in ends:
            meeting.given[id(output)] = ends[name], output

    with hooks.followed(model, leave), meeting:
        yield


class _Meeting(TorchDispatchMode):
    def __init__(self, meet: Callable[[str, Tensor], Tensor | None]) -> None:
        super().__init__()
        self._meet = meet
        self.given: dict[int, tuple[str, Tensor]] = {}  # by id; a tensor that is kept shares its id with no other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _adds(func, args, kwargs):
            at = next((place for place in (0, 1) if id(args[place]) in self.given), None)
            if at is not None:
                name, branch = self.given.pop(id(args[at]))
                new = self._meet(name, args[1 - at])
                if new is not None and at == 0:
                    # A sum in place is read under the branch's name afterwards.
                    args = (branch.copy_(new) if func is _ADD_IN_PLACE else new, args[1])
                elif new is not None:
                    args = (args[0], new)
        return func(*args, **kwargs)


@dataclass(eq=False)
class _Chain:
    """What a layer writes and what the links after it make of that, `tensors`, in one pass.

    `called` numbers the call of the layer, `version` tells whether what it reads was overwritten since, and `uses`,
    how often each tensor was read, are kept once a sum has overwritten the last of them.
    """

    layer: str
    called: int
    read: Tensor
    version: int
    links: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    joins: bool = False
    uses: Counter[int] | None = None


class _Following(TorchDispatchMode):
    """Follows what layers write through the calls of one pass."""

    def __init__(self, model: nn.Module, layers: Collection[str], altered: Collection[str]) -> None:
        super().__init__()
        self._model, self._layers, self._altered = model, layers, altered
        self._n_calls: Counter[str] = Counter()
        self._chains: dict[int, _Chain] = {}  # by the id of the last tensor of each
        self._uses: Counter[int] = Counter()
        self._all: list[_Chain] = []

    def enter(self, name: str, layer: nn.Module) -> None:
        self._n_calls[name] += 1

    def leave(self, name: str, layer: nn.Module, read: Any, output: Any) -> None:
        if not isinstance(read, Tensor) or not isinstance(output, Tensor):
            return
        if name in self._layers:
            chain = _Chain(name, self._n_calls.total(), read, read._version)
            self._all.append(chain)
        elif id(read) in self._chains and self._is_link(name, layer, self._chains[id(read)].layer, output):
            chain = self._chains.pop(id(read))
            chain.links.append(name)
            if not _is_line(layer):
                return
        else:
            return
        chain.tensors.append(output)
        self._chains[id(output)] = chain
        if output is not read:
            self._uses[id(output)] = 0  # an earlier tensor may have had this id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._uses.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if _adds(func, args, kwargs):
            met = [self._chains[id(x)] for x in args if id(x) in self._chains]
            met = [chain for chain in met if chain.read._version == chain.version]
            if met:
                max(met, key=lambda chain: chain.called).joins = True
            if func is _ADD_IN_PLACE and (chain := self._chains.pop(id(args[0]), None)) is not None:
                chain.uses = self._uses.copy()
        return func(*args, **kwargs)

    def found(self) -> dict[str, Branch]:
        return {chain.layer: self._branch(chain) for chain in self._all if self._n_calls[chain.layer] == 1}

    def _branch(self, chain: _Chain) -> Branch:
        """As far as each tensor is read by the next alone, and each link is called once."""
        uses, times = chain.uses or self._uses, Counter(map(id, chain.tensors))
        alone = 0
        for tensor in chain.tensors:
            if uses[id(tensor)] != times[id(tensor)]:
                break
            alone += 1
        links = chain.links[:alone]
        once = next((n for n, link in enumerate(links) if self._n_calls[link] != 1), len(links))
        return Branch(tuple(links[:once]), chain.joins and alone == len(chain.tensors) and once == len(links))

    def _is_link(self, name: str, layer: nn.Module, reads: str, output: Tensor) -> bool:
        """Whether a layer scales and shifts each output of the one before it by itself, or does so first."""
        if name in self._altered:
            return False
        features_last = isinstance(self._model.get_submodule(reads), nn.Linear)
        if isinstance(layer, _NORMS):
            return layer.running_mean is not None and (not features_last or output.dim() == 2)
        return performs(layer, LayerScale if features_last else LayerScale2d)


def _adds(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is the plain sum of two tensors of one shape."""
    both = func in (_ADD, _ADD_IN_PLACE) and len(args) == 2 and all(isinstance(x, Tensor) for x in args)
    return both and kwargs.get("alpha", 1) == 1 and args[0].shape == args[1].shape and args[0] is not args[1]


def _is_line(layer: nn.Module) -> bool:
    """Whether a link does no more than scale and shift: a norm that ends in an activation does."""
    if isinstance(layer, BatchNormAct2d):
        return all(isinstance(of, nn.Identity) for of in (layer.act, layer.drop))
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    return any(performs(layer, cls) for cls in (*plain, LayerScale, LayerScale2d))
