"""Measures: accuracy, curves and SAUCE against closed forms and masked networks; costs against sums done by hand."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import a_curve
from sukashi import models
from sukashi.core import stats
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Batch, Mask, Plan, Scores, rank
from sukashi.criteria import pruning
from sukashi.measures import cost, measures
from sukashi.measures import curves as of_cuts
from sukashi.models import saved
from sukashi.network import hooks, sites, surgery


@pytest.fixture(scope="module", params=["sukashi:digits_cnn", "sukashi:digits_vit"])
def scene(request):
    """A model, its sites, a plan with two passes, and images whose targets the model half knows."""
    torch.manual_seed(1)
    loaded = models.load(request.param)
    x = torch.randn(60, 1, 8, 8)
    with torch.no_grad():
        target = loaded.model(x).argmax(1)
    target[::2] = torch.arange(30) % 10
    found = sites.find(loaded.model, x[:2]).sites
    ranking = rank(Scores({site: torch.rand(site.n_units) for site in found}, 1, "random"))
    fields = {name: getattr(ranking, name) for name in ("site", "unit", "category", "effect", "p_values")}
    plan = Plan(sites=found, **fields, method="random", passes=(10, 40))
    return loaded, found, plan, Batch(x, target, tuple(f"image-{i}" for i in range(60)))


class Fixed(nn.Module):
    """Gives the logits it reads."""

    def forward(self, x):
        return x.flatten(1)


# Accuracy.


def _accuracy(model, batch):
    return measures["accuracy"](model, batch).values


def test_accuracy_of_known_logits():
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 1.0], [0.0, 0.0, -1.0]])[:, :, None, None]
    batch = Batch(x, torch.tensor([1, 2, 0]), ("a", "b", "c"))
    assert _accuracy(Fixed(), batch).tolist() == [1.0, 0.0, 1.0]


def test_accuracy_refuses_what_means_nothing():
    x = torch.tensor([[1.0, float("nan")]])[:, :, None, None]
    with pytest.raises(ModelError, match="NaN"):
        _accuracy(Fixed(), Batch(x, torch.tensor([0]), ("a",)))
    with pytest.raises(DataError, match="target 2 is no class of a model with 2 logits"):
        _accuracy(Fixed(), Batch(torch.zeros(1, 2, 1, 1), torch.tensor([2]), ("a",)))


# Curves.


def test_curve_equals_the_masked_network(scene):
    loaded, found, plan, batch = scene
    curve = of_cuts.curve(loaded.model, found, plan, [0.3, 0.1, 0.6], batch)
    n_units = plan.n_units
    counts = sorted([0, round(0.1 * n_units), round(0.3 * n_units), round(0.6 * n_units), 10, 40])
    assert curve.n_removed.tolist() == counts
    assert curve.image_ids == batch.image_id
    assert curve.correct.dtype == np.uint8
    for ratio, n_removed, fraction, correct in zip(
        curve.ratio, curve.n_removed, curve.fraction, curve.correct, strict=True
    ):
        assert np.isnan(ratio) == (n_removed in plan.passes)
        mask = plan.mask_of(int(n_removed))
        with torch.no_grad(), hooks.ablated(loaded.model, mask):
            expected = loaded.model(batch.x).argmax(1) == batch.target
        np.testing.assert_array_equal(correct, expected.numpy())
        small = copy.deepcopy(loaded.model)
        surgery.cut(small, Mask({site: mask.keep[site] for site in found}))
        left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in loaded.model.parameters())
        assert fraction == pytest.approx(1 - left, abs=1e-12)
    assert curve.fraction[0] == 0
    assert 0.4 < curve.accuracy[0] < 0.75
    assert (np.diff(curve.fraction) > 0).all()


def test_curve_does_not_depend_on_batches_or_order(scene):
    loaded, found, plan, batch = scene
    one = of_cuts.curve(loaded.model, found, plan, [0.0, 0.5], batch)
    other = of_cuts.curve(loaded.model, found[::-1], plan, [0.5, 0.5, 0.0], list(batch.split(7)))
    for name in ("ratio", "n_removed", "fraction", "correct"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_curve_evaluates_a_cut_once_and_leaves_the_model(scene, monkeypatch):
    loaded, found, plan, batch = scene
    cuts = []
    counted = lambda model, mask: cuts.append(mask.n_removed) or surgery.cut(model, mask)  # noqa: E731
    monkeypatch.setitem(surgery.MODES, "cut", counted)
    before = copy.deepcopy(loaded.model.state_dict())
    curve = of_cuts.curve(loaded.model, found, plan, [0.0, 10 / plan.n_units, 0.99, 0.995], batch)
    assert cuts == [0, 10, 40, plan.n_removable]
    assert curve.n_removed.tolist() == [0, 10, 10, 40, plan.n_removable, plan.n_removable]
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_a_curve_of_zeroed_units_has_the_accuracy_of_the_cut_over_the_share_of_units(scene):
    loaded, found, plan, batch = scene
    cut = of_cuts.curve(loaded.model, found, plan, [0.0, 0.3, 0.6], batch)
    zero = of_cuts.curve(loaded.model, found, plan, [0.0, 0.3, 0.6], batch, mode="zero")
    np.testing.assert_array_equal(zero.correct, cut.correct)
    np.testing.assert_allclose(zero.fraction, cut.n_removed / plan.n_units)


# What may go without loss.


def _answers(n, *n_lost):
    """Rows of n answers, all right but for the last `n_lost`."""
    return [np.arange(n) < n - lost for lost in (0, *n_lost)]


def test_lossless_is_the_last_cut_before_the_first_that_is_not_shown():
    found = of_cuts.lossless([a_curve(_answers(1000, 0, 5, 200, 0))], 0.02)
    assert found == 0.2, "the fourth cut passes again, after one that failed"
    assert of_cuts.lossless([a_curve(_answers(1000, 15))], 0.02) == 0, "15 of 1,000 lost is not shown to be under 20"
    assert of_cuts.lossless([a_curve(_answers(100, 0))], 0.01) == 0.0, "100 images can't show a margin of 1 %"
    assert of_cuts.lossless([a_curve(_answers(100))], 0.5) == 0.0, "nothing but the dense network"
    passes = a_curve(_answers(1000, 0, 200, 0), ratio=[0, 0.1, np.nan, 0.3])
    assert of_cuts.lossless([passes], 0.02) == 0.3, "what a pass left is no ratio that was asked for"


def test_lossless_holds_for_every_seed():
    one, two = a_curve(_answers(1000, 0, 0, 200)), a_curve(_answers(1000, 0, 200, 200))
    assert of_cuts.lossless([one], 0.02) == 0.2
    assert of_cuts.lossless([one, two], 0.02) == of_cuts.lossless([two, one], 0.02) == 0.1
    with pytest.raises(UsageError, match="different ratios"):
        of_cuts.lossless([one, a_curve(_answers(1000, 0))], 0.02)


def test_a_stricter_level_names_less():
    curve = [a_curve(_answers(1000, 8))]
    assert (of_cuts.lossless(curve, 0.02), of_cuts.lossless(curve, 0.02, level=0.999)) == (0.1, 0.0)


def test_lossless_does_not_name_a_cut_that_loses_more_than_the_margin():
    """400 studies whose true loss grows by one point a cut; the margin is reached at the fifth: at most 2.5 % pass it.

    Three standard errors of 2.5 % over 400 studies are 2.3 %.
    """
    rng = np.random.default_rng(3)
    beyond = []
    for _ in range(400):
        dense = rng.random(400) < 0.9
        rows = [dense]
        for loss in 0.01 * np.arange(1, 9):
            p_lost = (loss + 0.01) / 0.9  # another point is won back where the dense network errs
            rows.append(np.where(dense, rng.random(400) >= p_lost, rng.random(400) < 0.1))
        beyond.append(of_cuts.lossless([a_curve(rows)], 0.05) >= 0.5)
    assert np.mean(beyond) <= 0.025 + 0.023


def test_areas_are_the_sauce_of_each_image():
    rng = np.random.default_rng(4)
    curve = a_curve([rng.random(60) < right for right in (0.95, 0.8, 0.5, 0.2)], [0, 0.2, 0.5, 0.9])
    for relative in (False, True):
        whole = of_cuts.sauce(curve.fraction, curve.accuracy, 0.1, relative=relative)
        assert of_cuts.areas(curve, 0.1, relative=relative).mean() == pytest.approx(whole, rel=1e-12)
    image = curve.correct[:, 7].astype(float)
    assert of_cuts.areas(curve, 0.1)[7] == pytest.approx(of_cuts.sauce(curve.fraction, image, 0.1))


def test_passes_are_no_points_of_what_holds_contenders_against_each_other():
    rng = np.random.default_rng(5)
    rows = [rng.random(60) < right for right in (0.95, 0.9, 0.5, 0.9, 0.2)]
    fractions, n_removed = [0, 0.2, 0.5, 0.55, 0.99], np.array([0, 2, 5, 6, 9])
    passed = a_curve(rows, fractions, ratio=np.array([0, np.nan, 0.5, np.nan, np.nan]), n_removed=n_removed)
    plain = a_curve([rows[0], rows[2]], [0, 0.5])
    for relative in (False, True):
        assert of_cuts.sauce_of(passed, 0.1, relative=relative) == of_cuts.sauce_of(plain, 0.1, relative=relative)
        assert np.array_equal(
            of_cuts.areas(passed, 0.1, relative=relative), of_cuts.areas(plain, 0.1, relative=relative)
        )
    assert of_cuts.at([passed], [0.2, 0.7]) == of_cuts.at([plain], [0.2, 0.7])
    assert of_cuts.reach([passed]) == 0.5
    assert of_cuts.sauce_of(plain, 0.1) == of_cuts.sauce(plain.fraction, plain.accuracy, 0.1)


def test_the_interval_of_a_relative_area_covers():
    """600 sets of 150 images of known networks: 95 % +- 3 standard errors (0.9 % each)."""
    rng, rights, fractions = np.random.default_rng(6), np.array([0.9, 0.7, 0.3]), [0, 0.4, 0.8]
    truth = of_cuts.sauce(fractions, rights, 0.1, relative=True)
    covered = 0
    for _ in range(600):
        hard = rng.random(150)  # what one cut gets wrong a deeper one gets wrong too
        found = stats.crossed(
            [of_cuts.areas(a_curve([hard < right for right in rights], fractions), 0.1, relative=True)]
        )
        covered += found.low <= truth <= found.high
    assert abs(covered / 600 - 0.95) < 0.027


def test_accuracy_at_fractions_lies_on_lines_and_never_beyond_what_was_measured():
    curves = [a_curve(_answers(100, 40), [0, 0.4]), a_curve(_answers(100, 20), [0, 0.6])]
    found = of_cuts.at(curves, [0.5, 0.2, 0.4])
    assert found[0] is None, "one seed ends at 0.4"
    assert [cell.mean for cell in found[1:]] == pytest.approx([(0.8 + 1 - 0.2 / 3) / 2, (0.6 + 1 - 0.4 / 3) / 2])
    assert all(cell.low < cell.mean < cell.high for cell in found[1:])
    assert of_cuts.at(curves, [0.9]) == [None]
    (edge,) = of_cuts.at([a_curve(_answers(30, 1), [0, 0.4])], [0.4])
    assert 0.8 < edge.low < edge.mean < edge.high < 1.0, "an interval of what is bounded is within the bounds"
    (certain,) = of_cuts.at([a_curve(_answers(30, 0), [0, 0.4])], [0.4])
    assert 0.85 < certain.low < 0.9 < certain.high == 1.0, "30 right answers leave room for wrong ones"
    (almost,) = of_cuts.at(curves, [0.404])
    assert almost.mean == pytest.approx((0.6 + 1 - 0.404 / 3) / 2), "a ratio becomes a whole number of units"


def test_curve_refuses_images_that_change(scene):
    loaded, found, plan, batch = scene

    class Shuffled:
        def __iter__(self):
            return iter([batch[torch.randperm(60)]])

    for images in (Shuffled(), iter([batch]), [], [batch[:0]]):
        with pytest.raises(DataError, match="images"):
            of_cuts.curve(loaded.model, found, plan, [0.5], images)


def test_curve_refuses_a_plan_of_other_sites(scene):
    loaded, found, plan, batch = scene
    with pytest.raises(UsageError, match="other sites"):
        of_cuts.curve(loaded.model, found[1:], plan, [0.5], batch)
    with pytest.raises(UsageError, match="ratio must be in"):
        of_cuts.curve(loaded.model, found, plan, [1.0], batch)


# SAUCE.


@given(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=20))
def test_sauce_of_a_constant(level, inner):
    fractions = [0.0, *sorted(inner)]
    assert of_cuts.sauce(fractions, [level] * len(fractions), level) == pytest.approx(100 * level)


def test_sauce_of_known_lines():
    f = np.linspace(0, 0.95, 20)
    assert of_cuts.sauce(f, 1 - f, 0) == pytest.approx(50)
    assert of_cuts.sauce([0.0], [1.0], 0) == pytest.approx(50)
    assert of_cuts.sauce([0, 0.5, 0.5], [0.8, 0.8, 0.2], 0.1) == pytest.approx(100 * (0.4 + 0.5 * 0.15))
    assert of_cuts.sauce([0, 0.5], [0.8, 0.4], 0.1, relative=True) == pytest.approx(100 * (0.3 + 0.125) / 0.8)


def test_sauce_is_second_order():
    """The trapezoid rule's error on a curve falls fourfold when the step is halved."""

    def error(n):
        f = np.linspace(0, 1, n + 1)
        return abs(of_cuts.sauce(f, np.exp(-f), float(np.exp(-1))) - 100 * (1 - np.exp(-1)))

    assert error(16) / error(32) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("fractions", "accuracies", "chance"),
    [
        ([0.1, 0.5], [1, 1], 0.1),
        ([0, 0.5, 0.4], [1, 1, 1], 0.1),
        ([0, 0.5], [1], 0.1),
        ([0, 1.5], [1, 1], 0.1),
        ([0, 0.5], [1, float("nan")], 0.1),
        ([0, 0.5], [80, 70], 0.1),
        ([0, 0.5], [1, 1], 10),
        ([], [], 0.1),
    ],
)
def test_sauce_refuses(fractions, accuracies, chance):
    with pytest.raises(UsageError):
        of_cuts.sauce(fractions, accuracies, chance)


def test_relative_sauce_of_nothing():
    with pytest.raises(UsageError, match="nothing right"):
        of_cuts.sauce([0, 0.5], [0, 0.5], 0.1, relative=True)


# Costs.


class Chain(nn.Module):
    """Two linear layers with a ReLU between: 4 * 10 -> 20 -> 5."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_size_by_hand():
    model, x = Chain(), torch.randn(4, 10)
    n_weights = 10 * 20 + 20 + 20 * 5 + 5
    figures = cost.size(model, x)
    assert figures["parameters"] == n_weights
    assert figures["flops"] == 2 * (10 * 20 + 20 * 5)
    # Alive at most: weights, input, and two tensors of 4 x 20 while the ReLU runs.
    assert figures["peak_bytes"] == 4 * (n_weights + 4 * 10 + 2 * 4 * 20)
    assert 4 * n_weights < figures["bytes"] < 4 * n_weights + 1000


def test_flops_of_attention_by_hand():
    model = models.load("sukashi:digits_vit").model
    width, tokens = 32, 16
    block = tokens * width * 3 * width + 2 * tokens**2 * width + tokens * width**2 + 2 * tokens * width * 2 * width
    assert cost.flops(model, torch.randn(5, 1, 8, 8)) == 2 * (3 * block + tokens * 4 * width + width * 10)


def test_sizes_fall_with_a_cut(scene):
    loaded, found, plan, batch = scene
    figures = cost.sizes(loaded.model, batch.x[:4], plan.mask(0.5))
    assert figures == cost.sizes(loaded.model, batch.x[:4], plan.mask(0.5))
    for name in ("parameters", "flops", "bytes"):
        assert figures["cut"][name] < figures["dense"][name]
    curve = of_cuts.curve(loaded.model, found, plan, [0.5], batch)
    at = curve.ratio.tolist().index(0.5)
    assert figures["cut"]["parameters"] / figures["dense"]["parameters"] == pytest.approx(1 - curve.fraction[at])


def test_bytes_are_those_of_the_saved_file(scene, tmp_path):
    loaded, _, plan, batch = scene
    small = pruning.cut(loaded, plan.mask(0.5))
    saved.save(tmp_path / "cut", small, provenance={})
    on_disk = (tmp_path / "cut" / "model.safetensors").stat().st_size
    assert cost.size(small.model, batch.x[:3])["bytes"] == on_disk


def test_latency_takes_turns():
    calls = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    times = cost.latency([Noted("dense"), Noted("cut")], torch.zeros(1), warmup=2, repeats=3)
    assert [len(of_network) for of_network in times] == [3, 3]
    assert len(calls) == 10
    assert all(set(calls[i : i + 2]) == {"dense", "cut"} for i in range(0, 10, 2))
    assert calls[0] != calls[2]


def test_latency_stops_when_time_is_up():
    times = cost.latency([nn.Identity()], torch.zeros(1), warmup=1, repeats=1000, seconds=0)
    assert len(times[0]) == 6
    assert min(times[0]) > 0


@pytest.mark.realdata
def test_accuracy_of_trained_weights(real_weights, real_data):
    from sukashi import data

    loaded = models.load("sukashi:cifar_resnet20", weights=real_weights / "resnet20-cifar10.safetensors")
    batch = data.load(str(real_data / "cifar10")).test.limit(1000).whole(loaded.preprocess, 0)
    right = _accuracy(loaded.model, batch)
    # The header says .878; .034 is three standard errors of a thousand images.
    assert right.mean().item() == pytest.approx(0.878, abs=0.034)
