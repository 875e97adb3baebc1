"""Wanda, number by number: each weight times the root of the sum of squares of what it reads."""

import itertools

import torch
from torch import nn

from oracles import oracle
from sukashi.core.types import Scores


def slow_linear(weight, x):
    """|W_ij| times the root of the sum of squares of feature j over all tokens."""
    rows = x.reshape(-1, x.shape[-1]).tolist()
    norms = [sum(row[j] ** 2 for row in rows) ** 0.5 for j in range(weight.shape[1])]
    return torch.tensor(
        [[abs(w) * norms[j] for j, w in enumerate(row)] for row in weight.tolist()], dtype=torch.float64
    )


def slow_conv(conv, x):
    """The same, every input looked up where the kernel lies; what is beyond the border follows the padding mode."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    _, _, height, width = x.shape
    if isinstance(conv.padding, str):
        total = (dh * (kh - 1), dw * (kw - 1)) if conv.padding == "same" else (0, 0)
        top, left = total[0] // 2, total[1] // 2
    else:
        (top, left), total = conv.padding, (2 * conv.padding[0], 2 * conv.padding[1])
    n_rows, n_columns = (
        (height + total[0] - dh * (kh - 1) - 1) // sh + 1,
        (width + total[1] - dw * (kw - 1) - 1) // sw + 1,
    )
    numbers = x.tolist()

    def read(image, channel, row, column):
        row, column = row - top, column - left
        if conv.padding_mode == "circular":
            row, column = row % height, column % width
        elif conv.padding_mode == "replicate":
            row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        elif conv.padding_mode == "reflect":
            row, column = abs(row), abs(column)
            row = 2 * (height - 1) - row if row >= height else row
            column = 2 * (width - 1) - column if column >= width else column
        inside = 0 <= row < height and 0 <= column < width
        return numbers[image][channel][row][column] if inside else 0.0

    out, per_group = conv.weight.shape[:2]
    scores = torch.zeros(conv.weight.shape, dtype=torch.float64)
    for o, c, i, j in itertools.product(range(out), range(per_group), range(kh), range(kw)):
        channel = o // (out // conv.groups) * per_group + c
        places = itertools.product(range(len(x)), range(n_rows), range(n_columns))
        total_of = sum(read(b, channel, p * sh + i * dh, q * sw + j * dw) ** 2 for b, p, q in places)
        scores[o, c, i, j] = abs(conv.weight[o, c, i, j].item()) * total_of**0.5
    return scores


@oracle("criteria", "wanda")
def wanda(model, sites, data, *, generator):
    read, values = {}, {}
    for site in sites:
        layer = model.get_submodule(site.layer)
        handle = layer.register_forward_pre_hook(lambda _, args, name=site.layer: read.update({name: args[0]}))
        with torch.no_grad():
            model(data.x)
        handle.remove()
        slow = slow_conv if isinstance(layer, nn.Conv2d) else lambda layer, x: slow_linear(layer.weight, x)
        values[site] = slow(layer, read[site.layer])
    return Scores(values, len(data), "wanda")
