"""Attributions made of gradients: image by image, reader by reader, and point by point of the path."""

import itertools

import numpy as np
import torch

from oracles import oracle
from oracles.matrices import units_of


def reads(model, site, x):
    """The logits of one image, and what each reader of a site holds, by hooks: [(its tensor, its member)]."""
    if site.kind == "pixel":
        x = x[None].clone().requires_grad_()
        return model(x)[0], [(x, None)]
    found, handles = {}, []
    core = [member for member in site.consumers if member.module.endswith("core")]
    places = core or list(site.consumers)
    for member in places:

        def keep(module, args, name=member.module):
            found[name] = args[0] * 1
            return (found[name],)

        handles.append(model.get_submodule(member.module).register_forward_pre_hook(keep))
    logits = model(x[None])
    for handle in handles:
        handle.remove()
    return logits[0], [(found[member.module], member) for member in places]


def point(model, site, x, target):
    """Values and slopes (U, P) of one image at one site."""
    logits, held = reads(model, site, x)
    slopes = torch.autograd.grad(logits[target], [tensor for tensor, _ in held])

    def units(tensor, member):
        return tensor[0].flatten(1) if member is None else units_of(tensor[0], member)

    values = torch.cat([units(tensor.detach(), member) for tensor, member in held], 1)
    return values, torch.cat([units(slope, member) for slope, (_, member) in zip(slopes, held, strict=True)], 1)


@oracle("attributions", "saliency")
def saliency(model, image, target, site):
    return point(model, site, image, target)[1].abs()


@oracle("attributions", "gradient_x_activation")
def gradient_x_activation(model, image, target, site):
    return torch.mul(*point(model, site, image, target))


@oracle("attributions", "internal_influence")
def internal_influence(model, image, target, site, *, steps=16, baseline=0.0):
    """The mean slope over the points of Gauss and Legendre."""
    start = torch.zeros_like(image) + baseline
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return sum(
        w / 2 * point(model, site, start + (s + 1) / 2 * (image - start), target)[1]
        for s, w in zip(nodes, weights, strict=True)
    )


@oracle("attributions", "integrated_gradients")
def integrated_gradients(model, image, target, site, *, steps=16, baseline=0.0):
    start = torch.zeros_like(image) + baseline
    change = point(model, site, image, target)[0] - point(model, site, start, target)[0]
    return change * internal_influence(model, image, target, site, steps=steps, baseline=baseline)


@oracle("attributions", "conductance")
def conductance(model, image, target, site, *, steps=16, baseline=0.0):
    """Trapezoids of the slope over the change of the value."""
    start = torch.zeros_like(image) + baseline
    along = [point(model, site, start + k / steps * (image - start), target) for k in range(steps + 1)]
    pairs = itertools.pairwise(along)
    return sum((after[0] - before[0]) * (after[1] + before[1]) / 2 for before, after in pairs)
