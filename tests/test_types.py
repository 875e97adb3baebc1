"""Plans, rankings, batches and keys against their slow definitions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import a_curve
from sukashi.core.errors import UsageError
from sukashi.core.objective import Classification
from sukashi.core.schema import check_ratio
from sukashi.core.types import Batch, Mask, Member, Plan, Scores, Site, pass_size, rank


@st.composite
def orders(draw):
    """Sites of 1 to 9 units, and all their units in any order."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    sites = [Site(f"layer{i}", "channel", size) for i, size in enumerate(sizes)]
    return sites, draw(st.permutations([(s, u) for s, size in enumerate(sizes) for u in range(size)]))


def pairs(plan):
    return list(zip(plan.site.tolist(), plan.unit.tolist(), strict=True))


# Plans.


@given(orders(), st.floats(0, 1, exclude_max=True))
def test_a_mask_removes_exactly_the_rounded_ratio(case, ratio):
    sites, order = case
    plan = Plan.build(sites, order, method="any")
    mask = plan.mask(ratio)
    n = len(order)
    expected = min(int(ratio * n + 0.5), n - len(sites))
    assert mask.n_removed == expected
    assert mask.n_units == plan.n_units == n
    assert set(mask.keep) == set(sites)
    assert all(keep.shape == (site.n_units,) and keep.any() for site, keep in mask.keep.items())
    gone = {(s, u) for s, site in enumerate(sites) for u in range(site.n_units) if not mask.keep[site][u]}
    assert gone == set(pairs(plan)[:expected])


@given(orders())
def test_masks_are_nested(case):
    plan = Plan.build(*case, method="any")
    before = plan.mask_of(0)
    assert before.n_removed == 0
    for n_removed in range(1, plan.n_removable + 1):
        now = plan.mask_of(n_removed)
        for site in plan.sites:
            assert not (now.keep[site] & ~before.keep[site]).any()
        assert now.n_removed == before.n_removed + 1
        before = now
    assert all(keep.sum() == 1 for keep in before.keep.values())


def test_halves_are_rounded_up():
    plan = Plan.build([Site("a", "channel", 5)], [(0, u) for u in range(5)], method="any")
    assert [plan.mask(ratio).n_removed for ratio in (0.0, 0.09, 0.1, 0.3, 0.5, 0.99)] == [0, 0, 1, 2, 3, 4]


@given(orders(), st.data())
def test_the_last_unit_of_each_site_moves_to_the_end(case, data):
    sites, order = case
    passes = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    effect = {pair: float(row) for row, pair in enumerate(order)}
    category = {order[0]: "neutral"}
    p_values = {order[-1]: np.array([0.25, 0.5])}
    plan = Plan.build(
        sites, order, method="any", effect=effect, category=category, p_values=p_values, passes=passes, n_images=3
    )
    last = [[pair for pair in order if pair[0] == s][-1] for s in range(len(sites))]
    last.sort(key=order.index)
    assert pairs(plan) == [pair for pair in order if pair not in last] + last
    # A pass that took the last unit of a site counts without it: a mask could not take it.
    assert plan.passes == tuple(len([pair for pair in order[:n] if pair not in last]) for n in passes)
    for row, pair in enumerate(pairs(plan)):
        assert plan.effect[row] == effect[pair]
        assert plan.category[row] == category.get(pair, "")
        np.testing.assert_array_equal(plan.p_values[row], p_values.get(pair, [math.nan, math.nan]))
    assert (plan.method, plan.params, plan.n_images) == ("any", {}, 3)


def test_what_a_method_does_not_know_is_nan():
    plan = Plan.build([Site("a", "channel", 2)], [(0, 1), (0, 0)], method="any")
    assert np.isnan(plan.effect).all()
    assert plan.p_values.shape == (2, 0)
    assert plan.category.tolist() == ["", ""]


@pytest.mark.parametrize("order", [[(0, 0)], [(0, 0), (0, 0)], [(0, 0), (0, 1), (0, 1)]])
def test_a_plan_holds_every_unit_once(order):
    with pytest.raises(AssertionError, match="every unit exactly once"):
        Plan.build([Site("a", "channel", 2)], order, method="any")


@pytest.mark.parametrize("n_removed", [-1, 2])
def test_a_mask_never_empties_a_site(n_removed):
    plan = Plan.build([Site("a", "channel", 2)], [(0, 1), (0, 0)], method="any")
    with pytest.raises(UsageError, match=rf"n_removed must be in \[0, 1\], got {n_removed}: one unit of each site"):
        plan.mask_of(n_removed)


@pytest.mark.parametrize("ratio", [50, 1, 1.0, -0.1, math.nan, math.inf, "0.5", None])
def test_a_ratio_is_a_fraction_removed(ratio):
    rule = rf"ratio must be in \[0, 1\), got {ratio}: it is the fraction REMOVED of units, or with a scope of weights"
    with pytest.raises(UsageError, match=rule):
        check_ratio(ratio)
    check_ratio(0)
    check_ratio(0.999)


# Rankings.


@given(orders(), st.data())
def test_a_ranking_goes_up_and_ties_go_by_site_then_unit(case, data):
    sites, _ = case
    values = {
        site: torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=site.n_units, max_size=site.n_units)))
        for site in sites
    }
    plan = rank(Scores(values, 7, "by hand", {"a": 1}))
    # The slow definition: take the least of what is left, the first one of those.
    left = [(s, u) for s, site in enumerate(sites) for u in range(site.n_units)]
    order = []
    while left:
        order.append(min(left, key=lambda pair: int(values[sites[pair[0]]][pair[1]])))
        left.remove(order[-1])
    assert pairs(plan) == pairs(Plan.build(sites, order, method="by hand"))
    assert plan.effect.tolist() == [float(values[sites[s]][u]) for s, u in pairs(plan)]
    assert (plan.sites, plan.n_images, plan.method, plan.params) == (tuple(sites), 7, "by hand", {"a": 1})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_ranking_of_nan_is_refused(bad):
    values = {Site("fine", "channel", 1): torch.zeros(1), Site("sick", "channel", 2): torch.tensor([0.0, bad])}
    with pytest.raises(UsageError, match="scores of magnitude at 'sick' hold NaN or Inf"):
        rank(Scores(values, 0, "magnitude"))


# Batches.


@st.composite
def batches(draw):
    """Images whose pixel is their number, with targets and ids in any order."""
    n = draw(st.integers(1, 12))
    target = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    names = draw(st.permutations([f"image-{i:02d}" for i in range(n)]))
    return Batch(torch.arange(n).float().view(n, 1, 1, 1), torch.tensor(target), tuple(names))


@given(batches())
def test_by_class_sorts_by_target_then_id_and_keeps_images_whole(batch):
    triples = zip(batch.target.tolist(), batch.image_id, batch.x.flatten().tolist(), strict=True)
    found = batch.by_class()
    assert list(zip(found.target.tolist(), found.image_id, found.x.flatten().tolist(), strict=True)) == sorted(triples)
    again = found.by_class()
    assert torch.equal(again.x, found.x)


class Pairs(Classification):
    """Every image has its class and class 3."""

    def classes(self, target):
        rows = torch.arange(len(target)).repeat_interleave(2)
        return rows, torch.stack([target, torch.full_like(target, 3)], 1).flatten()


@given(batches())
def test_the_objective_of_a_batch_goes_where_its_images_go_and_says_their_classes(batch):
    batch = dataclasses.replace(batch, objective=Pairs())
    for part in (batch[:1], *batch.split(2), *batch.in_passes(), batch.by_class(), batch.to(torch.device("cpu"))):
        assert isinstance(part.objective, Pairs)
    swapped = dataclasses.replace(batch, target=3 - batch.target, objective=Reversed())
    expected = sorted(range(len(batch)), key=lambda i: (int(batch.target[i]), batch.image_id[i]))
    assert swapped.by_class().image_id == tuple(batch.image_id[i] for i in expected)


class Reversed(Classification):
    """Class numbers count from the last."""

    def classes(self, target):
        return torch.arange(len(target)), 3 - target


@given(batches(), st.integers(1, 15))
def test_split_gives_all_images_in_order(batch, size):
    parts = list(batch.split(size))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert 0 < len(parts[-1]) <= size
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert torch.equal(torch.cat([part.target for part in parts]), batch.target)
    assert sum((part.image_id for part in parts), ()) == batch.image_id


@given(batches())
def test_rows_by_mask_by_number_and_by_slice(batch):
    odd = torch.arange(len(batch)) % 2 == 1
    for rows in (odd, torch.nonzero(odd).flatten(), slice(1, None, 2)):
        part = batch[rows]
        assert part.x.flatten().tolist() == list(range(1, len(batch), 2))
        assert part.image_id == batch.image_id[1::2]
        assert torch.equal(part.target, batch.target[1::2])


# Sites, masks, curves.


def test_a_site_is_known_without_its_members():
    member = Member("conv", "out", ((0,), (1,)), 1)
    site = Site("conv", "channel", 2, members=(member, Member("next", "in", ((0,), (1,)), 1)))
    assert site == Site("conv", "channel", 2)
    assert hash(site) == hash(Site("conv", "channel", 2))
    assert {site: 1}[Site("conv", "channel", 2)] == 1
    for other in (Site("conv2", "channel", 2), Site("conv", "hidden", 2), Site("conv", "channel", 3)):
        assert site != other
    assert site.producers == (member,)
    assert [m.module for m in site.consumers] == ["next"]


def test_a_mask_counts():
    mask = Mask({Site("a", "channel", 3): torch.tensor([True, False, False]), Site("b", "head", 1): torch.ones(1) > 0})
    assert (mask.n_removed, mask.n_units) == (2, 4)


def test_accuracy_of_a_curve_is_the_share_of_right_images():
    curve = a_curve([[1, 0, 1, 1], [0, 0, 0, 1]])
    assert curve.accuracy.tolist() == [0.75, 0.25]


def test_large_images_go_in_smaller_passes():
    assert [pass_size(torch.zeros(2, 3, size, size)) for size in (8, 32, 224, 5000)] == [250, 250, 27, 1]
    x = torch.zeros(500, 3, 32, 32)
    batch = Batch(x, torch.zeros(500, dtype=torch.long), tuple(map(str, range(500))))
    assert [len(part) for part in batch.in_passes()] == [250, 250]
