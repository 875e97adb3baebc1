"""Audits of units: what is kept of them, what is said, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import sukashi
from sukashi import data
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Batch
from sukashi.decompositions.nodes import nodes_of
from sukashi.decompositions.vectors import units
from sukashi.experiments.audit import paired
from sukashi.experiments.audit.networks import Answers
from sukashi.experiments.audit.neurons.summary import of_classes
from sukashi.measures import neurons
from sukashi.measures.neurons import Layout, layout, most
from sukashi.models.architectures import DigitsViT
from sukashi.network import hooks, sites
from sukashi.network.blocks import inner

ASKED = {"subjects": ["neurons"], "test_images": 200}


@pytest.fixture(scope="module")
def nets(small):
    """The small ViT, the same again, and one whose last MLP answers at random."""
    vit = small["vit"].loaded
    other = copy.deepcopy(vit)
    with torch.no_grad():
        weight = other.model.blocks[2].fc1.weight
        weight.copy_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return vit, copy.deepcopy(vit), other


@pytest.fixture(scope="module")
def audited(nets, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "audit"
    return sukashi.audit([*nets], "digits", **ASKED, layers=["blocks.0.attn.core", "blocks.2.fc1"], top=3, out=out)


def test_the_same_network_has_the_same_units_and_another_has_others(audited):
    rows = audited.neurons["comparisons"]
    _, second, third = (model["label"] for model in audited.models)
    same = [row for row in rows if row["model"] == second]
    other = {row["measure"]: row for row in rows if row["model"] == third}
    assert len(same) == len(other) == 10
    assert {row["difference"] for row in same} == {0}
    assert not any(row["changed"] for row in same)
    assert other["separation/blocks.2.fc1"]["changed"]
    assert other["separation/blocks.2.fc1"]["difference"] < 0
    assert f"have changed in {third}; most, {third}: " in audited.verdict
    assert "worse at telling the class" in " ".join(audited.lines)
    assert [row["subject"] for row in audited.table()] == ["neurons"] * 20
    report = Path(audited.report).read_text()
    assert "Do the units that matter most" in report
    assert "4 of" not in report.split("blocks.2.fc1")[0]
    assert "3 of 4" in report
    assert "Which images" not in report


def test_figures_are_those_of_the_units_that_matter_most_literally(nets, audited):
    loaded = nets[0]
    model = loaded.model.eval()
    images = data.load("digits")
    test, train = images.test.limit(200).whole(loaded.preprocess), images.train.calibration(32, 0)
    train = train.whole(loaded.preprocess).by_class()
    site = sites.place(model, "blocks.2.fc1", test.x)
    mean = hooks.means(model, [site], [train.x])[site]
    with hooks.recorded(model, [site]) as seen, torch.no_grad():
        model(test.x)
        a = seen[site][0].double()
    pooled, largest = a.mean(2), a.amax(2)  # (N, U), no class token
    area = neurons.selectivity(pooled, test.target, 10)
    of_class = []
    for k in range(10):
        own = train.x[train.target == k]
        lost = torch.zeros(site.n_units)
        with hooks.recorded(model, [site]) as seen:
            of = model(own)[:, k].sum()
            (slope,) = torch.autograd.grad(of, seen[site][0])
            lost = ((seen[site][0] - mean[:, :1].float()) * slope).sum(2).mean(0)
        top = lost.argsort(descending=True)[:3]
        values = [float(area[unit, k]) for unit in top]
        entropies = [float(neurons.label_entropy(largest[:, [unit]], test.target, 10)) for unit in top]
        of_class.append((np.mean(values), np.mean(entropies)))
    means = audited.neurons["means"]
    first = audited.reference
    assert means["selectivity/blocks.2.fc1"][first]["mean"] == pytest.approx(
        np.mean([a for a, _ in of_class]), abs=1e-6
    )
    assert means["label_entropy/blocks.2.fc1"][first]["mean"] == pytest.approx(
        np.mean([b for _, b in of_class]), abs=1e-6
    )


def test_heads_are_as_long_as_what_they_write(nets):
    model = nets[0].model.eval()
    x = data.load("digits").test.limit(20).whole(nets[0].preprocess)
    site = units(model, "blocks.1.attn.core", x.x)
    assert site.n_units == 4
    pooled, largest = neurons.responses(model, site, x, layout(model, site, x.x))
    with hooks.recorded(model, [site]) as seen, torch.no_grad():
        model(x.x)
        lengths = seen[site][0].reshape(20, 4, 2, 16).norm(dim=2)  # heads, their dimensions, tokens
    torch.testing.assert_close(pooled, lengths.mean(2))
    torch.testing.assert_close(largest, lengths.amax(2))


def test_a_class_token_is_no_patch():
    model = sukashi.models.load("sukashi:small_vit", n_classes=3, width=16).model.eval()
    x = Batch(
        torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(5, dtype=torch.long),
        ("",) * 5,
    )
    site = sites.place(model, "blocks.2.mlp.act", x.x, axis=-1)
    assert layout(model, site, x.x) == Layout(0, 1, (8, 8))
    pooled, largest = neurons.responses(model, site, x, layout(model, site, x.x))
    with hooks.recorded(model, [site]) as seen, torch.no_grad():
        model(x.x)
        a = seen[site][0]
    torch.testing.assert_close(pooled, a[:, :, 0])
    torch.testing.assert_close(largest, a[:, :, 1:].amax(2))
    assert inner(model, x.x) == ["blocks.1.mlp.act", "blocks.3.mlp.act", "blocks.5.mlp.act"]


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("sukashi:cifar_resnet20", ["layer1.1", "layer2.2", "layer3.2"]),
        ("sukashi:digits_cnn", ["conv1", "conv3", "fc2"]),
        ("sukashi:digits_vit", ["blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"]),
        ("torchvision:resnet18", ["layer1.1", "layer3.0", "layer4.1"]),
        ("timm:mobilenetv3_small_050", ["blocks.1.1", "blocks.3.0", "blocks.4.2"]),
    ],
)
def test_where_to_look_when_nobody_says(spec, layers):
    loaded = sukashi.models.load(spec, n_classes=10)
    p = loaded.preprocess
    assert inner(loaded.model, torch.zeros(2, p.channels, p.height, p.width)) == layers


def test_the_units_that_matter_most_are_told_class_by_class():
    batch = Batch(torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]), ("",) * 4)
    matter = torch.tensor([[1.0, 0, 3], [1, 0, 0], [0, 5, 0], [0, 5, -9]])
    assert most(matter, batch, 2, 2).tolist() == [[2, 0], [1, 0]]


def test_units_without_a_variance_are_left_out_of_its_mean():
    kept = {
        "0 top": np.array([[0, 1], [1, 2]]),
        "0 selectivity": np.array([[0.5, 0.7], [0.2, 0.4]]),
        "0 separation": np.array([[0.5, 0.7], [0.8, 0.6]]),
        "0 variance": np.array([[np.nan, 2], [np.nan, np.nan]]),
        "0 entropy": np.array([[1.0, 2], [2, np.nan]]),
        "0 impact": np.array([1.0, np.nan, 5]),
    }
    found = of_classes(kept, np.array([0, 0, 1]), "0 ")
    np.testing.assert_allclose(found["selectivity"], [0.6, 0.3])
    np.testing.assert_allclose(found["separation"], [0.6, 0.7])
    np.testing.assert_allclose(found["class_variance"], [2, np.nan])
    np.testing.assert_allclose(found["label_entropy"], [1.5, 2])
    np.testing.assert_allclose(found["ablation_impact"], [1, 5])


class Registers(nn.Module):
    """A ViT of which tokens before the patches are read by nobody at the end, or one of them."""

    def __init__(self, read):
        super().__init__()
        self.body, self.read = DigitsViT(3, 8, depth=1), read
        self.registers = nn.Parameter(torch.randn(1, 2, 8))

    def forward(self, x):
        body = self.body
        tokens = body.patches(x).flatten(2).transpose(1, 2) + body.position
        tokens = torch.cat([self.registers.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = body.norm(body.blocks(tokens))
        return body.head(tokens[:, 2:].mean(1) if self.read is None else tokens[:, self.read])


@pytest.mark.parametrize("read", [None, 0, 1])
def test_a_token_that_nobody_reads_is_no_class_token(read):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Registers(read).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert layout(model, sites.place(model, "body.blocks.0", x, axis=-1), x) == Layout(read, 2, (4, 4))
    assert layout(model, sites.place(model, "body.patches", x), x) == Layout(None, 0, (4, 4))
    assert layout(model, sites.place(model, "body.head", x), x) == Layout()


def test_what_tokens_are_is_not_guessed_where_it_cannot_be_told():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, qk_norm=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = layout(model, sites.place(model, "blocks.0", x, axis=-1), x)
    assert found.class_token is None
    assert "no attention that could be written out" in found.unknown
    with pytest.raises(ModelError, match=r"heads|attention"):
        nodes_of(model, x)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"layers": ["blocks.0.fc3"]}, ModelError, "no layer 'blocks.0.fc3'.*blocks.0.fc"),
        ({"layers": []}, UsageError, "layers must be different names"),
        ({"layers": ["head", "head"]}, UsageError, "layers must be different names"),
        ({"layers": ["blocks.0.fc1"], "top": 17}, UsageError, "`top` must be at most the 16 units of 'blocks.0.fc1'"),
        (
            {"subjects": ["saliency"], "top": 3},
            UsageError,
            "`top` is about neurons and sae, which are not among `subjects`",
        ),
        ({"population": "all"}, UsageError, "`population` is about saliency"),
    ],
)
def test_what_means_nothing_is_refused_before_work_starts(nets, tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        sukashi.audit([*nets[:2]], "digits", **{**ASKED, **changed}, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_class_with_too_few_training_images_is_refused(nets, tmp_path):
    images = data.load("digits")
    few = images.train.subset(range(70)).whole(nets[0].preprocess)
    with pytest.raises(DataError, match="training images, this audit needs 8 of each class"):
        sukashi.audit([*nets[:2]], (few.x, few.target), subjects=["neurons"], out=tmp_path / "a")


def an_answer(label, guesses=False):
    right = np.array([True] * 30 + [guesses] * 0)
    target = np.arange(30) % 3
    right = np.zeros(30, dtype=bool) if guesses else right
    return Answers(
        label, None, None, False, None, None, ("a", "b", "c"), {}, tuple(map(str, range(30))), target, right, target
    )


def test_comparisons_are_paired_over_classes_and_corrected_together():
    rng = np.random.default_rng(0)
    base = rng.random(10)
    values = {
        "m/x": {"r": base, "one": base + 0.5 + 0.01 * rng.random(10), "lost": np.ones(10)},
        "m/y": {"r": base, "one": base + rng.normal(size=10), "lost": np.full(10, np.nan)},
        "m/z": {"r": base[:4].tolist() + [np.nan] * 6, "one": base + 1, "lost": base},
    }
    values = {name: {label: np.array(own)[None] for label, own in of.items()} for name, of in values.items()}
    answers = [an_answer("r"), an_answer("one"), an_answer("lost", guesses=True)]
    words = {"m": ("higher", "brighter", "darker")}
    rows = {(row["model"], row["measure"]): row for row in paired.compare(values, answers, words)}
    first = rows["one", "m/x"]
    assert first["changed"]
    assert first["said"].startswith("brighter by .505 [")
    assert first["low"] < first["difference"] < first["high"]
    assert rows["one", "m/y"]["said"].startswith("no detectable change in 10 classes")
    assert rows["one", "m/z"]["n"] == 4
    assert rows["one", "m/z"]["said"] == "too few classes to say (4)"
    assert ("lost", "m/y") not in rows
    same = {"m/x": {"r": np.zeros((1, 10)), "one": np.full((1, 10), 0.5)}}
    assert paired.compare(same, answers[:2], words)[0]["p"] == 2.0**-9  # all differ by the same
    said = paired.verdict([*rows.values()], answers, "the figures")
    assert said.startswith("The figures have changed in one; most, one: brighter by .505")
    assert paired.verdict([], [answers[0], answers[2]], "the figures").startswith("Of the figures nothing can be said")
    assert paired.lines([*rows.values()], answers) == [
        f"one: {first['said']} at x ({abs(first['size']):.2f} SD); no detectable change in 2 of 3 figures."
    ]


def test_of_several_seeds_their_differences_count_too():
    """Seeds whose means differ widen the interval; one seed alone would call its own noise a change."""
    rng = np.random.default_rng(0)
    noise, classes = rng.normal(size=(4, 1)), 0.01 * rng.normal(size=(4, 10))
    of = {"m/x": {"r": np.zeros((4, 10)), "one": noise + classes}}
    answers, words = [an_answer("r"), an_answer("one")], {"m": ("higher", "brighter", "darker")}
    (row,) = paired.compare(of, answers, words)
    assert not row["changed"]
    assert row["low"] < 0 < row["high"]
    (alone,) = paired.compare({"m/x": {k: own[:1] for k, own in of["m/x"].items()}}, answers, words)
    assert alone["changed"]
