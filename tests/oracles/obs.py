"""OBS as its docstring reads: every price a least squares fit of its own, every gradient a run of one image."""

import copy

import torch
from torch import nn

from oracles import ORACLES, oracle
from oracles.repairs import read_and_written, rows
from oracles.whole import all_kept
from sukashi.core.types import Mask, Plan
from sukashi.network import surgery


def slopes(model, name, x, uniform):
    """sum g g' over places of all images, g the gradient of log p(c) by what the layer writes; mean of draws."""
    total = 0
    for image, us in zip(x, uniform, strict=True):
        kept = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda layer, args, output, kept=kept: kept.append(output.requires_grad_()) or output.clone()
        )
        with torch.enable_grad():
            log_p = model(image[None])[0].log_softmax(0)
        handle.remove()
        for u in us:
            drawn = int((log_p.exp().cumsum(0) < u * log_p.exp().sum()).sum())
            (slope,) = torch.autograd.grad(log_p[drawn], kept, retain_graph=True)
            places = slope[0].flatten(1).T if slope.dim() == 4 else slope
            for g in places:
                total = total + torch.outer(g, g) / len(us)
    return total


def change(x, weight, gone, damping):
    """D (M, N + 1) for which w + D reads nothing of `gone` with the least error over rows x, and x D'."""
    n = x.shape[1] - 1
    free = [i for i in range(n + 1) if i not in gone]
    root = (damping * x[:, :-1].square().sum(0).mean()).sqrt()
    below = torch.cat([root * torch.eye(n, dtype=x.dtype), torch.zeros(n, 1, dtype=x.dtype)], 1)
    all_rows = torch.cat([x, below])
    lost = all_rows[:, gone] @ weight[:, gone].T
    found = torch.zeros_like(weight)
    found[:, gone] = -weight[:, gone]
    found[:, free] = torch.linalg.lstsq(all_rows[:, free], lost, driver="gelsd").solution.T
    return found, (all_rows @ found.T)


@oracle("criteria", "obs", rtol=1e-5, atol=1e-9, positions=64, rounds=2)
def obs(model, sites, data, *, generator, error="output", rounds=2):
    keep, order, price = all_kept(sites), [], {}
    n_units = sum(site.n_units for site in sites)
    for number in range(1, rounds + 1):
        small = copy.deepcopy(model)
        table = surgery.cut(small, Mask({site: kept.clone() for site, kept in keep.items()}))
        if order:
            in_order = {name: table[name] for name, _ in model.named_modules() if name in table}
            ORACLES["repairs", "refit"](small, model, in_order, data.x, {})
        uniform = torch.rand(len(data), 3, generator=generator, dtype=torch.float64)
        for position, (site, now) in enumerate(zip(sites, surgery.renumber(sites, Mask(keep)), strict=True)):
            ((reader, index),) = [(member.module, member.index) for member in now.consumers]
            layer = small.get_submodule(reader)
            read, put = read_and_written(small, reader, data.x)
            x, _ = rows(layer, read, put)
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            if error == "output":  # P / 2 F, of a mean over places
                weights = len(x) / len(data) / 2 * slopes(small, reader, data.x, uniform) / len(x)
            else:
                flat = rows(layer, read, put)[1]
                weights = torch.eye(flat.shape[1], dtype=x.dtype) / (flat - flat.mean(0)).square().mean(0).sum()
            taps = 1 if isinstance(layer, nn.Linear) else layer.kernel_size[0] * layer.kernel_size[1]
            weight = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1)
            units = torch.nonzero(keep[site]).flatten().tolist()
            left, gone, reached, highest = list(range(len(units))), [], 0.0, 0.0
            while left:
                rises = []
                for unit in left:
                    inputs = [p * taps + tap for p in index[unit] for tap in range(taps)]
                    _, off = change(x, weight, [*gone, *inputs], 1e-3)
                    rises.append(float((off @ weights * off).sum() / len(x)) - reached)
                best = min(range(len(left)), key=rises.__getitem__)
                reached += rises[best]
                highest = max(highest, rises[best])
                unit = left.pop(best)
                gone += [p * taps + tap for p in index[unit] for tap in range(taps)]
                price[position, units[unit]] = highest
        n_gone = n_units * number // rounds - len(order)
        for pair in sorted(set(price) - set(order), key=lambda pair: (price[pair], pair)):
            if n_gone and keep[sites[pair[0]]].sum() > 1:
                keep[sites[pair[0]]][pair[1]] = False
                order.append(pair)
                n_gone -= 1
    order += sorted(set(price) - set(order), key=lambda pair: (price[pair], pair))
    return Plan.build(sites, order, method="obs", effect=price, n_images=len(data), n_evaluations=0)
