"""C-SWAP, C-BP and AMP against the literal oracle; the engine against the masked network; closed-form tests."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from sukashi.core.errors import DataError, ModelError
from sukashi.core.objective import CLASSIFICATION
from sukashi.criteria import criteria, engine
from sukashi.criteria.causal import ClassSums
from sukashi.criteria.engine import Engine
from sukashi.network import sites as finder

by_class = CLASSIFICATION.classes


def decisions(plan):
    """{pair: (gone in the pass, category)}; units kept back to save a layer count as gone by category."""
    n_pass = plan.passes[0] if plan.passes else 0
    return {
        (int(s), int(u)): (row < n_pass, str(c))
        for row, (s, u, c) in enumerate(zip(plan.site, plan.unit, plan.category, strict=True))
    }


@pytest.mark.parametrize("which", ["digits", "vit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": "original"}, {"effect": "ratio"}, {"samples": "all", "alpha": 0.01}, {"inference": "general"}],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default",
)
def test_cswap_decides_like_algorithm_1(request, which, options):
    model, sites, data = request.getfixturevalue(which)
    plan = criteria["cswap"](model, sites, data, generator=torch.Generator(), **options)
    literal = {**options, "voting": options.get("inference") != "general"}
    literal.pop("inference", None)
    expected = naive.cswap(model, sites, data, **literal)
    found = {pair: category for pair, (_, category) in decisions(plan).items()}
    assert found == {pair: category for pair, (_, category) in expected.items()}
    assert {"critical"} < set(found.values()), "the case must have both kinds"
    gone = {pair for pair, (is_gone, _) in expected.items() if is_gone}
    in_pass = {pair for pair, (is_gone, _) in decisions(plan).items() if is_gone}
    # A plan moves the last unit of an emptied site to its end; the pass never empties one, so both sets are equal.
    assert in_pass == gone


def test_cswap_ranks_critical_units_by_harm(digits):
    model, sites, data = digits
    plan = criteria["cswap"](model, sites, data, generator=torch.Generator())
    tail = plan.effect[plan.passes[0] : plan.n_removable]
    assert len(tail) > 10
    assert (np.diff(tail[np.isfinite(tail)]) <= 0).all()


@pytest.mark.parametrize("which", ["digits", "vit"])
def test_amp_decides_like_algorithm_3(request, which):
    model, sites, data = request.getfixturevalue(which)
    plan = criteria["amp"](model, sites, data, generator=torch.Generator())
    expected = naive.amp(model, sites, data)
    assert {pair for pair, (gone, _) in decisions(plan).items() if gone} == {p for p, gone in expected.items() if gone}
    assert 0 < plan.passes[0] < plan.n_removable


def test_cbp_tests_like_algorithm_4(digits):
    model, sites, data = digits
    plan = criteria["cbp"](model, sites, data, generator=torch.Generator())
    expected = naive.cbp(model, sites, data)
    effects = {(int(s), int(u)): e for s, u, e in zip(plan.site, plan.unit, plan.effect, strict=True)}
    assert {pair: c for pair, (_, c) in decisions(plan).items()} == {pair: c for pair, (c, _) in expected.items()}
    for pair, (_, xi) in expected.items():
        assert effects[pair] == pytest.approx(xi, rel=1e-3, abs=1e-6)
    order = [str(c) for c in plan.category[: plan.n_removable]]
    turn = [("detrimental", "neutral", "critical").index(c) for c in order]
    assert turn == sorted(turn)


def test_a_dead_unit_has_exactly_no_effect(trained_cnn, digits_calibration):
    import copy

    model = copy.deepcopy(trained_cnn.model)
    with torch.no_grad():
        model.fc1.weight[5] = 0
        model.fc1.bias[5] = -1
    sites = finder.find(model, digits_calibration.x[:2]).sites
    position = next(i for i, site in enumerate(sites) if site.layer == "fc1")
    plan = criteria["cbp"](model, sites, digits_calibration, generator=torch.Generator())
    row = int(np.flatnonzero((plan.site == position) & (plan.unit == 5))[0])
    assert plan.effect[row] == 0
    assert plan.category[row] == "neutral"
    assert (plan.p_values[row] == 1).all()


@pytest.mark.parametrize("which", ["digits", "vit"])
@pytest.mark.parametrize("name", ["cswap", "amp", "drift"])
def test_chunks_do_not_change_decisions(request, monkeypatch, which, name):
    """In float32, where the order of additions shows."""
    model, sites, data = request.getfixturevalue(which)
    whole = criteria[name](model, sites, data, generator=torch.Generator())
    monkeypatch.setattr(engine.Engine.__init__, "__kwdefaults__", {"budget": 0, "chunk": 23})
    parts = criteria[name](model, sites, data, generator=torch.Generator())
    assert decisions(whole) == decisions(parts)
    assert parts.passes == whole.passes


def test_a_journal_resumes_to_the_same_plan(digits):
    model, sites, data = digits
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


def test_a_class_without_correct_images_is_refused(digits):
    model, sites, data = digits
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


def test_an_untraceable_model_is_refused_by_name(digits):
    _, sites, data = digits

    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"torch\.fx cannot trace"):
        Engine(Branching(), sites, data)
