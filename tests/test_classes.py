"""A network with more classes than the data has: which outputs mean them, and that everything reads these."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sukashi
from sukashi import data, models
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.objective import CLASSIFICATION, Classification
from sukashi.criteria import criteria
from sukashi.data.classes import outputs_by_name

CHOSEN = (8, 3, 5)
ONLY = ["8", "3", "5"]


@pytest.fixture(scope="module")
def wide(small):
    """A network of ten digits in float64, and images of three as data of three classes: model, sites, data."""
    case = small["cnn"]
    rows = torch.isin(case.data.target, torch.tensor(CHOSEN))
    target = torch.tensor([CHOSEN.index(k) if k in CHOSEN else -1 for k in case.data.target.tolist()])[rows]
    batch = replace(
        case.data,
        x=case.data.x[rows].double(),
        target=target,
        image_id=tuple(i for i, kept in zip(case.data.image_id, rows.tolist(), strict=True) if kept),
        objective=Classification(CHOSEN),
    )
    return copy.deepcopy(case.model).double(), case.sites, batch


@pytest.fixture(scope="module")
def narrow(wide):
    """The same network with these three outputs alone."""
    model = copy.deepcopy(wide[0])
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.weight, last.bias = nn.Parameter(last.weight[list(CHOSEN)]), nn.Parameter(last.bias[list(CHOSEN)])
    return model


def both(name, wide, other, batch, **options):
    """What a criterion makes of the wide network, and of what stands for it."""
    method, places = criteria[name], wide[1]
    if "channel" not in method.facts["kinds"]:
        places = [sukashi.network.sites.weights(wide[0])[0]]
    found = []
    for model, images in ((wide[0], wide[2]), (other, batch)):
        outcome = method(model, places, images, generator=torch.Generator().manual_seed(0), **options)
        found.append(outcome)
    return found


def alike(one, other):
    if hasattr(one, "values"):
        return all(torch.allclose(one.values[s], other.values[s], rtol=1e-9, atol=1e-12) for s in one.values)
    order = [(plan.site.tolist(), plan.unit.tolist()) for plan in (one, other)]
    return order[0] == order[1] and np.allclose(one.effect, other.effect, rtol=1e-6, atol=1e-9)


# What is refitted after a round answers for all outputs of the network.
OPTIONS = {"cswap": {"samples": "all"}, "cbp": {"samples": "all"}, "obs": {"rounds": 1}}


@pytest.mark.parametrize("name", criteria.names())
def test_among_the_data_s_classes_it_is_the_network_of_these_outputs(name, wide, narrow, monkeypatch):
    # Units of the narrow network have fewer parameters: drift is to weigh them alike.
    monkeypatch.setattr("sukashi.criteria.drift.unit_parameters", lambda model, sites, keep: dict.fromkeys(sites, 1))
    plain = replace(wide[2], objective=CLASSIFICATION)
    assert alike(*both(name, wide, narrow, plain, **OPTIONS.get(name, {})))


@pytest.mark.parametrize("name", criteria.names())
def test_among_the_model_s_classes_a_target_is_the_model_s_number(name, wide):
    model, sites, batch = wide
    of_model = (model, sites, replace(batch, objective=Classification(CHOSEN, "model")))
    plain = replace(batch, target=torch.tensor(CHOSEN)[batch.target], objective=CLASSIFICATION)
    assert alike(*both(name, of_model, model, plain, **OPTIONS.get(name, {})))


@pytest.mark.parametrize("options", [{"classes": "each"}, {"mode": "contrastive"}])
def test_options_that_read_other_classes_read_these(options, wide, narrow):
    plain = replace(wide[2], objective=CLASSIFICATION)
    assert alike(*both("backtrace", wide, narrow, plain, **options))


def test_numbers_of_the_objective_are_those_of_the_chosen_logits():
    logits = torch.randn(30, 10, generator=torch.Generator().manual_seed(0)).double()
    target = torch.arange(30) % 3
    mapped = torch.tensor(CHOSEN)[target]
    few, all_of_them = Classification(CHOSEN), Classification(CHOSEN, "model")
    for said in ("outcome", "score", "explained", "loss"):
        expected = getattr(CLASSIFICATION, said)
        assert torch.equal(getattr(few, said)(logits, target), expected(logits[:, list(CHOSEN)], target))
        assert torch.equal(getattr(all_of_them, said)(logits, target), expected(logits, mapped))
    assert few.chance(target) == all_of_them.chance(target) == 1 / 3
    assert torch.equal(few.answer(logits), logits[:, list(CHOSEN)].argmax(1))
    wanted = [CHOSEN.index(k) if k in CHOSEN else -1 for k in logits.argmax(1).tolist()]
    assert all_of_them.answer(logits).tolist() == wanted
    torch.testing.assert_close(few.probabilities(logits), logits[:, list(CHOSEN)].softmax(1))
    torch.testing.assert_close(all_of_them.probabilities(logits), logits.softmax(1)[:, list(CHOSEN)])
    with pytest.raises(DataError, match="target 3 is no class of a model with 10 logits"):
        few.check(logits, target + 1)
    with pytest.raises(DataError, match="target 8 is no class of a model with 6 logits"):
        few.check(logits[:, :6], target)


# --- which outputs --------------------------------------------------------------------------------------------------


def test_outputs_are_found_by_names_that_say_one_class():
    names = ("Tench", "crane", "goldfish", "crane", "maillot", "Maillot")
    assert outputs_by_name(names, ("goldfish", "TENCH ")) == (2, 0)
    assert outputs_by_name(names, ("Maillot", "tench")) == (5, 0)
    assert outputs_by_name(names, ("maillot", "Maillot")) == (4, 5)
    for unknown in (("crane", "tench"), ("MAILLOT", "tench"), ("shark", "tench")):
        assert outputs_by_name(names, unknown) is None
    assert outputs_by_name(None, ("tench", "crane")) is None


def test_a_class_map_names_outputs_and_decides_the_hash():
    three = data.load("digits", only=ONLY)
    assert three.answered_by(3, None) is three
    with pytest.raises(ModelError, match=r"10 classes and the data 3: .* or give a `class_map`"):
        three.answered_by(10, None)
    with pytest.raises(
        ModelError,
        match=r"2 classes and the data 3: .*, train this one on by `sukashi.finetune\(new_head=True\)`$",
    ):
        three.answered_by(2, None)
    named = three.answered_by(10, list("0123456789"))
    assert named.train.objective == named.test.limit(9).objective == Classification(CHOSEN)
    assert named.notes[-1] == (
        "the data have 3 of the model's 10 classes, found by their names; an answer is the best of these"
    )
    whole = named.test.whole(models.load("sukashi:digits_cnn").preprocess)
    assert whole.objective == named.test.objective
    hashes = {
        three.sha256,
        named.sha256,
        three.answered_by(10, list("0123456789"), "model").sha256,
        three.answered_by(10, list("9876543210")).sha256,
    }
    assert len(hashes) == 4


def test_a_class_map_is_an_injection(tmp_path):
    from pictures import folder

    root = folder(tmp_path)
    found = data.load(root, class_map={"cat": 900, "dog": 7})
    assert (found.class_names, found.outputs) == (("dog", "cat"), (7, 900))
    assert found.answered_by(1000, None).train.objective.outputs == (7, 900)
    with pytest.raises(DataError, match="class number 900 and the model has 10 classes: numbers count from 0"):
        found.answered_by(10, None)
    plain = data.load(root, class_map={"cat": 1, "dog": 0})
    assert plain.answered_by(2, ("cat", "dog")) is plain
    assert plain.answered_by(1000, None).train.objective.outputs == (0, 1)


# --- experiments ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten(small, tmp_path_factory):
    """A saved network of ten digits that knows their names."""
    folder = tmp_path_factory.mktemp("ten") / "net"
    models.save(folder, replace(small["cnn"].loaded, class_names=tuple("0123456789")), provenance={})
    return folder


ASKED = {"data": "digits", "only": ONLY, "test_images": 60}
COMPARED = {**ASKED, "calibration": 6, "criteria": ["random", "cswap"], "ratios": [0.5], "seeds": 1}


@pytest.mark.slow
def test_a_comparison_counts_the_data_s_classes(ten, tmp_path):
    found = {}
    for among in ("data", "model"):
        found[among] = sukashi.compare(ten, out=tmp_path / among, among=among, **COMPARED).to_json()
        trials = [json.loads(path.read_text()) for path in (tmp_path / among).rglob("trial.json")]
        assert len(trials) == 2
        for figures in (trial["result"] for trial in trials):
            assert figures["chance"] == 1 / 3, "one answer for all, of three equal classes"
            assert figures["class_names"] == ONLY
    found_answers = [np.load(path)["answer"] for path in (tmp_path / "model").rglob("curve.npz")]
    assert {int(answer) for answers in found_answers for answer in np.unique(answers)} <= {-1, 0, 1, 2}
    assert any((answers == -1).any() for answers in found_answers), "a class of the model alone"
    assert found["data"]["sauce"] != found["model"]["sauce"]
    with pytest.raises(UsageError, match="data has other contents"):
        sukashi.compare(ten, out=tmp_path / "data", among="model", **COMPARED)


def test_what_is_cut_still_knows_all_classes(ten, tmp_path):
    cut, audited, tuned = (tmp_path / name for name in ("cut", "audited", "tuned"))
    result = sukashi.prune(ten, criterion="magnitude", ratio=0.5, calibration=6, out=cut, **ASKED)
    assert result.class_names == ONLY
    loaded = models.load(str(cut))
    assert (loaded.class_names, loaded.n_classes) == (tuple("0123456789"), 10)
    audit = sukashi.audit(
        [ten, cut], attributions=["saliency"], measures=["gini"], population="all", out=audited, **ASKED
    )
    assert any("3 of the model's 10 classes" in note for note in audit.to_json()["notes"])
    trained = sukashi.finetune(cut, epochs=1, batch_size=64, out=tuned, **ASKED)
    assert trained.class_names == ONLY
    assert models.load(str(tuned)).class_names == tuple("0123456789")
    assert sukashi.check(tuned, limit=0, calibration=6, **ASKED).class_names == ONLY
