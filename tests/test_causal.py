"""C-SWAP, C-BP and AMP against the literal oracle; the engine against the masked network; closed-form tests."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import ORACLES
from sukashi.core.errors import DataError, ModelError
from sukashi.core.objective import CLASSIFICATION
from sukashi.criteria import criteria, engine
from sukashi.criteria.causal import ClassSums
from sukashi.criteria.engine import Engine

by_class = CLASSIFICATION.classes


def decisions(plan):
    """{pair: (gone in the pass, category)}; units kept back to save a layer count as gone by category."""
    n_pass = plan.passes[0] if plan.passes else 0
    return {
        (int(s), int(u)): (row < n_pass, str(c))
        for row, (s, u, c) in enumerate(zip(plan.site, plan.unit, plan.category, strict=True))
    }


def assert_same_decisions(plan, expected):
    """The same units go in the pass, and each is of the same kind."""
    assert decisions(plan) == decisions(expected)
    assert plan.passes == expected.passes
    assert plan.n_images == expected.n_images


@pytest.mark.slow
@pytest.mark.parametrize("net", ["cnn", "vit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": "original"}, {"effect": "ratio"}, {"samples": "all", "alpha": 0.01}, {"inference": "general"}],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default",
)
def test_cswap_decides_like_algorithm_1(small64, net, options):
    case = small64[net]
    plan = criteria["cswap"](case.model, case.sites, case.data, generator=torch.Generator(), **options)
    assert_same_decisions(
        plan, ORACLES["criteria", "cswap"](case.model, case.sites, case.data, generator=None, **options)
    )
    assert {"critical"} < set(plan.category.tolist()), "the case must have both kinds"
    assert 0 < plan.passes[0] < plan.n_removable


def test_cswap_ranks_critical_units_by_harm(small64):
    case = small64["vit"]
    plan = criteria["cswap"](case.model, case.sites, case.data, generator=torch.Generator())
    tail = plan.effect[plan.passes[0] : plan.n_removable]
    assert len(tail) > 10
    assert (np.diff(tail[np.isfinite(tail)]) <= 0).all()


@pytest.mark.parametrize("net", ["cnn", "vit"])
def test_amp_decides_like_algorithm_3(small64, net):
    case = small64[net]
    plan = criteria["amp"](case.model, case.sites, case.data, generator=torch.Generator())
    assert_same_decisions(plan, ORACLES["criteria", "amp"](case.model, case.sites, case.data, generator=None))
    assert 0 < plan.passes[0] < plan.n_removable


@pytest.mark.parametrize("net", ["cnn", "vit"])
def test_cbp_tests_like_algorithm_4(small64, net):
    case = small64[net]
    plan = criteria["cbp"](case.model, case.sites, case.data, generator=torch.Generator())
    expected = ORACLES["criteria", "cbp"](case.model, case.sites, case.data, generator=None)
    assert_same_decisions(plan, expected)
    np.testing.assert_allclose(plan.effect, expected.effect, rtol=1e-9, atol=1e-12)
    order = [str(c) for c in plan.category[: plan.n_removable]]
    turn = [("detrimental", "neutral", "critical").index(c) for c in order]
    assert turn == sorted(turn)
    assert len(set(turn)) > 1, "the case must have several kinds"


def test_a_dead_unit_has_exactly_no_effect(small64):
    case = small64["cnn"]
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.fc1.weight[5] = 0
        model.fc1.bias[5] = -1
    position = next(i for i, site in enumerate(case.sites) if site.layer == "fc1")
    plan = criteria["cbp"](model, case.sites, case.data, generator=torch.Generator())
    row = int(np.flatnonzero((plan.site == position) & (plan.unit == 5))[0])
    assert plan.effect[row] == 0
    assert plan.category[row] == "neutral"
    assert (plan.p_values[row] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("net", ["cnn", "vit"])
@pytest.mark.parametrize("name", ["cswap", "amp", "drift"])
def test_chunks_do_not_change_decisions(small, monkeypatch, net, name):
    """In float32, where the order of additions shows."""
    model, sites, data = small[net].model, small[net].sites, small[net].data
    whole = criteria[name](model, sites, data, generator=torch.Generator())
    monkeypatch.setattr(engine.Engine.__init__, "__kwdefaults__", {"budget": 0, "chunk": 23})
    parts = criteria[name](model, sites, data, generator=torch.Generator())
    assert decisions(whole) == decisions(parts)
    assert parts.passes == whole.passes


def test_a_journal_resumes_to_the_same_plan(small):
    model, sites, data = small["cnn"].model, small["cnn"].sites, small["cnn"].data
    full: dict = {}
    whole = criteria["cswap"](model, sites, data, generator=torch.Generator(), _journal=full)
    assert len(full) == len(sites)
    half = dict(list(full.items())[: len(sites) // 2])
    resumed = criteria["cswap"](model, sites, data, generator=torch.Generator(), _journal=half)
    assert half == full
    for field in ("site", "unit", "category", "effect", "p_values"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(resumed, field))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40))
def test_t_test_equals_scipy(seed, n):
    rng = np.random.default_rng(seed)
    before = rng.uniform(0.1, 1, (3, n))
    after = before + rng.normal(0.01, 0.02, (3, n))
    target = torch.arange(3).repeat_interleave(n)
    sums = ClassSums.of(torch.from_numpy(before.ravel()), torch.from_numpy(after.ravel()), by_class(target), 3)
    expected = [scipy.stats.ttest_rel(a, b).pvalue for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(sums.p_values(), expected, rtol=1e-7)
    np.testing.assert_allclose(sums.p_value(), scipy.stats.ttest_rel(after.ravel(), before.ravel()).pvalue, rtol=1e-7)
    assert sums.effect("ratio") == pytest.approx(((after - before) / before).mean())
    assert sums.effect("mean") == pytest.approx((after - before).mean() / before.mean())


def test_sums_of_shards_add_up():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 60, generator=generator, dtype=torch.float64)
    target = torch.arange(60) % 3
    halves = [
        ClassSums.of(before[rows], after[rows], by_class(target[rows]), 3) for rows in (slice(0, 25), slice(25, 60))
    ]
    np.testing.assert_allclose(
        (halves[0] + halves[1]).p_values(), ClassSums.of(before, after, by_class(target), 3).p_values(), rtol=1e-9
    )


def test_no_difference_is_not_significant_and_a_constant_one_is():
    before = torch.full((8,), 0.5, dtype=torch.float64)
    target = torch.zeros(8, dtype=torch.long)
    assert ClassSums.of(before, before, by_class(target), 1).p_values() == [1.0]
    assert ClassSums.of(before, before - 0.25, by_class(target), 1).p_values() == [0.0]


def test_a_class_without_correct_images_is_refused(small):
    model, sites, data = small["cnn"].model, small["cnn"].sites, small["cnn"].data
    with torch.inference_mode():
        wrong = model(data.x).argmax(1) != 3
    rows = (data.target != 3) | wrong
    data = type(data)(data.x.clone(), data.target.clone(), data.image_id)
    data.target[torch.nonzero(data.target == 3).flatten()] = 4
    data.target[torch.nonzero(rows & (data.target != 4)).flatten()[:3]] = 3
    with torch.inference_mode():
        n_right = int(((model(data.x).argmax(1) == 3) & (data.target == 3)).sum())
    assert n_right < 2
    with pytest.raises(DataError, match=r"class 3 has .* correctly classified"):
        criteria["cswap"](model, sites, data, generator=torch.Generator())


def test_an_untraceable_model_is_refused_by_name(small):
    sites, data = small["cnn"].sites, small["cnn"].data

    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"torch\.fx cannot trace"):
        Engine(Branching(), sites, data)
