"""Sequences of layers as matrices, for rules that go back through them layer by layer."""

import torch
import torch.nn.functional as F


def traced(model, image):
    """[(layer, what it reads, what it writes)] of a sequence, for one image (C, H, W)."""
    found, x = [], image[None]
    with torch.no_grad():
        for layer in model:
            before, x = x, layer(x)
            found.append((layer, before, x))
    return found


def dense(layer, shape):
    """A linear layer over inputs of a shape as a matrix (inputs, outputs) and a shift."""
    n = torch.Size(shape).numel()
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape, dtype=torch.float64))
        weight = layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - bias
    return weight.flatten(1), bias.flatten()


def windows(layer, before):
    """((channel, row, column) of an output, the places (channel, row, column) it reads) of a square max-pool."""
    channels, height, width = before.shape
    k, stride, pad = layer.kernel_size, layer.stride, layer.padding
    with torch.no_grad():
        _, n_rows, n_columns = F.max_pool2d(before, k, stride, pad).shape
    for c in range(channels):
        for i in range(n_rows):
            for j in range(n_columns):
                rows = range(max(0, stride * i - pad), min(height, stride * i - pad + k))
                columns = range(max(0, stride * j - pad), min(width, stride * j - pad + k))
                yield (c, i, j), [(c, a, b) for a in rows for b in columns]


def units_of(tensor, member):
    """(U, positions) of one reader, out of one image's (C, H, W), (T, features) or (features,)."""
    tensor = tensor if tensor.dim() == 3 else tensor.movedim(-1, 0)
    return torch.stack([tensor[list(index)].flatten() for index in member.index])


def of_site(at_inputs, site):
    """(U, positions) of a site, out of what one image has at the input of each layer of a sequence."""
    if site.kind == "pixel":
        return at_inputs[0].flatten(1)
    return torch.cat([units_of(at_inputs[int(reader.module)], reader) for reader in site.consumers], 1)
