"""Views against torchvision's own transforms, and that each image's follows from seed, epoch and place alone."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from sukashi.data import augment

X = torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_draws_follow_from_seed_epoch_and_place():
    first = augment.draws(50, 3, 7)
    assert torch.equal(first, augment.draws(50, 3, 7))
    assert torch.equal(first[:20], augment.draws(20, 3, 7))  # not from how many images there are
    for seed, epoch in ((4, 7), (3, 8), (7, 3)):
        assert not torch.equal(first, augment.draws(50, seed, epoch))
    assert first.min() >= 0
    assert first.max() < 1


def test_crop_flip_is_pad_crop_and_mirror():
    u = augment.draws(len(X), 0, 0)
    u[:2, 0] = torch.tensor([0.2, 0.8])  # one of each
    seen = augment.view(X, augment.crop_flip(u, 16, 24))
    moves = set()
    for image, draw, found in zip(X, u, seen, strict=True):
        right, down = int(draw[1] * 7), int(draw[2] * 5)  # of a padding of 3 and of 2
        moves.add((right, down))
        expected = tv.crop(tv.pad(image, [3, 2]), down, right, 16, 24)
        expected = tv.horizontal_flip(expected) if draw[0] < 0.5 else expected
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(moves) > 3


def test_resized_crop_is_crop_and_resize():
    u = torch.tensor([[0.9, 0.0, 0.5, 0.0, 1.0]])
    u[0, 1] = (0.5625 - augment.SCALE[0]) / (augment.SCALE[1] - augment.SCALE[0])  # 3/4 of each side, at a corner
    found = augment.view(X[:1], augment.resized_crop(u, 16, 24))
    expected = F.interpolate(X[:1, :, 4:, :18], (16, 24), mode="bilinear")
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


def test_resized_crops_stay_inside_and_reach_every_corner():
    theta = augment.resized_crop(augment.draws(2000, 0, 0), 16, 24)
    low, high = theta[:, :, 2] - theta[:, :, :2].abs().sum(2), theta[:, :, 2] + theta[:, :, :2].abs().sum(2)
    assert low.min() >= -1 - 1e-6
    assert high.max() <= 1 + 1e-6
    assert low.min() < -0.99
    assert high.max() > 0.99
    areas = theta[:, 0, 0].abs() * theta[:, 1, 1]
    assert 0.3 < areas.min() < 0.36
    assert areas.max() > 0.95


@pytest.mark.parametrize("turned", [0.0, 0.25, 1.0])
def test_affine_is_a_rotation_on_a_canvas_that_is_not_square(turned):
    u = torch.tensor([[turned, 0.5, 0.5, 0.5]])
    found = augment.view(X[:1], augment.affine(u, 16, 24))
    expected = tv.rotate(X[:1], augment.TURN * (2 * turned - 1), tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_affine_moves_and_zooms():
    u = torch.tensor([[0.5, 0.5, 1.0, 0.5], [0.5, 1.0, 0.5, 0.5]])
    move, zoom = augment.affine(u, 16, 24)
    assert move.tolist() == [[1, 0, pytest.approx(0.1)], [0, 1, 0]]
    assert zoom[0, 0] == pytest.approx(1 / 1.1)  # larger by a tenth


def test_near_seeds_are_far_apart():
    seeds = {augment.derived(a, b, c) for a in range(10) for b in range(10) for c in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
