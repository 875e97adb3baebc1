"""Measures of a map that take pixels in its order: loops over images, percentages and pixels."""

from itertools import pairwise

import numpy as np
import torch

from oracles import oracle
from oracles.imputation import solved

TIGHT = 1e-13
PERCENTAGES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def ordered(image_map, sign):
    """Pixel numbers by value, least first (sign 1) or greatest first (sign -1), ties by position."""
    values = image_map.flatten().tolist()
    return sorted(range(len(values)), key=lambda pixel: (sign * values[pixel], pixel))


def answer(model, image, target):
    """Right or not, and the target's probability."""
    with torch.no_grad():
        logits = model(image[None])[0]
    return float(int(logits.argmax()) == int(target)), float(torch.softmax(logits, 0)[target])


def removed(model, image, target, image_map, order, percentage):
    """Right or not, and the target's probability, after that share of the pixels went, the rest imputed."""
    missing = torch.zeros(image_map.numel(), dtype=torch.bool)
    missing[ordered(image_map, -1 if order == "morf" else 1)[: int(image_map.numel() * percentage / 100)]] = True
    return answer(model, solved(image, missing.view(image_map.shape)), target)


@oracle("measures", "road", noise=0.0, tolerance=TIGHT)
def road(model, batch, maps):
    """The mean over percentages of right with the least relevant gone, less right with the most relevant gone."""
    found = {"": [], "probability": []}
    for row in zip(batch.x, batch.target, maps.values, strict=True):
        least, most = ([removed(model, *row, order, p) for p in PERCENTAGES] for order in ("lerf", "morf"))
        for i, values in enumerate(found.values()):
            gaps = [one[i] - other[i] for one, other in zip(least, most, strict=True)]
            values.append(sum(gaps) / len(PERCENTAGES))
    return found


@oracle("measures", "aopc", noise=0.0, tolerance=TIGHT)
def aopc(model, batch, maps):
    """The mean over percentages of right with all there, less right with the most relevant gone."""
    found = {"": [], "probability": []}
    for row in zip(batch.x, batch.target, maps.values, strict=True):
        whole, *later = (removed(model, *row, "morf", p) for p in (0, *PERCENTAGES))
        for i, values in enumerate(found.values()):
            values.append(sum(whole[i] - left[i] for left in later) / len(PERCENTAGES))
    return found


def replaced(model, first, last, target, image_map, step):
    """The area under the target's probability while one image's pixels become another's, most relevant first."""
    image, order, width = first.clone(), ordered(image_map, -1), image_map.shape[1]
    heights = [answer(model, image, target)[1]]
    for start in range(0, len(order), step):
        for pixel in order[start : start + step]:
            image[:, pixel // width, pixel % width] = last[:, pixel // width, pixel % width]
        heights.append(answer(model, image, target)[1])
    return sum((one + other) / 2 for one, other in pairwise(heights)) / (len(heights) - 1)


@oracle("measures", "insertion")
def insertion(model, batch, maps, *, step=None, baseline="zeros"):
    """From the baseline to the image."""
    start = blurred(batch.x) if baseline == "blur" else torch.zeros_like(batch.x)
    rows = zip(start, batch.x, batch.target, maps.values, strict=True)
    return {"": [replaced(model, *row, step or batch.x.shape[3]) for row in rows]}


@oracle("measures", "deletion")
def deletion(model, batch, maps, *, step=None, baseline="zeros"):
    """From the image to the baseline."""
    end = blurred(batch.x) if baseline == "blur" else torch.zeros_like(batch.x)
    rows = zip(batch.x, end, batch.target, maps.values, strict=True)
    return {"": [replaced(model, *row, step or batch.x.shape[3]) for row in rows]}


def blurred(x):
    """A Gaussian of sigma 5 over 11 x 11 pixels, mirrored at the edges, as sums."""
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
    line = np.exp(-0.5 * (np.arange(-5, 6) / 5.0) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    found = np.zeros(x.shape)
    for y in range(x.shape[2]):
        for across in range(x.shape[3]):
            found[:, :, y, across] = (padded[:, :, y : y + 11, across : across + 11] * weights).sum((2, 3))
    return torch.from_numpy(found)
