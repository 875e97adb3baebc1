"""Audits of concepts: what is kept of them, what is said, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sukashi
from cases import fitted
from sukashi import data
from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Preprocess
from sukashi.experiments.audit.concepts.run import _top
from sukashi.experiments.audit.concepts.summary import _alike, _coherence

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
    assert first["likeness"]["mean"] == pytest.approx(1, abs=1e-6)
    assert same["likeness"]["mean"] == pytest.approx(1, abs=1e-6)
    assert same["coherence"] == first["coherence"]
    assert same["change"]["mean"] == 0
    assert other["likeness"]["high"] < 0.99
    assert 0 < other["own"]["mean"] < 1
    assert 0.5 < first["explained"] <= 1
    assert first["how"] == "exact"
    assert sum(first["importance"]) == pytest.approx(1, abs=1e-6)
    assert "4 concepts of circle in 5" in audited.verdict
    assert len(audited.table()) == 4
    report = Path(audited.report).read_text()
    assert report.count("<h3>") == 3
    assert "two halves of its images" in report


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
        ({"measures": ["gini"]}, UsageError, "`measures` is about saliency, which is not among `subjects`"),
        ({"subjects": ["saliency"]}, UsageError, "`layer` is about concepts, which is not among `subjects`"),
        ({"subjects": ["concept"]}, UsageError, "unknown subject 'concept'.*concepts"),
    ],
)
def test_what_means_nothing_is_refused_before_work_starts(net, blurred, tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        sukashi.audit([net, blurred], SHAPES, **{**ASKED, **changed}, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_likeness_is_the_mean_cosine_of_the_best_pairs():
    rng = np.random.default_rng(0)
    one = rng.random((60, 3))
    image = np.repeat(np.arange(20), 3)
    pairs, found = _alike(one, one[:, [2, 0, 1]] + 0.05 * rng.random((60, 3)), image, 0)
    assert pairs.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert 0.9 < found["low"] < found["mean"] < found["high"] < 1
    other = rng.random((60, 3))
    pairs, found = _alike(one, other, image, 0)
    literal = [one[:, i] @ other[:, j] / np.linalg.norm(one[:, i]) / np.linalg.norm(other[:, j]) for i, j in pairs]
    assert found["mean"] == pytest.approx(np.mean(literal), abs=1e-12)


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
    image = torch.tensor([0, 0, 1, 1, 2, 2])
    assert _top(u, image, 2).tolist() == [[1, 4]]
    assert _top(u, image, 3).tolist() == [[1, 4, 2]]
