"""Trial cuts: whether what is taken for the sites of a network can be cut, asked of a copy that hides no wrong cut."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sukashi.core import progress
from sukashi.core.errors import ResourceError, brief
from sukashi.core.types import Mask, Site
from sukashi.network import hooks, surgery
from sukashi.network.layers import MAKERS

# Of fp32 logits that should be equal; a wrong cut is off by 1e-2 and more.
TOLERANCE = 1e-4
# Seconds of processor time that a search with its cuts may take.
PATIENCE = 300.0


def twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in fp32 and eval mode, in which no normalisation or scale is at a neutral start value.

    A fresh BatchNorm (0, 1), a layer of zeros or a scale near zero would hide a wrong cut.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_plain(parameter), requires_grad=True)
    for buffer in model.buffers():
        memo[id(buffer)] = _plain(buffer)
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            memo.setdefault(id(tensor), _plain(tensor))
    copied = copy.deepcopy(model, memo).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.numel() == max(parameter.shape, default=1) or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for module in copied.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                mean, var = module.running_mean, module.running_var
                if mean is not None and var is not None:
                    mean.add_(torch.randn(mean.shape, generator=generator), alpha=0.2)
                    var.mul_(0.5 + torch.rand(var.shape, generator=generator))
    return copied


def noise(x: Tensor) -> Tensor:
    """(1, C, H, W) noise of three times what images x reach: dull ones would hide what couples units by a little."""
    drawn = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(2))
    return 3 * drawn * x.abs().max().clamp(min=1)


def _tensors(kept: object) -> Iterator[Tensor]:
    """The tensors that a module keeps aside, which are often results that can't be copied by themselves."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, Mapping | list | tuple):
        for part in kept.values() if isinstance(kept, Mapping) else kept:
            yield from _tensors(part)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class TrialCuts:
    """Cuts of a network as `twin` gives it, on images `x` (B, C, H, W); {layer: reason} of what fails goes into
    `refused`. They end where `time.process_time()` is above `stop`.
    """

    twin: nn.Module
    x: Tensor
    refused: dict[str, str]
    stop: float

    def right(self, sites: list[Site], reason: str = "") -> list[Site]:
        """The sites whose random cuts give the masked logits, all together; the others are refused.

        Where a cut fails, those at layers like the one that did not fit are tried after the others, or else halves one
        after the other, each together with what has been found right before.
        """
        layers = dict(self.twin.named_modules())
        good: list[Site] = []
        blocks, done = [sites] if sites else [], 0
        with progress.task("finding what can be cut", len(sites)) as shown:
            while blocks:
                shown.advance(len(sites) - sum(map(len, blocks)) - done)
                done = len(sites) - sum(map(len, blocks))
                block = blocks.pop()
                fault, layer = self.fault([*good, *block])
                suspects = [site for site in block if _at(site, layer, layers)]
                if not fault:
                    good += block
                elif 0 < len(suspects) < len(block):
                    blocks += [suspects, [site for site in block if site not in suspects]]
                elif len(block) > 1:
                    middle = len(block) // 2
                    blocks += [block[middle:], block[:middle]]
                else:
                    places = [(member.module, member.side) for member in block[0].members]
                    why = reason or f"its trial cut does not give the logits of the masked model ({fault})"
                    refuse(places, why, layers, self.refused)
        return [site for site in sites if site in good]

    def fault(self, sites: list[Site]) -> tuple[str, str]:
        """What is wrong with two trial cuts and at which layer, or "": every unit goes in one of them."""
        if time.process_time() > self.stop:
            raise ResourceError(
                f"the search for what can be cut was given up after {PATIENCE:.0f} seconds of processor time: give "
                "smaller images, or a smaller network of the family"
            )
        generator = torch.Generator().manual_seed(1)
        keep = {site: torch.rand(site.n_units, generator=generator) < 0.6 for site in sites}
        for kept in keep.values():
            kept[-1], kept[0] = False, True
        rest = {site: ~kept for site, kept in keep.items()}
        first = self._off(Mask(keep))
        return first if first[0] else self._off(Mask(rest))

    def _off(self, mask: Mask) -> tuple[str, str]:
        """How the cut network differs from the masked one, or "", and the layer at which it broke, or ""."""
        path: list[str] = []
        try:
            small = copy.deepcopy(self.twin)
            with torch.no_grad(), hooks.ablated(self.twin, mask):
                masked = self.twin(self.x)
            surgery.cut(small, mask)
            enter = lambda name, module: path.append(name)  # noqa: E731
            with torch.no_grad(), hooks.followed(small, lambda name, *_: path.remove(name), enter):
                cut = small(self.x)
        except Exception as error:  # whatever it is, the cut layers no longer fit each other
            return brief(error), path[-1] if path else ""
        if cut.shape != masked.shape:
            return f"logits of shape {tuple(cut.shape)}", ""
        off = (cut - masked).abs().max()
        return "" if off <= TOLERANCE * masked.abs().max() else f"logits are {float(off):.1e} apart", ""


def refuse(
    places: Iterable[tuple[str, str]], reason: str, layers: Mapping[str, nn.Module], refused: dict[str, str]
) -> None:
    """Give every convolution and linear layer that makes the units the reason."""
    for name, side in places:
        if side == "out" and isinstance(layers[name], MAKERS):
            refused.setdefault(name, reason)


def _at(site: Site, layer: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a site has members at a layer, or heads in the same kind of attention."""
    alike = type(layers[layer]) if layer and surgery.heads(layers[layer]) else ()
    return any(member.module == layer or isinstance(layers[member.module], alike) for member in site.members)
