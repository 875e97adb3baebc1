"""How the tokens of a transformer lie: which are patches of the images, and which are not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sukashi.core.errors import ModelError
from sukashi.core.precision import exact
from sukashi.network import hooks
from sukashi.network.functions import Add
from sukashi.network.layers import AttentionCore

_TOKENS = 3  # axes of tokens: images, tokens, features


@dataclass(frozen=True)
class Tokens:
    """Where tokens come from: `n_before` that are no patches, then `rows` x `columns` patches of `size` pixels.

    `last` is the sum that gives the tokens after the last block.
    """

    n_before: int
    rows: int
    columns: int
    size: tuple[int, int]
    last: str

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values of patches (B, rows * columns), each evenly over its pixels and channels: (B, C, H, W)."""
        (height, width), (_, channels, h, w) = self.size, shape
        grid = values.unflatten(1, (self.rows, self.columns)) / (height * width * channels)
        pixels = grid.repeat_interleave(height, 1).repeat_interleave(width, 2)
        return F.pad(pixels, (0, w - pixels.shape[2], 0, h - pixels.shape[1]))[:, None].repeat(1, channels, 1, 1)


def cores_of(form: fx.GraphModule) -> list[AttentionCore]:
    """The attention of each layer, in order."""
    called = [form.get_submodule(str(node.target)) for node in form.graph.nodes if node.op == "call_module"]
    return [module for module in called if isinstance(module, AttentionCore)]


def tokens_of(form: fx.GraphModule, x: Tensor) -> Tokens:
    """How the tokens of a canonical transformer lie, seen in its graph and checked on noise in some of the patches.

    Raises ModelError for a network without attention, or whose tokens are not the patches of one convolution row by row
    behind any class tokens, through attention layer by layer.
    """
    name = form._get_name()
    depth: dict[fx.Node, int] = {}  # how many layers of attention lie behind a node, one after another
    cores, patches, sums = [], [], []
    for node in form.graph.nodes:
        depth[node] = max((depth[other] for other in node.all_input_nodes), default=0)
        module = form.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, AttentionCore):
            depth[node] += 1
            cores.append(node)
        elif isinstance(module, nn.modules.conv._ConvNd):
            patches.append(module)
        elif isinstance(module, Add) and node.meta["axes"] == _TOKENS:
            sums.append(node)
    if not cores:
        raise ModelError(f"this {name} has no attention that could be written out")
    if [depth[node] for node in cores] != list(range(1, len(cores) + 1)) or not (
        sums and depth[sums[-1]] == len(cores)
    ):
        raise ModelError(f"layers of attention lie side by side in this {name}, or no sum follows the last")
    first = patches[0] if len(patches) == 1 and isinstance(patches[0], nn.Conv2d) else None
    if first is None or not (first.kernel_size == first.stride and first.padding in ((0, 0), "valid")):
        raise ModelError(f"this {name} does not make its tokens with one convolution of patches side by side")
    height, width = cast(tuple[int, int], first.kernel_size)
    rows, columns = x.shape[2] // height, x.shape[3] // width
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(rows, columns, generator=generator) < 0.5
    tokens = Tokens(0, rows, columns, (height, width), str(sums[-1].target))
    noise = torch.randn(x[:1].shape, generator=generator).to(x)
    changed = x[:1] + noise * tokens.spread(chosen.flatten()[None].to(x), x.shape)
    with exact(), hooks.read_by(form, str(cores[0].target)) as read:
        form(torch.cat([x[:1], changed]))
    change = (read[0][1] - read[0][0]).abs().amax(1).cpu()
    n_before = len(change) - rows * columns
    expected = torch.cat([torch.zeros(max(n_before, 0), dtype=torch.bool), chosen.flatten()])
    if not torch.equal(change > 1e-4 * change.max(), expected):
        raise ModelError(
            f"the {len(change)} tokens of this {name} are not its {rows} x {columns} patches row by row behind any "
            "class tokens"
        )
    return replace(tokens, n_before=n_before)
