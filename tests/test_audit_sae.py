"""Audits of autoencoders and of circuits: what is kept of them, what is said, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import sukashi
from sukashi import data
from sukashi.core.errors import ModelError, UsageError
from sukashi.decompositions import circuits, sae
from sukashi.decompositions.nodes import nodes_of
from sukashi.experiments.audit.circuits import summary as of_circuits
from sukashi.experiments.audit.sae import run as sae_run
from sukashi.experiments.audit.sae.summary import stability
from sukashi.network import hooks

SAE = {"subjects": ["sae"], "layer": "blocks.1", "k": [2, 4], "expansion": 3, "top": 4, "seeds": 2, "test_images": 200}
CIRCUITS = {"subjects": ["circuits"], "penalties": [1.0, 8.0], "epochs": 4, "seeds": 2, "test_images": 200}


@pytest.fixture(scope="module")
def nets(small):
    """The small ViT, the same again, and one of whose weights half are zero."""
    vit = small["vit"].loaded
    sparse = copy.deepcopy(vit)
    with torch.no_grad():
        for block in sparse.model.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.fc1, block.fc2):
                least = layer.weight.abs().flatten().median()
                layer.weight.mul_(layer.weight.abs() > least)
    return vit, sparse


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_run, "STEPS", 150)
        patch.setattr(sae_run, "ROWS", 128)
        yield


@pytest.fixture(scope="module")
def encoded(nets, quick, tmp_path_factory):
    return sukashi.audit([*nets], "digits", **SAE, out=tmp_path_factory.mktemp("made") / "audit")


@pytest.fixture(scope="module")
def circled(nets, tmp_path_factory):
    return sukashi.audit([*nets], "digits", **CIRCUITS, out=tmp_path_factory.mktemp("made") / "audit")


def kept(result, name):
    found = {}
    for path in Path(result.out).glob(f"trials/*/{name}.npz"):
        with np.load(path) as arrays:
            found[path.parent.name] = dict(arrays)
    return found


def test_autoencoders_are_told_of_each_network_and_number_of_latents(nets, encoded):
    rows = encoded.sae["models"]
    labels = [model["label"] for model in encoded.models]
    assert [(row["model"], row["k"]) for row in rows] == [(label, k) for label in labels for k in (2, 4)]
    assert all(row["explained"] == pytest.approx(1 - row["nmse"]) for row in rows)
    assert rows[1]["explained"] > rows[0]["explained"]
    assert all((row["stability"] is None) == (row["k"] == 4) for row in rows)
    assert encoded.sae["enough"][labels[0]] == 2
    assert len(encoded.sae["comparisons"]) == 6
    report = Path(encoded.report).read_text()
    assert "How well do autoencoders give back" in report
    assert report.count("<h3>") == 2
    assert len(encoded.table()) == 6


def test_what_is_told_is_that_of_the_kept_autoencoder_on_test_images(nets, encoded):
    model, preprocess = nets[0].model.eval(), nets[0].preprocess
    test = data.load("digits").test.limit(200).whole(preprocess)
    held = {}
    handle = model.blocks[1].register_forward_hook(lambda m, a, out: held.update(x=out))
    with torch.no_grad():
        model(test.x)
    handle.remove()
    rows = held["x"].flatten(0, 1)
    found = []
    for arrays in kept(encoded, "sae").values():
        own = sae.SparseAutoencoder(8, 24, 2, generator=torch.Generator())
        own.load_state_dict(
            {n.removeprefix("sae "): torch.from_numpy(of) for n, of in arrays.items() if n.startswith("sae ")}
        )
        found.append(sae.quality(own, rows).nmse)
    told = [row["nmse"] for row in encoded.sae["models"] if row["model"] == encoded.reference]
    # Two seeds of the first number, of which the mean is told, and one of the second.
    pairs = [(a + b) / 2 for i, a in enumerate(found) for b in found[:i]]
    assert min(abs(of - told[0]) for of in pairs) < 1e-6
    assert min(abs(of - told[1]) for of in found) < 1e-6


def test_stability_is_the_mean_of_the_largest_cosines():
    class One:
        def __init__(self, directions):
            self.directions = directions

        def arrays(self, name):
            return {"sae decoder": np.vstack([self.directions, -np.ones(3)]), "fires": np.array([True] * 3 + [False])}

    a = np.eye(3)
    b = np.array([[0.0, 1, 0], [0.6, 0.8, 0], [0, -1, 0]])
    assert stability([One(a)]) is None
    assert stability([One(a), One(a)]) == 1
    forth, back = np.mean([0.6, 1, 0]), np.mean([1, 0.8, 0])  # the one that nothing fires has no part in it
    assert stability([One(a), One(b)]) == pytest.approx((forth + back) / 2)


def test_circuits_of_a_sparse_twin_have_fewer_edges_by_zeros_alone(nets, circled):
    dense, sparse = circled.circuits["models"]
    assert dense["edges_reference"] is None
    model = nets[1].model
    nodes = nodes_of(model, torch.randn(2, 1, 8, 8))
    masks = [
        arrays["masks"]
        for name, arrays in kept(circled, "circuits").items()
        if "edges reference" not in arrays and trial(circled, name)["result"]["penalty"] == dense["penalty"]
    ]
    literal = np.mean([circuits.edges(model, nodes, torch.from_numpy(of)).mean() for of in masks])
    assert sparse["edges_reference"] == pytest.approx(literal)
    assert sparse["edges_reference"] < dense["edges"]
    assert 0 < dense["stability"] <= 1
    assert dense["quality"] == pytest.approx(np.mean(circled.circuits["means"]["quality"][dense["model"]]["mean"]))
    assert len(circled.circuits["sweep"]) == 4
    assert dense["kinds"][:8] == ["norm1", "q", "k", "v", "attn_out", "norm2", "mlp_act", "mlp_out"]
    report = Path(circled.report).read_text()
    assert "How much of that is nothing but zeros?" in report
    assert "by chance" in report


def trial(result, name):
    import json

    return json.loads((Path(result.out) / "trials" / name / "trial.json").read_text())


def test_the_best_penalty_is_that_of_validation_images(circled):
    for row in circled.circuits["models"]:
        sweep = [of for of in circled.circuits["sweep"] if of["model"] == row["model"]]
        assert row["penalty"] == max(sweep, key=lambda of: of["quality"])["penalty"]


def test_accuracies_are_those_of_the_masks_on_test_images(nets, circled):
    model, preprocess = nets[0].model.eval(), nets[0].preprocess
    images = data.load("digits")
    test = images.test.limit(200).whole(preprocess)
    whole = images.train.calibration(96, 0).whole(preprocess).by_class()
    some = {*images.train.calibration(64, 0).image_ids}
    train = whole[torch.tensor([name in some for name in whole.image_id]).nonzero()[:, 0]]
    assert len(train) == 640
    nodes = nodes_of(model, test.x[:2])
    means = hooks.means(model, nodes.places, [train.x])
    arrays = next(of for of in kept(circled, "circuits").values() if "edges reference" not in of)
    masks = torch.from_numpy(arrays["masks"])
    assert torch.equal(
        circuits.accuracy(model, nodes, test, [*range(10)], masks, means), torch.from_numpy(arrays["right"])
    )
    left = circuits.accuracy(model, nodes, test, [*range(10)], ~masks, means)
    assert torch.equal(left, torch.from_numpy(arrays["right complement"]))


def test_stability_of_masks_is_jaccards_and_that_of_chance():
    generator = np.random.default_rng(0)
    a, b = generator.random((3, 4000)) < 0.3, generator.random((3, 4000)) < 0.5
    shared, chance = of_circuits._stability([a, b])
    literal = np.mean(
        [
            len({*np.flatnonzero(x)} & {*np.flatnonzero(y)}) / len({*np.flatnonzero(x)} | {*np.flatnonzero(y)})
            for x, y in zip(a, b, strict=True)
        ]
    )
    assert shared == pytest.approx(literal)
    assert shared == pytest.approx(chance, abs=0.02)
    assert of_circuits._stability([a]) == (None, None)
    # Zhang 2026, table 3, dense: 89.12 % of accuracy, 32.42 % of the edges, 29.03 % of the nodes.
    assert of_circuits.quality(0.8912, 0.3242) == pytest.approx(0.602, abs=5e-4)
    assert of_circuits.printed_quality(0.8912, 0.95, 0.2903) == pytest.approx(0.8912 / 0.95 * 0.7097)
    nothing = np.zeros((3, 10), dtype=bool)
    assert of_circuits._stability([nothing, nothing])[0] == 1


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({**SAE, "layer": None}, UsageError, "give `layer`"),
        ({**SAE, "layer": "blocks.7"}, ModelError, "no layer 'blocks.7'"),
        ({**SAE, "k": [25]}, UsageError, r"`k` must be at most the 24 latents \(3 x the 8 features"),
        ({**SAE, "k": [2, 2]}, UsageError, "k must be different numbers"),
        ({**SAE, "top": 25}, UsageError, "`top` must be at most the 24 latents"),
        ({**SAE, "tokens": "class"}, UsageError, "holds no class token, got `tokens` class: give all"),
        ({**SAE, "epochs": 3}, UsageError, "`epochs` is about circuits, which is not among"),
        ({**CIRCUITS, "penalties": [-1.0]}, UsageError, "penalties must be different numbers, 0 or more"),
        ({**CIRCUITS, "layer": "blocks.1"}, UsageError, "`layer` is about concepts and sae, which are not among"),
    ],
)
def test_what_means_nothing_is_refused_before_work_starts(nets, tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        sukashi.audit([*nets], "digits", **given, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
