"""Repairs by whole runs of the network, unfolded windows and one dense solve a layer."""

import torch
from torch import nn

from oracles import oracle

DAMPING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def read_and_written(model, name, x):
    """What a layer reads and writes when the network runs on x."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    (both,) = seen
    return both


def rows(layer, read, written):
    """Windows and what is written there, image by image and position by position."""
    if isinstance(layer, nn.Linear):
        return read, written
    unfolded = nn.functional.unfold(read, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1), written.flatten(2).transpose(1, 2).flatten(0, 1)


def least_squares(x, y, weight, damping):
    """min |x w + b - y|^2 + lambda |w - weight|^2: the rows, and those of the penalty below them, solved as one."""
    n = x.shape[1]
    root = (damping * x.square().sum(0).mean()).sqrt()
    above = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    below = torch.cat([root * torch.eye(n, dtype=x.dtype), torch.zeros(n, 1, dtype=x.dtype)], 1)
    rows, right = torch.cat([above, below]), torch.cat([y, root * weight.T])
    found = torch.zeros(n + 1, len(weight), dtype=x.dtype)
    for output, own in enumerate(weight):
        live = [*torch.nonzero(own).flatten().tolist(), n]
        found[live, output] = torch.linalg.lstsq(rows[:, live], right[:, output], driver="gelsd").solution
    return found[:-1].T, found[-1]


@oracle("repairs", "refit", rtol=1e-7, atol=1e-9)
def refit(model, dense, table, x, norms, sums=None):
    """`norms` {a layer: the BatchNorm behind it}; `sums` {a layer: that which gives what its branch is added to}.
    Layers run in the order of their names in the network, and are refitted from the first reader of what was cut on.
    A weight that is zero stays so.
    """
    sums = sums or {}
    held_out = torch.arange(len(x)) % 5 == 4
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    first = min(layers.index(name) for name, sides in table.items() if {"in", "weights"} & sides.keys())
    for name in layers[first:]:
        layer = model.get_submodule(name)
        target, kept = read_and_written(dense, name, x)[1], table.get(name, {}).get("out")
        target = target if kept is None else target[:, kept]
        factor = torch.ones(target.shape[1], dtype=x.dtype)
        if name in norms:
            norm = model.get_submodule(norms[name])
            factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        if name in sums:  # what the branch itself would have to write
            lost = read_and_written(dense, sums[name], x)[1]
            lost = (lost if kept is None else lost[:, kept]) - read_and_written(model, sums[name], x)[1]
            target = target + lost / factor.view(-1, *[1] * (lost.dim() - 2))
        read = read_and_written(model, name, x)[0]
        fit, held = (rows(layer, read[part], target[part]) for part in (~held_out, held_out))
        before = layer.weight.detach().flatten(1)
        errors = []
        for damping in DAMPING:
            weight, bias = least_squares(*fit, before, damping)
            errors.append(float((factor * (held[0] @ weight.T + bias - held[1])).square().sum()))
        shift = 0 if layer.bias is None else layer.bias.detach()
        if min(errors) >= float((factor * (held[0] @ before.T + shift - held[1])).square().sum()):
            continue
        weight, bias = least_squares(*rows(layer, read, target), before, DAMPING[errors.index(min(errors))])
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
            if layer.bias is None:
                model.get_submodule(norms[name]).running_mean.sub_(bias)
            else:
                layer.bias.copy_(bias)


@oracle("repairs", "norm", rtol=1e-9, atol=1e-11)
def norm(model, dense, table, x, norms):
    for name in norms.values():
        read = read_and_written(model, name, x)[0].transpose(0, 1).flatten(1)
        model.get_submodule(name).running_mean.copy_(torch.stack([of.mean() for of in read]))
        model.get_submodule(name).running_var.copy_(torch.stack([of.var() for of in read]))
