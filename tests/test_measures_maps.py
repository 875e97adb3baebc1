"""Measures of maps against loops and scipy, in float64."""

import math

import numpy as np
import pytest
import torch

from oracles import ORACLES
from sukashi.core.errors import UsageError
from sukashi.core.types import Maps
from sukashi.measures import measures


def of_images(tensor):
    return Maps(tensor, tuple(map(str, range(len(tensor)))))


def gini(maps):
    return measures["gini"](of_images(maps)).values


def localisation(maps, masks):
    return measures["localisation"](of_images(maps), {"there": of_images(masks)})["there"].values


def rank_correlation(one, other):
    return measures["rank_correlation"](of_images(one), of_images(other)).values


def ssim(one, other):
    return measures["ssim"](of_images(one), of_images(other)).values


def top_overlap(one, other, **options):
    return measures["top_overlap"](of_images(one), of_images(other), **options).values


ALIKE = (rank_correlation, ssim, top_overlap)


def drawn(n=6, side=(9, 12), seed=0):
    return torch.randn(n, *side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tied(maps):
    """The same with many equal pixels, zeros of both signs among them."""
    return (2 * maps).round() * 0.5 * torch.tensor([1.0, -1.0]).repeat(len(maps))[: len(maps), None, None]


def test_gini_is_equation_1():
    maps = drawn(3, (7, 5))
    assert gini(maps).tolist() == pytest.approx(ORACLES["measures", "gini"](maps), abs=1e-14)


def test_gini_in_closed_form():
    one = torch.zeros(8, 6)
    one[2, 3] = -7.0
    half = torch.cat([torch.zeros(4, 6), torch.full((4, 6), 3.0)])
    odd = torch.ones(8, 6), torch.zeros(8, 6), one.where(one != 0, torch.nan), one.where(one == 0, torch.inf)
    found = gini(torch.stack([one, half, *odd])).tolist()
    assert found[:3] == pytest.approx([1 - 1 / 48, 0.5, 0.0], abs=1e-15)
    assert all(math.isnan(value) for value in found[3:])


def test_gini_sums_float32_maps_in_float64():
    maps = drawn(2, (224, 224)).float()
    torch.testing.assert_close(gini(maps), gini(maps.double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_of_any_precision_are_measured(dtype):
    maps, beside = drawn().to(dtype), drawn(seed=1).to(dtype)
    for found, expected in (
        (gini(maps), gini(maps.double())),
        (localisation(maps, beside > 0), localisation(maps.double(), beside > 0)),
        *((measure(maps, beside), measure(maps.double(), beside.double())) for measure in ALIKE),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_quantus_gini_is_the_same_but_for_what_it_adds():
    quantus = pytest.importorskip("quantus")
    maps = drawn(4, (32, 32)).abs() + 0.1
    peer = quantus.Sparseness(abs=True, normalise=False, disable_warnings=True)
    expected = peer.evaluate_batch(x_batch=None, a_batch=maps.flatten(1).numpy().copy())
    np.testing.assert_allclose(gini(maps).numpy(), expected, rtol=0, atol=1e-6)


def test_localisation_is_the_share_of_positive_relevance_inside():
    maps, masks = drawn(), drawn(seed=1) > 0.7
    assert localisation(maps, masks).tolist() == pytest.approx(
        ORACLES["measures", "localisation"](maps, masks), rel=1e-12
    )
    even = localisation(torch.ones(1, 4, 4), torch.arange(16).view(1, 4, 4) < 4)
    assert even.tolist() == [0.25]


def test_localisation_has_no_value_where_nothing_could_be_said():
    maps, masks = drawn(4), torch.ones(4, 9, 12, dtype=torch.bool)
    maps[0] = -maps[0].abs()
    maps[1, 2, 3] = math.nan
    masks[2] = False
    found = localisation(maps, masks)
    assert found[:3].isnan().all()
    assert found[3] == 1
    with pytest.raises(UsageError, match="masks are of dtype"):
        localisation(maps, masks.float())


@pytest.mark.parametrize("change", [lambda maps: maps, tied])
def test_rank_correlation_is_scipys(change):
    one, other = change(drawn()), change(drawn() + drawn(seed=1))
    expected = ORACLES["measures", "rank_correlation"](one, other)
    assert rank_correlation(one, other).tolist() == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(one, one.exp()).tolist() == pytest.approx([1] * 6)
    assert rank_correlation(one, -one).tolist() == pytest.approx([-1] * 6)


@pytest.mark.parametrize("change", [lambda maps: maps, tied])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.37, 1.0])
def test_the_highest_pixels_are_exactly_k_and_the_first_of_equals(change, fraction):
    one, other = change(drawn()), change(drawn() + drawn(seed=1))
    found = top_overlap(one, other, fraction=fraction)
    assert found.tolist() == pytest.approx(ORACLES["measures", "top_overlap"](one, other, fraction=fraction))


def test_ssim_is_its_equation_on_maps_of_one_scale():
    one, other = drawn(2), drawn(2) + drawn(2, seed=1)
    found = ssim(one, other)
    assert found.tolist() == pytest.approx(ORACLES["measures", "ssim"](one, other), rel=1e-9)
    torch.testing.assert_close(ssim(1e6 * one, 1e-6 * other), found)
    assert ssim(one, one).tolist() == pytest.approx([1, 1])
    positive = one.abs(), other.abs()
    assert ssim(*positive).tolist() == pytest.approx(ORACLES["measures", "ssim"](*positive), rel=1e-9)
    with pytest.raises(UsageError, match=r"maps of 5 x 8 pixels are too small for SSIM: 6 a side"):
        ssim(one[:, :5, :8], one[:, :5, :8])


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m - m.mean((1, 2), keepdim=True), lambda m: m.clamp(min=-0.1)])
def test_a_map_and_its_negative_are_far_apart(make):
    maps = make(drawn(4, (32, 32)))
    assert (ssim(maps, -maps) < 0).all()
    assert ssim(maps, maps).tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("measure", ALIKE)
def test_a_map_that_says_nothing_has_no_similarity_and_leaves_the_others_alone(measure):
    one, other = drawn(), drawn() + drawn(seed=1)
    expected = measure(one, other)
    one[0], other[1] = 0.0, 3.0
    one[2, 0, 0], other[3, 1, 1] = math.nan, math.inf
    found = measure(one, other)
    assert found[:4].isnan().all()
    assert torch.equal(found[4:], expected[4:])
    assert expected.isfinite().all()


@pytest.mark.parametrize("measure", [localisation, *ALIKE])
def test_maps_of_other_shapes_are_refused(measure):
    with pytest.raises(UsageError, match=r"\(6, 9, 12\) .* \(6, 9, 11\)"):
        measure(drawn(), drawn(side=(9, 11)) > 0)
    with pytest.raises(UsageError, match="fraction of top_overlap must be"):
        top_overlap(drawn(), drawn(), fraction=0.0)
    with pytest.raises(UsageError, match=r"\(9, 12\) of 9 images must be \(images, height, width\)"):
        gini(drawn()[0])


@pytest.mark.parametrize("name", ["localisation", *(measure.__name__ for measure in ALIKE)])
def test_maps_of_other_images_are_refused(name):
    one, other = of_images(drawn()), Maps(drawn() > 0, tuple("012354"))
    with pytest.raises(UsageError, match="are of different images, or in another order"):
        measures[name](one, {"there": other} if name == "localisation" else other)


def test_localisation_is_of_each_concept():
    maps, masks = drawn(), {"a": drawn(seed=1) > 0, "b": drawn(seed=2) > 1}
    found = measures["localisation"](of_images(maps), {name: of_images(mask) for name, mask in masks.items()})
    assert list(found) == ["a", "b"]
    for name, mask in masks.items():
        assert torch.equal(found[name].values, localisation(maps, mask))
