"""Audits of concepts: what is kept of them, what is said, and what is refused."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import nn

import sukashi
from cases import fitted
from sukashi import data
from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Preprocess
from sukashi.experiments.audit.concepts.run import _top
from sukashi.experiments.audit.concepts.summary import _coherence, _ranks, likeness, pairs_of

PREPROCESS = Preprocess(16, 16, 3, (0.3,) * 3, (0.3,) * 3)
SHAPES = "shapes:size=16,n=160"
ASKED = {"subjects": ["concepts"], "layer": "5", "of": "circle", "concepts": 4, "crop": 0.5, "test_images": 240}


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 1, 1)]
        layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6)]
        model = nn.Sequential(*layers)
        fitted(model, data.load(SHAPES).train.whole(PREPROCESS, 0), epochs=8, size=32, rate=1e-2)
    model.preprocess = PREPROCESS
    return model


@pytest.fixture(scope="module")
def blurred(net):
    """The same with noise on its last convolution."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight = other[4].weight
        weight += weight.std() * torch.randn(weight.shape, generator=generator)
    other.preprocess = PREPROCESS
    return other


@pytest.fixture(scope="module")
def audited(net, blurred, tmp_path_factory):
    models = {"dense": net, "same": copy.deepcopy(net), "blurred": blurred}
    for model in models.values():
        model.preprocess = PREPROCESS
    return sukashi.audit([*models.values()], SHAPES, **ASKED, out=tmp_path_factory.mktemp("made") / "audit")


def test_a_network_has_its_own_concepts_and_another_has_others(audited):
    first, same, other = audited.concepts["models"]
    # Of other images: what a network that is the same one has too.
    assert same["likeness"]["mean"] == pytest.approx(first["likeness"]["mean"], abs=0.1)
    assert first["likeness"]["mean"] > other["likeness"]["mean"]
    assert -1 <= other["likeness"]["low"] < other["likeness"]["mean"] < other["likeness"]["high"] <= 1
    assert same["coherence"] == first["coherence"]
    assert same["pairs"] == [[k, k] for k in range(4)]
    assert 0.5 < first["explained"] <= 1
    assert first["how"] == "exact"
    assert sum(first["importance"]) == pytest.approx(1, abs=1e-6)
    assert "4 concepts of circle in 5" in audited.verdict
    assert len(audited.table()) == 2
    report = Path(audited.report).read_text()
    assert report.count("<h3>") == 3
    assert "by other images" in report
    assert "Which images" not in report


def test_it_is_beside_saliency_where_both_are_asked_for(net, blurred, tmp_path):
    given = {**ASKED, "subjects": ["saliency", "concepts"], "attributions": ["saliency"], "measures": ["gini"]}
    found = sukashi.audit([net, blurred], SHAPES, **given, out=tmp_path / "a")
    assert set(found.subjects) == {"saliency", "concepts"}
    assert {row["subject"] for row in found.table()} == {"saliency", "concepts"}


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"layer": None}, UsageError, "give `of` and `layer`"),
        ({"of": "circel"}, UsageError, "no class 'circel'.*circle"),
        ({"concepts": 17}, UsageError, "at most the 16 features"),
        ({"test_images": 60}, DataError, "concepts need 20"),
        ({"population": "all"}, UsageError, "`population` is about saliency"),
        ({"options": {"lrp": {"bias": False}}}, UsageError, "`options` is about saliency"),
        ({"measures": ["gini"]}, UsageError, "`measures` is about saliency, which is not among `subjects`"),
        ({"subjects": ["saliency"]}, UsageError, "`layer` is about concepts and sae, which are not among"),
        ({"subjects": ["concept"]}, UsageError, "unknown subject 'concept'.*concepts"),
    ],
)
def test_what_means_nothing_is_refused_before_work_starts(net, blurred, tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        sukashi.audit([net, blurred], SHAPES, **{**ASKED, **changed}, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_likeness_is_the_mean_rank_correlation_of_pairs_that_other_images_chose():
    rng = np.random.default_rng(0)
    one, image = rng.random((60, 3)), np.repeat(np.arange(20), 3)
    turned = one[:, [2, 0, 1]] + 0.05 * rng.random((60, 3))
    assert pairs_of(one, turned).tolist() == [[0, 1], [1, 2], [2, 0]]
    found = likeness([(one, turned)], image, 0)
    assert 0.9 < found["low"] < found["mean"] < found["high"] < 1
    other = np.round(rng.random((60, 3)), 1)  # with ties
    found = likeness([(one, other), (other, one)], image, 0)
    literal = []
    for half in (0, 1):
        fit, judge = image % 2 != half, image % 2 == half
        orders = list(itertools.permutations(range(3)))
        rho = [[spearmanr(one[fit, i], other[fit, j]).statistic for j in range(3)] for i in range(3)]
        best = max(orders, key=lambda order: sum(rho[i][j] for i, j in enumerate(order)))
        literal += [spearmanr(one[judge, i], other[judge, j]).statistic for i, j in enumerate(best)]
    assert found["mean"] == pytest.approx(np.mean(literal), abs=1e-12)


def test_ranks_of_what_is_drawn_are_those_of_the_drawn():
    rng = np.random.default_rng(0)
    values, times = rng.integers(0, 5, 12).astype(float), rng.integers(0, 3, (4, 12))
    for ranks, counts in zip(_ranks(values, times), times, strict=True):
        drawn = np.repeat(np.arange(12), counts)
        literal = rankdata(values[drawn])
        np.testing.assert_allclose(ranks[drawn] + 0.5, literal)


def test_a_concept_that_is_in_no_crop_is_like_none():
    rng = np.random.default_rng(0)
    one, image = rng.random((60, 2)), np.repeat(np.arange(20), 3)
    dead = np.stack([one[:, 0], np.zeros(60)], 1)
    assert likeness([(one, dead)], image, 0)["mean"] == pytest.approx(0.5, abs=1e-12)


def test_coherence_is_the_mean_cosine_of_pairs():
    rng = np.random.default_rng(0)
    a, top = rng.normal(size=(50, 7)), np.stack([rng.permutation(50)[:6] for _ in range(3)])
    centred = a - a.mean(0)
    for k, found in enumerate(_coherence(a, top)):
        unit = centred[top[k]] / np.linalg.norm(centred[top[k]], axis=1, keepdims=True)
        literal = np.mean([unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j])
        assert found == pytest.approx(literal, abs=1e-12)
    assert abs(_coherence(rng.normal(size=(4000, 7)), np.arange(2000).reshape(1, 2000))[0]) < 0.01


def test_the_top_crops_of_a_concept_are_of_different_images():
    u = torch.tensor([[0.1], [0.9], [0.5], [0.4], [0.9], [0.2]])
    assert _top(u, 3, 2).tolist() == [[1, 4]]
    assert _top(u, 3, 3).tolist() == [[1, 4, 2]]
