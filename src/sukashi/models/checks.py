"""Whether a network computes something that means anything, on two passes over an example."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode

from sukashi.core.errors import ModelError, SukashiError, brief
from sukashi.core.objective import CLASSIFICATION
from sukashi.core.types import Preprocess
from sukashi.models.loaded import Loaded, takes_classes
from sukashi.network import hooks
from sukashi.network.canonical import evaluating

# Of fp32 logits; a batch of one may take another kernel, an image that sees its neighbours is off by far more.
_ALONE = 1e-3
# Of a row of fp32 probabilities, from 1.
_SUM = 1e-4


def probe(loaded: Loaded, example: Tensor) -> Tensor:
    """Logits (B, K) of an example (B, C, H, W), once it is certain that they mean something.

    Raises ModelError where the model does not run on the example, does not give one finite (B, K) tensor with
    K = n_classes, gives other logits in a second pass, changes its buffers, or lets images of a batch change each
    other's logits; and for an import path, whose size its author wrote, where it cuts the example into patches that
    leave pixels over. Weights, buffers and train mode are as found afterwards.
    """
    whole = not takes_classes(loaded.spec)
    logits = checked_logits(loaded.model, example, loaded.spec, whole=whole, remedy=_fitting(loaded.model, example))
    if logits.shape[1] != loaded.n_classes:
        raise ModelError(f"{loaded.spec} gives {logits.shape[1]} classes, {loaded.n_classes} were expected")
    return logits


def _fitting(model: nn.Module, example: Tensor) -> str:
    """What images to give a model that does not run on these."""
    remedy, n_given = "give images of the model's size and channels", example.shape[1]
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels == n_given:
        return remedy
    return f"{remedy} (it reads {first.in_channels}, these have {n_given}), or a model for {n_given}"


# Checks.

_REMOVED_BY = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, name)",
}


def copied(model: nn.Module, spec: str) -> nn.Module:
    """A copy of a network, which its author may go on with.

    Raises ModelError for layers without shapes yet, and for weights that hooks or the network itself compute from
    others: neither a copy nor a cut would have them.
    """
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ModelError(
                f"layer {name!r} of {spec} is lazy, its shapes are not known: pass a batch of images through the "
                "network before it is given"
            )
        for hook in hooks.registered(module):
            for kind, remedy in _REMOVED_BY.items():
                if isinstance(hook, kind):
                    raise ModelError(
                        f"a weight of layer {name!r} of {spec} is computed in every pass, by {kind.__module__}: call "
                        f"{remedy} before the network is given; the values stay"
                    )
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ModelError(
                    f"{attribute!r} of layer {name!r} of {spec} is computed from weights and kept: compute it in each "
                    "pass, or make it a buffer"
                )
    return copy.deepcopy(model)


def noise(preprocess: Preprocess) -> Tensor:
    shape = (2, preprocess.channels, preprocess.height, preprocess.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def checked_logits(
    model: nn.Module, example: Tensor, spec: str, *, whole: bool, remedy: str = "check `size` and `width`"
) -> Tensor:
    """Logits (B, K) of the example, after the checks that `probe` speaks of (all but that of K).

    `whole` refuses patches that leave pixels over. A library's architecture may do so at the size it was made for:
    SigLIP so400m reads 384 x 384 pixels in patches of 14 x 14.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with evaluating(model):
            with hooks.visited(model, _patches(model, example, spec) if whole else {}), _Squashed() as squashed:
                first = model(example)
            second, alone = model(example), model(example[:1])
            normalised = _normalised(first) and _normalised(model(_louder(example)))
    except SukashiError:
        raise
    except Exception as error:
        channels, height, width = example.shape[1:]
        raise ModelError(
            f"{spec} does not run on images of {height} x {width} pixels in {channels} channel"
            f"{'s' if channels > 1 else ''} ({brief(error)}): {remedy}"
        ) from error
    finally:
        changed = [name for name, buffer in model.named_buffers() if not _same(buffer, before[name])]
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    if not isinstance(first, Tensor):
        found = dict(named_outputs(first))
        raise ModelError(f"{spec} gives a {type(first).__name__}, not logits: select an output: {candidates(found)}")
    CLASSIFICATION.check_output(first, len(example), spec)
    if not first.isfinite().all():
        raise ModelError(f"{spec} gives NaN or Inf: check its weights and the preprocessing")
    if squashed.are(first):
        raise ModelError(
            f"{spec} ends in a sigmoid, and its numbers in [0, 1] are no logits: leave the sigmoid out, the largest "
            "stays the largest"
        )
    if normalised:
        raise ModelError(f"{spec} gives probabilities, not logits: leave the softmax out")
    if changed:
        raise ModelError(f"{spec} changes its buffer {changed[0]!r} in eval mode: it must compute the same every time")
    if not torch.equal(first, second):
        raise ModelError(f"{spec} gives other logits in a second pass: it must compute the same every time")
    if _apart(first[:1], alone):
        raise ModelError(
            f"{spec} multiplies rounding until it rules the logits, in float64 they agree: give trained `weights`"
            if _agrees_in_float64(model, example)
            else f"{spec} gives an image other logits in other company: images must not depend on each other"
        )
    return first


def _apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > _ALONE * one.abs().max())


def _agrees_in_float64(model: nn.Module, example: Tensor) -> bool:
    """Whether an image's logits are the same alone and in company, but for rounding in float32."""
    try:
        exact, x = copy.deepcopy(model).double(), example.double()
        return not _apart(exact(x)[:1], exact(x[:1]))
    except RuntimeError:  # it computes in float32 whatever it is given
        return False


def _patches(model: nn.Module, example: Tensor, spec: str) -> dict[str, Callable[[Tensor], None]]:
    """For each convolution that may cut images into patches a look at what it reads, which refuses a rest.

    Such a convolution steps as far as it reaches: pixels that do not fill a patch are never read. One that reaches
    further than it steps has read them, or ends in padding, as everybody expects.
    """

    def look(patch: tuple[int, ...], x: Tensor) -> None:
        side = x.shape[2:]
        if x.shape != example.shape or all(n % p == 0 for n, p in zip(side, patch, strict=True)):
            return
        fits = ([p * whole(n / p) for n, p in zip(side, patch, strict=True)] for whole in (math.floor, math.ceil))
        said = " and ".join(f"{height} x {width}" for height, width in fits if min(height, width) > 0)
        raise ModelError(
            f"{spec} cuts images into patches of {patch[0]} x {patch[1]} pixels, of which {side[0]} x {side[1]} is no "
            f"multiple, so that pixels would never be read: the nearest multiples are {said}"
        )

    return {
        name: partial(look, module.kernel_size)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride != (1, 1) == module.dilation
        and module.padding in ((0, 0), "valid")
    }


def _normalised(output: Any) -> bool:
    """Whether each row is a softmax's or a log-softmax's; of a single class that means nothing."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        return False
    rows = output.double()
    sums = (rows.sum(1) if bool((rows >= 0).all()) else rows.exp().sum(1)) - 1
    return bool((sums.abs() < _SUM).all())


class _Squashed(TorchDispatchMode):
    """Keeps what sigmoids give in a pass."""

    _KINDS = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "log_sigmoid_forward")
    )

    def __init__(self) -> None:
        super().__init__()
        self._found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if func.overloadpacket in self._KINDS:
            self._found.append(given[0] if isinstance(given, tuple) else given)
        return given

    def are(self, output: Tensor) -> bool:
        """Whether an output is what a sigmoid gave, in whatever shape."""
        return any(x.numel() == output.numel() and torch.equal(x.flatten(), output.flatten()) for x in self._found)


def _louder(example: Tensor) -> Tensor:
    """Other images than those of an example: logits that happen to look like probabilities there do not here."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn((4, *example.shape[1:]), generator=generator)
    return (drawn * torch.tensor([0.1, 1.0, 10.0, 100.0]).view(4, 1, 1, 1)).to(example)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def named_outputs(found: Any) -> Iterator[tuple[str, Any]]:
    """Outputs of a model with the names by which they are selected."""
    match found:
        case Mapping():
            yield from ((str(key), value) for key, value in found.items())
        case tuple() | list():
            yield from ((str(position), value) for position, value in enumerate(found))


def candidates(found: Mapping[str, Any]) -> str:
    shown = [f"{name!r} {tuple(value.shape)}" for name, value in found.items() if isinstance(value, Tensor)]
    return ", ".join(shown) or "there is none that is a tensor"
