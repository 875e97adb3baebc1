"""Imputation against the linear system written out pixel by pixel and solved directly, and against two peers."""

import numpy as np
import pytest
import torch

from oracles.imputation import solved
from sukashi.core.errors import DataError, UsageError
from sukashi.measures import imputation
from sukashi.measures.imputation import impute


def scene(height, width, n_images=6, n_channels=3, seed=0):
    """Images, and holes from a tenth to nine tenths: half of them scattered, half of them in one piece."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_images, n_channels, height, width, generator=generator, dtype=torch.float64)
    scattered = torch.rand(n_images, height, width, generator=generator)
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    blob = (down - 0.3) ** 2 + across**2
    heat = torch.where(torch.arange(n_images)[:, None, None] % 2 == 0, scattered, blob)
    ranks = heat.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).view_as(heat)
    shares = torch.linspace(0.1, 0.9, n_images)
    return 3 + 2 * x, ranks < (shares * height * width).long()[:, None, None]


@pytest.mark.parametrize(("height", "width"), [(1, 9), (2, 2), (5, 4), (8, 8), (13, 18), (33, 32), (48, 40)])
def test_it_solves_the_equations(height, width):
    x, missing = scene(height, width)
    found = impute(x, missing, tolerance=1e-12)
    expected = torch.stack([solved(*pair) for pair in zip(x, missing, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_what_is_known_keeps_its_bits_and_the_callers_tensors_are_left_alone():
    x, missing = scene(16, 16)
    x = x.float()
    kept = x.clone(), missing.clone()
    found = impute(x, missing)
    known = (~missing)[:, None].expand_as(x)
    assert torch.equal(found[known], x[known])
    assert (found[~known] != x[~known]).all()
    assert torch.equal(x, kept[0])
    assert torch.equal(missing, kept[1])


def test_nothing_missing_and_all_but_one_pixel():
    x, missing = scene(12, 12, n_images=2)
    missing[0] = False
    missing[1] = True
    missing[1, 3, 7] = False
    found = impute(x, missing, tolerance=1e-12)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x[1, :, 3:4, 7:8].expand(-1, 12, 12), rtol=0, atol=1e-10)


def test_a_slope_goes_on_through_a_hole():
    """Away from the edges a linear image is its own imputation: every neighbourhood's mean is its centre."""
    slope = 2 * torch.arange(20.0, dtype=torch.float64)[:, None] - torch.arange(20.0, dtype=torch.float64)
    missing = torch.zeros(1, 20, 20, dtype=torch.bool)
    missing[0, 4:15, 3:17] = True
    torch.testing.assert_close(impute(slope[None, None], missing, tolerance=1e-13)[0, 0], slope, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [32, 96])
def test_the_default_in_float32_is_near_enough(side):
    x, missing = scene(side, side, n_images=8)
    found = impute(x.float(), missing).double()
    expected = impute(x, missing, tolerance=1e-12)
    assert (found - expected).abs().max() < 2e-3 * x.std()


def test_each_image_is_imputed_on_its_own(monkeypatch):
    x, missing = scene(24, 20, n_images=9)
    x = x.float()
    whole = impute(x, missing)
    monkeypatch.setattr(imputation, "CACHED", 3000)  # two images at a time
    torch.testing.assert_close(impute(x, missing), whole, rtol=0, atol=1e-5)
    alone = torch.cat([impute(x[i : i + 1], missing[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_it_follows_scale_and_shift():
    x, missing = scene(24, 20)
    torch.testing.assert_close(impute(5 - 3 * x, missing), 5 - 3 * impute(x, missing), rtol=0, atol=1e-10)


def test_the_number_of_steps_does_not_grow_with_the_image(monkeypatch):
    counts = {}
    monkeypatch.setattr(imputation, "CACHED", 10**9)
    cycle = imputation._v_cycle
    for side in (32, 128, 256):
        seen = []
        monkeypatch.setattr(imputation, "_v_cycle", lambda grids, r, seen=seen: seen.append(len(r)) or cycle(grids, r))
        x, missing = scene(side, side, n_images=6)
        impute(x, missing)
        counts[side] = seen.count(side)
    assert counts[256] <= counts[32] * 1.3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, missing: (x, missing | True, 1e-4), UsageError, "no known pixel"),
        (lambda x, missing: (x.float(), missing, 1e-9), UsageError, "tolerance must be in"),
        (lambda x, missing: (x, missing, 1.0), UsageError, "tolerance must be in"),
        (lambda x, missing: (x.where(x < x.max(), torch.nan), missing, 1e-4), DataError, "NaN or Inf"),
    ],
)
def test_what_cannot_be_imputed_is_refused(change, error, message):
    x, missing, tolerance = change(*scene(8, 8))
    with pytest.raises(error, match=message):
        impute(x, missing, tolerance=tolerance)


def test_steps_that_do_not_suffice_are_refused(monkeypatch):
    monkeypatch.setattr(imputation, "LIMIT", 2)
    with pytest.raises(DataError, match="did not reach tolerance"):
        impute(*scene(16, 16))


def test_pytorch_grad_cam_gives_the_same():
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    x, missing = scene(40, 32)
    peer = road.NoisyLinearImputer(noise=0)
    for image, holes, found in zip(x, missing, impute(x, missing, tolerance=1e-11), strict=True):
        expected = peer(image.float(), (~holes).float())
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=3e-6)  # theirs goes through float32


def test_quantus_gives_the_same():
    quantus = pytest.importorskip("quantus.functions.perturb_func")
    x, missing = scene(32, 40)
    for image, holes, found in zip(x, missing, impute(x, missing, tolerance=1e-11), strict=True):
        holes = np.flatnonzero(holes.numpy())
        expected = quantus.noisy_linear_imputation(arr=image.numpy(), indices=holes, noise=0.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
