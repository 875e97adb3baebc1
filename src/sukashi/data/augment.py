"""Random views of training images, drawn for each image by itself and applied to a batch at once.

What an image looks like in an epoch depends on the seed, the epoch and its place in the training split alone: not on
its batch, on threads, on processes or on where a run was interrupted. Each kind is one affine map of the square, whose
inverse says where each pixel of the view is read (bilinear, black outside).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels of an image of 32 that a crop may be moved by (He et al. 2016, sec. 4.2): an eighth of the side.
SHIFT = 1 / 8
# Area of a crop and its aspect. torchvision starts at 8 % of the original; ours is taken after the fit to the model's
# size, where so little is a blur.
SCALE = (0.35, 1.0)
ASPECT = (3 / 4, 4 / 3)
# For images that have an up and a left: degrees, share of the side, share of the size.
TURN, MOVE, ZOOM = 10.0, 0.05, 0.1

_N_DRAWS = 5


def draws(n_images: int, seed: int, epoch: int) -> Tensor:
    """(N, 5) uniform numbers in [0, 1) that make the view of each image in an epoch."""
    generator = torch.Generator().manual_seed(derived(seed, epoch, 1))
    return torch.rand(n_images, _N_DRAWS, generator=generator)


def derived(*numbers: int) -> int:
    """One seed of 63 bits from several numbers, which near ones do not share."""
    mixed = 0
    for number in numbers:  # the finaliser of splitmix64 over a running sum
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def crop_flip(u: Tensor, height: int, width: int) -> Tensor:
    """Mirrored or not, moved by a whole number of pixels up to SHIFT of each side: (B, 2, 3)."""
    reach = torch.tensor([round(SHIFT * width), round(SHIFT * height)])
    pixels = (u[:, 1:3] * (2 * reach + 1)).floor() - reach
    return _map(_mirror(u[:, 0]), torch.ones(len(u)), 2 * pixels / torch.tensor([width, height]))


def resized_crop(u: Tensor, height: int, width: int) -> Tensor:
    """A part of SCALE of the area and of ASPECT times the image's, mirrored or not, fitted to the whole: (B, 2, 3).

    Uniform in the area and in the logarithm of the aspect, as torchvision's RandomResizedCrop; a side that would be
    longer than the image's is cut there, where that one would draw again.
    """
    area = SCALE[0] + (SCALE[1] - SCALE[0]) * u[:, 1]
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * u[:, 2])
    side = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)
    return _map(_mirror(u[:, 0]) * side[:, 0], side[:, 1], (1 - side) * (2 * u[:, 3:5] - 1))


def affine(u: Tensor, height: int, width: int) -> Tensor:
    """Turned by up to TURN degrees, moved by up to MOVE of each side, ZOOM larger or smaller: (B, 2, 3)."""
    angle = math.radians(TURN) * (2 * u[:, 0] - 1)
    zoom = 1 / (1 + ZOOM * (2 * u[:, 1] - 1))
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    move = 2 * MOVE * (2 * u[:, 2:4] - 1)
    along_x = torch.stack([cos, -sin * (height / width), move[:, 0]], 1)
    along_y = torch.stack([sin * (width / height), cos, move[:, 1]], 1)
    return torch.stack([along_x, along_y], 1)


AUGMENTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "crop_flip": crop_flip,
    "resized_crop": resized_crop,
    "affine": affine,
}


def view(x: Tensor, theta: Tensor) -> Tensor:
    """The images x (B, C, H, W) in [0, 1] as the maps theta (B, 2, 3) show them."""
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _mirror(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0)


def _map(x: Tensor, y: Tensor, move: Tensor) -> Tensor:
    """(B, 2, 3) of scales along x and y, and a move (B, 2), in the square [-1, 1]."""
    zero = torch.zeros_like(x)
    return torch.stack([torch.stack([x, zero, move[:, 0]], 1), torch.stack([zero, y, move[:, 1]], 1)], 1)
