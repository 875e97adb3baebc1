"""Repairs in experiments: what competes, what is saved, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sukashi
from sukashi import models
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask, rank
from sukashi.criteria import criteria, pruning
from sukashi.criteria.plans import plan_of
from sukashi.experiments.compare.contenders import curve_of, named
from sukashi.experiments.workspace import Workspace
from sukashi.network import surgery
from sukashi.network.sites import weights
from sukashi.repairs import mender, repairs

SPEC = "sukashi:digits_cnn"
FEW = {"calibration": 8, "test_images": 100, "width": 8}


def compare(criteria, out, weights, **settings):
    return sukashi.compare(
        SPEC, "digits", criteria, out=out, weights=weights, **{**FEW, "ratios": [0.3, 0.6], "seeds": 1, **settings}
    )


@pytest.fixture(scope="module")
def compared(cnn_weights, tmp_path_factory):
    return compare(["magnitude"], tmp_path_factory.mktemp("repaired") / "out", cnn_weights, repair=["refit"])


@pytest.fixture(scope="module")
def pruned(cnn_weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    return sukashi.prune(
        *(SPEC, "digits", "magnitude", 0.6), out=out, weights=cnn_weights, round_to=1, repair="refit", **FEW
    )


@pytest.fixture(scope="module")
def bench(cnn_weights):
    return sukashi.open(SPEC, "digits", weights=cnn_weights, **FEW)


def test_a_repaired_criterion_competes_beside_its_cut_with_the_same_plan(compared, bench):
    assert sorted(compared.contenders) == ["magnitude", "magnitude+refit"]
    records = {named(record): record for record in Workspace(compared.out).records()}
    plans = [plan_of(records[name].arrays("plan"), bench.sites) for name in ("magnitude", "magnitude+refit")]
    assert np.array_equal(plans[0].unit, plans[1].unit)
    assert np.array_equal(plans[0].site, plans[1].site)
    cut = pruning.cut(bench.loaded, plans[0].mask(0.6))
    test = bench.test()
    for name, network in (
        ("magnitude", cut),
        ("magnitude+refit", pruning.repaired(cut, bench.loaded, bench.calibration(0), "refit")),
    ):
        curve = curve_of(records[name])
        with torch.no_grad():
            assert np.array_equal(curve.correct[-1], (network.model(test.x).argmax(1) == test.target).numpy())
        assert curve.correct[0].mean() == pytest.approx(compared.dense_accuracy)
    assert compared.methods["magnitude+refit"] == {
        **compared.methods["magnitude"],
        "repair": "refit",
    }
    assert compared.sauce["magnitude+refit"]["mean"] > compared.sauce["magnitude"]["mean"]


def test_the_advised_command_makes_the_repaired_network(cnn_weights, tmp_path, compared):
    found = sukashi.results(compared.out, margin=0.4)
    assert found.advice["contender"] == "magnitude+refit"
    assert " --repair refit" in found.advice["command"]


def test_a_comparison_grows_by_repairs(compared, cnn_weights, tmp_path):
    first = compare(["magnitude"], tmp_path / "out", cnn_weights)
    (before,) = [record.key for record in Workspace(first.out).records()]
    grown = compare(["magnitude"], tmp_path / "out", cnn_weights, repair=["none", "refit"])
    assert before in {record.key for record in Workspace(grown.out).records()}
    assert grown.sauces == compared.sauces
    with_options = compare(["magnitude"], tmp_path / "out", cnn_weights, repair=["refit", "refit[positions=2]"])
    assert "magnitude+refit[positions=2]" in with_options.contenders


def test_a_repaired_cut_is_saved_and_rebuilt(pruned, bench):
    again = sukashi.load(pruned.out)
    made = bench.rank("magnitude").cut(0.6, round_to=1, repair="refit")
    plain = bench.rank("magnitude").cut(0.6, round_to=1)
    x = bench.test().x
    with torch.no_grad():
        assert torch.equal(again.model(x), made.model(x))
        assert not torch.allclose(again.model(x), plain.model(x))
    assert pruned.pruned["accuracy"] == pytest.approx(bench.accuracy(made))
    assert json.loads((Workspace(pruned.out).folder / models.RECIPE).read_text())["provenance"]["repair"] == "refit"
    assert "refit" in pruned.text()


def test_a_cut_that_is_there_is_repaired_as_prune_does(pruned, bench, cnn_weights):
    plain = bench.rank("magnitude").cut(0.6, round_to=1)
    mended = sukashi.repair(plain, SPEC, "digits", weights=cnn_weights, **FEW)
    assert mended.weights_sha256 == models.digest(sukashi.load(pruned.out).model)
    assert plain.weights_sha256 != mended.weights_sha256
    assert "repaired by refit" in repr(mended)


def test_two_cuts_are_one(bench):
    ranking = bench.rank("magnitude")
    once = pruning.cut(bench.loaded, ranking.plan.mask(0.6))
    # The same units in two steps.
    first = ranking.plan.mask(0.3)
    half = pruning.cut(bench.loaded, first)
    rest = surgery.renumber(bench.sites, first)
    keep = {new: ranking.plan.mask(0.6).keep[old][first.keep[old]] for new, old in zip(rest, bench.sites, strict=True)}
    twice = pruning.cut(half, type(first)(keep))
    images = bench.calibration(0)
    found = [pruning.repaired(network, bench.loaded, images, "refit").weights_sha256 for network in (once, twice)]
    assert found[0] == found[1]


def test_what_was_silenced_before_a_cut_is_renumbered():
    tables = [
        {"a": {"out": [0, 2, 3, 5]}, "b": {"in": [0, 2, 3, 5], "zero out": [1]}},
        {"a": {"out": [1, 3]}, "b": {"in": [1, 3], "out": [1, 2]}, "c": {"zero in": [4]}},
        {"c": {"zero in": [2], "in": [1, 2, 4]}},
    ]
    assert surgery.together(tables) == {
        "a": {"out": [2, 5]},
        "b": {"in": [2, 5], "out": [1, 2], "zero out": [0]},
        "c": {"in": [1, 2, 4], "zero in": [1, 2]},
    }


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_what_cannot_be_repaired_is_refused(bench, cnn_weights, tmp_path, monkeypatch):
    def prune(**more):
        sukashi.prune(SPEC, "digits", "magnitude", 0.5, out=tmp_path / "out", weights=cnn_weights, **FEW, **more)

    with pytest.raises(UsageError, match="unknown repair 'refitt'"):
        prune(repair="refitt")
    for options in ("positions=0", "batch_size=0", "positions=1.5"):
        with pytest.raises(UsageError, match=f"{options.partition('=')[0]} of refit must be"):
            prune(repair=f"refit[{options}]")
    with pytest.raises(UsageError, match="`repair` must be different names"):
        compare(["magnitude"], tmp_path / "out", cnn_weights, repair=["refit", "refit"])

    def no_ranking(*given, **named):
        raise AssertionError("refused before a criterion works")

    monkeypatch.setattr("sukashi.experiments.prune.run.plan_for", no_ranking)
    monkeypatch.setattr("sukashi.experiments.compare.run.plan_for", no_ranking)
    vit = "sukashi:digits_vit"
    with pytest.raises(ModelError, match="norm needs a layer of class BatchNorm, and this network has none"):
        sukashi.prune(vit, "digits", "magnitude", 0.5, out=tmp_path / "out", repair="norm", calibration=8)
    with pytest.raises(ModelError, match="norm needs a layer of class BatchNorm"):
        sukashi.compare(vit, "digits", ["magnitude"], out=tmp_path / "out", repair=["norm"], calibration=8)
    with pytest.raises(UsageError, match="`repair` must be different names"):
        compare(["magnitude"], tmp_path / "out", cnn_weights, repair=["none", "none"])
    (site,) = weights(bench.loaded.model, ["conv2", "conv3", "fc*"])
    sparse = pruning.sparse(bench.loaded, Mask({site: torch.ones(8, 1, 3, 3) > 0}))  # of nothing
    for same in (bench.loaded, sparse):
        with pytest.raises(UsageError, match="was not cut from this"):
            pruning.repaired(same, bench.loaded, bench.calibration(0), "refit")
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_mended_and_only_where_something_did(compared, cnn_weights, tmp_path):
    said = "what mended each cut"
    assert said in Path(compared.report).read_text()
    assert said not in Path(compare(["random"], tmp_path / "out", cnn_weights).report).read_text()


@pytest.fixture(scope="module", params=["sparse", "silent"])
def left_alone(request, cnn_weights, tmp_path_factory):
    """A network of which single weights are zero, or units silent, and what a refusal says of it."""
    folder = tmp_path_factory.mktemp("made") / request.param
    how, ratio, what = {
        "sparse": ({"scope": "global"}, 0.5, "single weights of this network are zero"),
        "silent": ({"mode": "zero"}, 0.2, "units of this network are silent"),
    }[request.param]
    sukashi.prune(SPEC, "digits", "magnitude", ratio, out=folder, weights=cnn_weights, **how, **FEW)
    return folder, f"{what} and must stay so"


def test_trial_cuts_of_what_must_stay_zero_are_refused_before_a_criterion_works(left_alone, tmp_path):
    network, words = left_alone
    given = {"calibration": 8, "test_images": 100, "out": tmp_path / "out"}
    for call in (
        lambda: sukashi.prune(network, "digits", "magnitude", target_flops=0.5, repair="refit", **given),
        lambda: sukashi.compare(network, "digits", ["magnitude"], seeds=1, repair=["refit"], **given),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    assert not (tmp_path / "out").exists()


def test_zeros_of_a_sparse_network_stay_through_a_cut_and_its_repair(cnn_weights, tmp_path):
    sparse = tmp_path / "sparse"
    sukashi.prune(SPEC, "digits", "magnitude", 0.5, out=sparse, weights=cnn_weights, scope="global", **FEW)
    given = {"calibration": 8, "test_images": 100, "out": tmp_path / "out"}
    cut = sukashi.prune(sparse, "digits", "magnitude", 0.5, repair="refit", round_to=1, **given)
    made = models.load(SPEC, weights=cut.out)
    assert made.mask is not None
    assert all(not made.model.get_submodule(site.layer).weight[~keep].any() for site, keep in made.mask.keep.items())


def test_units_that_an_earlier_cut_silenced_stay_silent(cnn_weights, tmp_path):
    silent = tmp_path / "silent"
    given = {"round_to": 1, "calibration": 8, "test_images": 100}
    sukashi.prune(SPEC, "digits", "magnitude", 0.2, out=silent, weights=cnn_weights, mode="zero", width=8, **given)
    found = sukashi.prune(silent, "digits", "random", 0.3, out=tmp_path / "out", repair="refit", **given)
    made = models.load(found.out)
    table = surgery.together(made.cuts)
    read = {name: sides["zero in"] for name, sides in table.items() if sides.get("zero in")}
    assert read
    for name, positions in read.items():
        assert not made.model.get_submodule(name).weight[:, positions].any(), name


@pytest.mark.parametrize("scope", ["row", "1:3"])
def test_what_is_left_of_the_weights_is_refitted_and_zeros_stay(cnn_weights, tmp_path, bench, scope):
    given = {"weights": cnn_weights, "scope": scope, "exclude": ["fc*"], **FEW}
    ratio = 0.5 if scope == "row" else 2 / 3
    plain = sukashi.prune(SPEC, "digits", "wanda", ratio, out=tmp_path / "plain", **given)
    found = sukashi.prune(SPEC, "digits", "wanda", ratio, out=tmp_path / "out", repair="refit", **given)
    networks = [models.load(SPEC, weights=of.out) for of in (plain, found)]
    assert networks[0].mask is not None
    assert networks[1].mask is not None
    for site, keep in networks[0].mask.keep.items():
        assert torch.equal(keep, networks[1].mask.keep[site])
        weights = [of.model.get_submodule(site.layer).weight for of in networks]
        assert torch.equal(weights[1] != 0, keep & (weights[1] != 0))
        assert not torch.equal(*weights)
    assert found.pruned["accuracy"] >= plain.pruned["accuracy"]
    assert "it is not the dense network with those weights at zero." in str(found)
    made = pruning.repaired(networks[0], bench.loaded, bench.calibration(0), "refit").model.state_dict()
    for name, tensor in networks[1].model.state_dict().items():
        assert torch.equal(made[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("scope", [None, "row"])
def test_a_schedule_mends_each_cut_before_it_trains(cnn_weights, tmp_path, scope):
    given = {"weights": cnn_weights, "scope": scope, "epochs": 1, "lr": 1e-12, **FEW}
    for name, repair in (("plain", "none"), ("mended", "refit")):
        sukashi.schedule(
            *(SPEC, "digits", "oneshot", ["magnitude"], [0.5]), out=tmp_path / name, repair=repair, seeds=1, **given
        )
    kept = [json.loads((tmp_path / name / "magnitude/0/0.50/trial.json").read_text()) for name in ("plain", "mended")]
    assert kept[1]["result"]["accuracy"] > kept[0]["result"]["accuracy"]


def test_a_schedule_that_rewinds_has_nothing_to_mend(tmp_path):
    with pytest.raises(UsageError, match="lottery goes back to early weights, so that nothing of a repair would last"):
        sukashi.schedule(
            *(SPEC, "digits", "lottery", ["magnitude"], [0.5]), out=tmp_path / "out", repair="refit", scope="row", **FEW
        )


def test_a_transformer_is_repaired(small):
    case = small["vit"]
    images, model = case.data, case.model
    plan = rank(criteria["magnitude"](model, case.sites, images, generator=torch.Generator()))
    off = []
    for name in ("none", "refit"):
        cut = copy.deepcopy(model)
        table = surgery.cut(cut, plan.mask(0.5))
        mend = mender(name, model, images)
        if mend is not None:
            mend(cut, table)
        with torch.no_grad():
            off.append(float((cut(images.x) - model(images.x)).square().mean()))
    assert off[1] < 0.5 * off[0]


def test_every_cut_of_a_curve_may_be_mended_by_norm(cnn_weights, tmp_path):
    found = compare(["magnitude"], tmp_path / "out", cnn_weights, ratios=[0.05, 0.3, 0.6], repair=["norm"])
    assert set(found.contenders) == {"magnitude", "magnitude+norm"}
    assert found.sauces["magnitude+norm"] != found.sauces["magnitude"]


def test_a_repair_of_ones_own_spoils_nothing_but_what_it_mends(bench, monkeypatch):
    def spoils(model, dense, table, data, *, returns: bool = False):
        for network in (model, dense):
            next(network.parameters()).data.zero_()
        data.x.zero_()
        table.clear()
        return model if returns else None

    spoils.__module__ = "somewhere"
    monkeypatch.setattr(repairs, "_methods", dict(repairs._methods))
    repairs.register("spoils", source="nobody")(spoils)
    data, dense = bench.calibration(0), copy.deepcopy(bench.loaded.model)
    plan = rank(criteria["magnitude"](dense, bench.sites, data, generator=torch.Generator()))
    x, small = data.x.clone(), copy.deepcopy(dense)
    table = surgery.cut(small, plan.mask(0.5))
    told = copy.deepcopy(table)
    mender("spoils", dense, data)(small, table)
    assert not next(small.parameters()).any()
    assert all(a.equal(b) for a, b in zip(dense.parameters(), bench.loaded.model.parameters(), strict=True))
    assert data.x.equal(x)
    assert table == told
    with pytest.raises(UsageError, match=r"gives DigitsCNN: a repair changes the weights of `model` in place"):
        mender("spoils[returns=true]", dense, data)(small, table)
