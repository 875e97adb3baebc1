"""Measures of saliency maps against their definitions, one image, percentage and pixel at a time, in float64."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from oracles.faithfulness import TIGHT, answer, ordered
from oracles.imputation import solved
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Batch, Maps
from sukashi.measures import faithfulness, measures
from sukashi.measures.faithfulness import area_over
from sukashi.measures.inputs import Inputs, measured

NAMES = [method.name for method in measures if {"model", "maps"} <= method.inputs]
PARTS = {"accuracy": "{}", "probability": "{}/probability"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def of_images(maps, data):
    """Maps of the images of a batch; of one too many they are where there is no image."""
    return Maps(maps, (data.image_id + ("",) * len(maps))[: len(maps)])


def values(name, model, data, maps, **options):
    """(B,) of a measure; by "road/probability" that part of it."""
    given = {"model": model, "batch": data, "maps": of_images(maps, data), "generator": seeded()}
    return measured([name.partition("/")[0]], given, {name.partition("/")[0]: options})[name].values


def removal(model, data, *, maps, generator, **options):
    return faithfulness.removal(model, data, of_images(maps, data), generator, **options)


def replacement(model, data, *, maps, **options):
    return faithfulness.replacement(model, data, of_images(maps, data), **options)


@pytest.fixture(scope="module")
def case(small64):
    """A trained network, ten digits, and a map of each that knows a little; whole numbers, so with ties."""
    data = small64["cnn"].data[::8]
    maps = (data.x[:, 0] * 4).round() + torch.randint(0, 3, data.x[:, 0].shape, generator=seeded())
    return small64["cnn"].model, data, maps


class Seen(nn.Module):
    """Gives logits, keeps the images."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(x)
        return x.flatten(1)[:, :10]

    @property
    def x(self):
        return torch.cat(self.batches)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_another_shape_and_no_images_are_refused(case, name):
    model, data, maps = case
    for wrong in (maps[:3], maps[:, :4]):
        with pytest.raises(UsageError, match="maps have shape"):
            values(name, model, data, wrong)
    with pytest.raises(UsageError, match=r"must be \(images, height, width\)"):
        values(name, model, data, maps[:, None])
    with pytest.raises(DataError, match="no images"):
        values(name, model, data[:0], maps[:0])


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_other_images_are_refused(case, name):
    model, data, maps = case
    given = {"model": model, "batch": data, "maps": of_images(maps, data[torch.arange(len(data)).flip(0)])}
    with pytest.raises(UsageError, match="maps and batch are of different images"):
        measured([name], given | {"generator": seeded()})


@pytest.mark.parametrize("name", NAMES)
def test_a_map_that_ranks_nothing_gives_nan_and_the_others_what_they_gave(case, name):
    model, data, maps = case
    whole = values(name, model, data, maps)
    silent = maps.clone()
    silent[1], silent[4], silent[7, 0, 0], silent[8, 2, 2] = 0.0, 3.0, torch.nan, -torch.inf
    found = values(name, model, data, silent)
    gone = torch.tensor([1, 4, 7, 8])
    assert found.isnan().nonzero().flatten().tolist() == gone.tolist()
    rest = [i for i in range(len(data)) if i not in gone]
    torch.testing.assert_close(found[rest], whole[rest])


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_no_logits_is_refused(case, name):
    _, data, maps = case
    for model in (nn.Identity(), nn.Sequential(nn.Flatten(), nn.Threshold(9.0, torch.nan))):
        with pytest.raises(ModelError):
            values(name, model, data, maps)


# ROAD.


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_curves_are_those_of_a_loop_over_images_and_percentages(case, order):
    model, data, maps = case
    percentages = [0, 12.5, 33, 50, 91]
    found = removal(
        model, data, maps=maps, generator=seeded(), order=order, percentages=percentages, noise=0.0, tolerance=TIGHT
    )
    assert found.percentages == tuple(percentages)
    for i in range(len(data)):
        for j, p in enumerate(percentages):
            missing = torch.zeros(64, dtype=torch.bool)
            missing[ordered(maps[i], -1 if order == "morf" else 1)[: int(64 * p / 100)]] = True
            image = solved(data.x[i], missing.view(8, 8))
            correct, probability = answer(model, image, data.target[i])
            assert float(found.correct[i, j]) == correct
            assert float(found.probability[i, j]) == pytest.approx(probability, abs=1e-10)


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_exactly_so_many_pixels_go_ties_by_position(order):
    maps = torch.tensor([0.0, 1.0, 1.0, 2.0]).repeat(2, 5, 5)[:, :, :15]
    x = torch.randn(2, 3, 5, 15, generator=seeded())
    model = Seen()
    percentages = (1, 10, 37, 50, 99)
    removal(
        model,
        Batch(x, torch.zeros(2).long(), ("a", "b")),
        maps=maps,
        generator=seeded(),
        order=order,
        percentages=percentages,
    )
    for p, images in zip(percentages, model.batches, strict=True):
        changed = (images != x).any(1).flatten(1)
        for i, image_map in enumerate(maps):
            expected = ordered(image_map, -1 if order == "morf" else 1)[: int(75 * p / 100)]
            assert changed[i].nonzero().flatten().tolist() == sorted(expected)


def noise_of(data, maps, seed=0, size=64, **options):
    """What noise adds to the images at 50 percent."""
    images = []
    for noise in (0.25, 0.0):
        model = Seen()
        removal(
            model,
            data,
            maps=maps,
            generator=seeded(seed),
            percentages=[50],
            noise=noise,
            tolerance=TIGHT,
            batch_size=size,
            **options,
        )
        images.append(model.x)
    return images[0] - images[1]


def test_noise_is_gaussian_on_what_was_removed_and_belongs_to_the_image(case):
    _, data, _ = case
    maps = torch.rand(data.x[:, 0].shape, generator=seeded(5))
    found = noise_of(data, maps)
    assert ((found != 0).flatten(1).sum(1) == 32).all()
    assert float(found[found != 0].std()) == pytest.approx(0.25, rel=0.15)
    assert float(found[found != 0].mean()) == pytest.approx(0, abs=0.05)
    shuffled = torch.tensor([7, 2, 2, 9])
    torch.testing.assert_close(noise_of(data[shuffled], maps[shuffled]), found[shuffled], rtol=0, atol=1e-12)
    torch.testing.assert_close(noise_of(data, maps, size=3), found, rtol=0, atol=1e-12)
    assert float((noise_of(data, maps, seed=1) - found).abs().mean()) > 0.1
    # The least relevant half is the other half: together they show one field.
    other = noise_of(data, maps, order="lerf")
    assert ((found != 0) ^ (other != 0)).all()
    torch.testing.assert_close(found + other, noise_of(data, -maps) + noise_of(data, -maps, order="lerf"))


def test_the_generators_state_is_neither_read_nor_moved(case):
    model, data, maps = case
    generator = seeded()
    first = removal(model, data, maps=maps, generator=generator, noise=1.0)
    torch.rand(3, generator=generator)
    state = generator.get_state()
    again = removal(model, data, maps=maps, generator=generator, noise=1.0)
    assert torch.equal(first.probability, again.probability)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("outcome", ["accuracy", "probability"])
def test_road_is_the_mean_gap_between_its_curves(case, outcome):
    model, data, maps = case
    curves = [removal(model, data, maps=maps, generator=seeded(), order=order) for order in ("lerf", "morf")]
    assert curves[0].percentages == (10, 20, 30, 40, 50, 60, 70, 80, 90)
    expected = (curves[0].of(outcome) - curves[1].of(outcome)).mean(1)
    found = values(PARTS[outcome].format("road"), model, data, maps)
    torch.testing.assert_close(found, expected)
    assert torch.equal(curves[0].of(outcome), curves[0].correct if outcome == "accuracy" else curves[0].probability)
    few = values(PARTS[outcome].format("road"), model, data, maps, percentages=[20, 50])
    torch.testing.assert_close(few, (curves[0].of(outcome) - curves[1].of(outcome))[:, [1, 4]].mean(1))


def test_road_of_a_map_and_of_its_opposite_without_ties(case):
    model, data, _ = case
    maps = torch.rand(data.x[:, 0].shape, generator=seeded(5))
    found = [values("road/probability", model, data, m) for m in (maps, -maps)]
    torch.testing.assert_close(found[0], -found[1])


def test_both_forms_of_the_aopc_are_their_formulas(case):
    model, data, maps = case
    every = removal(model, data, maps=maps, generator=seeded(), percentages=range(92))
    a = every.probability
    mean = sum(a[:, 0] - a[:, p] for p in range(10, 91, 10)) / 9
    lottery = sum(a[:, 1] - a[:, p] for p in range(1, 92, 10)) / 11
    for form, expected in (("mean", mean), ("lottery", lottery)):
        found = values("aopc/probability", model, data, maps, form=form)
        torch.testing.assert_close(found, expected)
    right = values("aopc", model, data, maps)
    torch.testing.assert_close(right, sum(every.correct[:, 0] - every.correct[:, p] for p in range(10, 91, 10)) / 9)


def test_measures_of_the_same_curves_share_every_point_and_no_others(case, monkeypatch):
    model, data, maps = case
    asked, plain = [], faithfulness.removal

    def counted(*args, **options):
        asked.extend((options["order"], options["noise"], p) for p in options["percentages"])
        return plain(*args, **options)

    monkeypatch.setattr(faithfulness, "removal", counted)
    given = {"model": model, "batch": data, "maps": of_images(maps, data), "generator": seeded()}
    both = measured(["road", "aopc"], given)
    tens = [(order, p) for order in ("lerf", "morf") for p in range(10, 100, 10)]
    assert sorted(asked) == sorted([(order, 0.01, p) for order, p in tens] + [("morf", 0.01, 0)])
    asked.clear()
    options = {"road": {"noise": 0.3}, "aopc": {"noise": 0.3, "form": "lottery"}}
    inputs = Inputs(given)
    found = measured(["aopc", "road"], inputs, options)
    assert len(asked) == 28, "ten of the lottery's percentages and twice the nine of ROAD"
    assert inputs.get("removal_curves", {"noise": 0.3}).at("lerf", [10, 90]).correct.shape == (len(data), 2)
    assert len(asked) == 28
    for name in ("aopc", "road/probability"):
        assert not torch.equal(found[name].values, both[name].values)
    measured(["road"], inputs)
    assert len(asked) == 46, "with other noise they are other curves"


def test_area_over_in_closed_form():
    curve = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(area_over(curve, "mean"), torch.tensor([2 / 3, 0.0]))
    torch.testing.assert_close(area_over(curve, "lottery"), torch.tensor([2 / 5, 0.0]))


@pytest.mark.parametrize("percentages", [[100], [-1, 10], [10, 250]])
def test_percentages_outside_0_to_100_are_refused(case, percentages):
    model, data, maps = case
    with pytest.raises(UsageError, match=r"\[0, 100\)"):
        removal(model, data, maps=maps, generator=seeded(), percentages=percentages)


# Insertion and deletion.


@pytest.mark.parametrize("step", [1, 7, 8, 64, 100])
@pytest.mark.parametrize("baseline", ["zeros", "blur"])
def test_insertion_and_deletion_are_a_loop_over_images_and_steps(case, step, baseline):
    model, data, maps = case
    data, maps = data[:3], maps[:3]
    other = torch.zeros_like(data.x) if baseline == "zeros" else blurred(data.x)
    for name, (first, last) in {"insertion": (other, data.x), "deletion": (data.x, other)}.items():
        found = values(name, model, data, maps, step=step, baseline=baseline)
        for i, value in enumerate(found):
            image, order = first[i].clone(), ordered(maps[i], -1)
            heights = [answer(model, image, data.target[i])[1]]
            for start in range(0, 64, step):
                for pixel in order[start : start + step]:
                    image[:, pixel // 8, pixel % 8] = last[i][:, pixel // 8, pixel % 8]
                heights.append(answer(model, image, data.target[i])[1])
            area = sum((one + other) / 2 for one, other in pairwise(heights)) / (len(heights) - 1)
            assert float(value) == pytest.approx(area, abs=1e-12)


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


def test_the_curve_goes_from_one_image_to_the_other_in_steps_of_a_row(case):
    model, data, maps = case
    curve = replacement(model, data, maps=maps, insert=True)
    assert curve.shape == (len(data), 9)
    back = replacement(model, data, maps=maps, insert=False)
    torch.testing.assert_close(curve[:, [0, -1]], back[:, [-1, 0]])
    whole = [answer(model, image, target)[1] for image, target in zip(data.x, data.target, strict=True)]
    torch.testing.assert_close(curve[:, -1], torch.tensor(whole, dtype=torch.float64))


def test_images_too_small_for_the_blur_are_refused():
    data = Batch(torch.randn(1, 1, 5, 9), torch.zeros(1).long(), ("a",))
    with pytest.raises(UsageError, match="too small to be blurred"):
        values("insertion", Seen(), data, torch.rand(1, 5, 9), baseline="blur")


# All that take pixels in order.


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_does_not_matter(case, name):
    model, data, maps = case
    whole = values(name, model, data, maps)
    for size in (1, 3, 100):
        found = values(name, model, data, maps, batch_size=size)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_more_rows_go_through_the_network_at_once_than_asked(case, name):
    _, data, maps = case
    model = Seen()
    values(name, model, data, maps, batch_size=4)
    assert max(len(x) for x in model.batches) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_tensors_are_left_alone(case, name):
    model, data, maps = case
    kept = copy.deepcopy((data.x, data.target, maps))
    values(name, model, data, maps)
    assert all(torch.equal(one, other) for one, other in zip((data.x, data.target, maps), kept, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_good_map_scores_better_than_chance(small64, name):
    """What the network's own slopes times the pixels say is worth something on digits, by every measure."""
    model, data = small64["cnn"].model, small64["cnn"].data
    x = data.x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).gather(1, data.target[:, None]).sum(), x)
    maps = (slopes * data.x)[:, 0]
    noise = torch.rand(maps.shape, generator=seeded(), dtype=maps.dtype)
    good, chance = (values(name, model, data, m).mean() for m in (maps, noise))
    assert (1 if measures[name].facts["better"] == "higher" else -1) * float(good - chance) > 0.05
