"""Audits: every figure again from the kept values, planted effects found, killed runs, and what is refused."""

import copy
import dataclasses
import functools
import html
import json
import re
import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from torch import nn

import sukashi
from sukashi import data, models
from sukashi.attributions import attributions
from sukashi.attributions.maps import saliency_map
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Maps, Mask, Preprocess
from sukashi.criteria import pruning
from sukashi.experiments.audit import networks
from sukashi.experiments.audit import page as audit_page
from sukashi.experiments.audit.saliency import cells, page, verdict
from sukashi.experiments.audit.saliency.values import ORDERS
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.study.file import read as read_study
from sukashi.experiments.workspace import Workspace
from sukashi.measures import measures
from sukashi.measures.faithfulness import removal
from sukashi.measures.inputs import measured
from sukashi.models import saved
from sukashi.network import perturbed, sites
from sukashi.report import words
from sukashi.report.gallery import Picture, draw_gallery
from test_shortcut import PREPROCESS, N, trained

READING = {"test_images": 40}
NET = "sukashi:digits_cnn"


def asked_of(specs, **settings):
    return Audit(models=specs, data="digits", out="unused", **settings, **READING)


ALIKE = ("rank_correlation", "ssim", "top_overlap")


@pytest.fixture(scope="module")
def folders(trained_cnn, tmp_path_factory):
    """A network, the same again, and the same with noise on its weights, as saved folders."""
    root = tmp_path_factory.mktemp("audit")
    noisy = copy.deepcopy(trained_cnn)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.model.parameters():
        parameter.data += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    for name, loaded in (("dense", trained_cnn), ("same", trained_cnn), ("noisy", noisy)):
        saved.save(root / name, loaded, provenance={})
    return [str(root / name) for name in ("dense", "same", "noisy")]


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):
    """The audit of all three, and its folder."""
    out = tmp_path_factory.mktemp("done") / "audit"
    return sukashi.audit(folders, "digits", out=out, **READING), out


def table(path):
    return pq.read_table(path).to_pylist()


# Networks a user might bring, by import path.


class Wrapped(nn.Module):
    """A network for digits behind something that changes what it reads or answers."""

    def __init__(self, before=None, after=None, side=8, spec="sukashi:digits_cnn", shift=0.0, scale=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = models.load(spec).model
        self.before, self.after = before or (lambda x: x), after or (lambda z: z)
        self.preprocess = Preprocess(side, side, 1, (shift,), (scale,))

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def plain():
    return Wrapped()


def reversed_answers():
    return Wrapped(after=lambda z: -z)


def pair():
    return Wrapped(after=lambda z: (z, z))


def larger():
    return Wrapped(before=lambda x: nn.functional.avg_pool2d(x, 2), side=16)


def vit():
    return Wrapped(spec="sukashi:digits_vit")


def shaken_vit():
    model = vit()
    for number, parameter in enumerate(model.parameters()):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


def vit_of_another_size():
    return Wrapped(side=12, spec="sukashi:digits_vit")


def blind():
    """Sees nothing of images that are dark."""
    return Wrapped(before=lambda x: x * (x.mean((1, 2, 3), keepdim=True) > 0.3))


def averaging():
    """Sees the mean alone of images that are dark."""

    def before(x):
        mean = x.mean((1, 2, 3), keepdim=True)
        return torch.where(mean > 0.3, x, mean.expand_as(x))

    return Wrapped(before=before)


def of_other_preprocessing():
    """The plain network, for images of another mean and spread."""
    return Wrapped(before=lambda x: 0.5 * x + 0.25, shift=0.25, scale=0.5)


@functools.cache
def _shapes(spec):
    model = trained(spec)
    model.preprocess = PREPROCESS
    return model


def marked():
    return _shapes(f"shapes:watermark=1,n={N}")


def clean():
    return _shapes(f"shapes:n={N}")


def here(*names):
    return [f"test_audit:{name}" for name in names]


# What is measured.


def test_values_are_those_of_the_measures(done, folders, digits_split):
    """Of the noisy network, by the registered functions one after the other."""
    result, out = done
    dense, noisy = (models.load(folder) for folder in (folders[0], folders[2]))
    images = digits_split.test.limit(40).whole(noisy.preprocess)
    with torch.no_grad():
        right = [loaded.model(images.x).argmax(1) == images.target for loaded in (dense, noisy)]
    images = images[right[0] & right[1]]
    assert 10 < len(images) < 40, "some are wrong, so that the choice of images is seen"
    pixels = sites.input_site(images.x)
    found = {
        (row["attribution"], row["measure"], row["image_id"]): row["value"]
        for row in table(out / "values.parquet")
        if row["model"] == "noisy"
    }
    assert {image_id for _, _, image_id in found} == set(images.image_id)
    for name in ("saliency", "integrated_gradients"):
        maps, other = (
            saliency_map(attributions[name](loaded.model, images.x, images.target, [pixels])[pixels], "sum_abs")
            for loaded in (noisy, dense)
        )
        maps, other = (Maps(m, images.image_id) for m in (maps, other))
        given = {"model": noisy.model, "batch": images, "maps": maps, "reference_maps": other}
        given["generator"] = torch.Generator().manual_seed(0)
        expected = {}
        for measure in ("gini", "road", "aopc", *ALIKE):
            expected |= measured([measure], given)
        assert {measure for attribution, measure, _ in found if attribution == name} == set(expected)
        for measure, measurement in expected.items():
            kept = [found[name, measure, image_id] for image_id in images.image_id]
            np.testing.assert_allclose(kept, measurement.values.double().numpy(), rtol=0, atol=1e-5)
    assert result.models[2]["n_images"] == len(images)
    assert result.models[2]["accuracy"] == pytest.approx(float(right[1].float().mean()))


def test_curves_are_kept_and_give_the_area_over_them(done):
    _, out = done
    curves, aopc = {}, {}
    for row in table(out / "curves.parquet"):
        curves.setdefault((row["model"], row["attribution"], row["order"], row["image_id"]), []).append(row)
    for row in table(out / "values.parquet"):
        if row["measure"] == "aopc/probability":
            aopc[row["model"], row["attribution"], "morf", row["image_id"]] = row["value"]
    assert {key[2] for key in curves} == {"morf", "lerf"}
    for key, value in aopc.items():
        rows = curves[key]
        assert [row["percentage"] for row in rows] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
        assert value == pytest.approx(np.mean([rows[0]["probability"] - row["probability"] for row in rows[1:]]))


def test_road_and_aopc_take_options_and_the_curves_are_those_of_aopc(folders, tmp_path):
    options = {"road": {"noise": 0.5, "percentages": [20, 50]}, "aopc": {"noise": 0.25, "form": "lottery"}}
    asked = {"attributions": ["saliency"], "measures": ["road", "aopc"], "options": options, **READING}
    sukashi.audit(folders[1:], "digits", out=tmp_path / "out", **asked)
    (_, noisy) = networks.opened(asked_of(folders[1:]))
    images = noisy.batch[torch.from_numpy(noisy.rows)]
    maps = Maps(cells.maps_of(noisy, images, "saliency", {}), images.image_id)
    generator = torch.Generator().manual_seed(0)
    given = {"model": noisy.loaded.model, "batch": images, "maps": maps, "generator": generator}
    rows = [row for row in table(tmp_path / "out" / "values.parquet") if row["model"] == "noisy"]
    for measure, expected in measured(["road", "aopc"], given, options).items():
        kept = {row["image_id"]: row["value"] for row in rows if row["measure"] == measure}
        assert list(kept) == list(expected.ids)
        np.testing.assert_allclose(list(kept.values()), expected.values, rtol=0, atol=1e-5)
    for order, percentages in ORDERS.items():
        curve = removal(given["model"], images, maps, generator, order=order, percentages=percentages, noise=0.25)
        kept = [row for row in table(tmp_path / "out" / "curves.parquet") if row["order"] == order]
        kept = [row["probability"] for row in kept if row["model"] == "noisy"]
        np.testing.assert_allclose(kept, curve.probability.flatten(), rtol=0, atol=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    for name, value in {
        "saliency.measures": "aopc, road",
        "measures.aopc.form": "lottery",
        "measures.road.noise": "0.5",
        "saliency.attributions.saliency.channels": "sum_abs",
    }.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in page


def test_similarities_of_the_reference_are_those_to_its_maps_when_rounded_otherwise(folders, tmp_path, monkeypatch):
    plain_maps, calls = cells.maps_of, []

    def shaken(model, seed):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data += 0.1 * parameter.std()  # as no rounding would, so that it is seen
        return other

    def counted(network, batch, *args):
        calls.append((network.label, len(batch)))
        return plain_maps(network, batch, *args)

    monkeypatch.setattr(perturbed, "rounded", shaken)
    monkeypatch.setattr(cells, "maps_of", counted)
    asked = {"attributions": ["saliency"], "measures": ["gini", *ALIKE], **READING}
    result = sukashi.audit(folders[:2], "digits", out=tmp_path / "out", **asked)
    (dense, same) = networks.opened(asked_of(folders[:2]))
    images = dense.batch[torch.from_numpy(dense.rows)]
    loaded = dataclasses.replace(dense.loaded, model=shaken(dense.loaded.model, 0))
    moved = dataclasses.replace(dense, setting=dataclasses.replace(dense.setting, loaded=loaded))
    maps, other = (plain_maps(network, images, "saliency", {}) for network in (dense, moved))
    kept = table(tmp_path / "out" / "values.parquet")
    rows = {(row["model"], row["measure"]): row for row in result.saliency["similarities"]}
    for measure in ALIKE:
        expected = measures[measure](*(Maps(m, images.image_id) for m in (maps, other))).values.numpy()
        values = [row["value"] for row in kept if row["model"] == "dense" and row["measure"] == measure]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
        assert expected.mean() < 0.999
        assert rows["dense", measure]["mean"] == pytest.approx(expected.mean(), abs=1e-5)
        assert rows["same", measure]["mean"] == pytest.approx(1)
    # Once for all measures of the reference and for its comparison with others, and once rounded.
    assert [n for label, n in calls if label == "dense" and n > 8] == [len(dense.rows)] * 2
    assert [n for label, n in calls if label == "same" and n > 8] == [len(same.rows)]


def test_rounding_moves_each_weight_by_its_precision_and_what_is_cut_stays_cut(folders):
    (dense, _) = networks.opened(asked_of(folders[:2]))
    weight = next(dense.loaded.model.parameters())
    weight.data.view(-1)[::3] = 0
    before = copy.deepcopy(dense.loaded.model.state_dict())
    found, again, other = (perturbed.rounded(dense.loaded.model, seed) for seed in (0, 0, 1))
    signs = []
    for name, parameter in found.named_parameters():
        old, new = before[name].double(), parameter.double()
        assert torch.equal(new[old == 0], old[old == 0])
        moved = (new / old - 1)[old != 0] / 2**-23
        assert ((moved.abs() > 0.4) & (moved.abs() < 1.6)).all()  # by one, rounded to what float32 has
        signs.append(moved.sign())
    assert 0.4 < (torch.cat(signs) > 0).double().mean() < 0.6
    for name, value in dense.loaded.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(next(found.parameters()), next(again.parameters()))
    assert not torch.equal(next(found.parameters()), next(other.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blind", "averaging"])
def test_a_map_that_says_nothing_is_counted_and_left_out(tmp_path, name):
    result = sukashi.audit(
        here("plain", name), "digits", out=tmp_path / "out", population="all", attributions=["saliency"], **READING
    )
    rows = [row for row in table(tmp_path / "out" / "values.parquet") if row["model"] == name]
    gini = [row["value"] for row in rows if row["measure"] == "gini"]
    n_silent = int(np.isnan(gini).sum())
    assert 3 < n_silent < 37
    assert all(np.isnan(row["value"]) for row in rows if row["image_id"] in _silent(rows))
    assert [model["silent"] for model in result.saliency["models"]] == [{"saliency": 0}, {"saliency": n_silent}]
    assert {row["n"] for row in result.saliency["comparisons"]} == {40 - n_silent}
    assert f"{n_silent} of 40 saliency maps of {name} are constant" in (tmp_path / "out" / "report.html").read_text()


def _silent(rows):
    return {row["image_id"] for row in rows if row["measure"] == "gini" and np.isnan(row["value"])}


def test_each_network_sees_images_by_its_own_preprocessing(tmp_path):
    result = sukashi.audit(
        here("plain", "of_other_preprocessing"),
        "digits",
        out=tmp_path / "out",
        population="all",
        attributions=["saliency"],
        measures=["gini", "rank_correlation"],
        **READING,
    )
    (row,) = result.saliency["comparisons"]
    assert row["difference"] == pytest.approx(0, abs=1e-6)
    assert all(row["mean"] == pytest.approx(1, abs=1e-3) for row in result.saliency["similarities"])


@pytest.mark.parametrize("population", ["both", "reference", "all"])
def test_images_are_those_of_the_population(folders, tmp_path, population):
    asked = {"attributions": ["saliency"], "measures": ["gini"], "population": population, **READING}
    specs = [folders[2], *here("plain")]
    result = sukashi.audit(specs, "digits", out=tmp_path / "out", **asked)
    noisy, plain = networks.opened(asked_of(specs, population="all"))
    right = [network.answers.right for network in (noisy, plain)]
    assert 0 < (right[0] & right[1]).sum() < right[0].sum() < 40
    rows = {"both": right[0] & right[1], "reference": right[0], "all": np.ones(40, bool)}[population]
    seen = [row["image_id"] for row in table(tmp_path / "out" / "values.parquet") if row["model"] == plain.label]
    assert seen == [noisy.batch.image_id[row] for row in np.flatnonzero(rows)]
    assert [row["n"] for row in result.saliency["comparisons"]] == [len(seen)]


# What is said.


def test_figures_are_made_of_the_kept_values_and_nothing_else(done):
    """Means, bootstrap, t test and Holm's correction, written out."""
    result, out = done
    kept = {}
    for row in table(out / "values.parquet"):
        kept.setdefault((row["model"], row["attribution"], row["measure"]), {})[row["image_id"]] = row["value"]
    p_values = []
    for row in result.saliency["comparisons"]:
        model = kept[row["model"], row["attribution"], row["measure"]]
        reference = kept["dense", row["attribution"], row["measure"]]
        pairs = [(value, reference[image_id]) for image_id, value in model.items()]
        differences = np.array([a - b for a, b in pairs])
        draws = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
        bounds = np.quantile(differences[draws].mean(1), [0.025, 0.975])
        p_values.append(scipy.stats.ttest_rel(*zip(*pairs, strict=True)).pvalue if differences.any() else 1.0)
        found = [row[key] for key in ("n", "reference", "mean", "difference", "low", "high", "p")]
        expected = [len(pairs), np.mean([b for _, b in pairs]), np.mean([a for a, _ in pairs]), differences.mean()]
        np.testing.assert_allclose(found, [*expected, *bounds, p_values[-1]], rtol=1e-9, atol=1e-12)
        spread = np.std([b for _, b in pairs], ddof=1)
        assert row["size"] == pytest.approx(differences.mean() / spread)
    rows = result.saliency["comparisons"]
    told = [i for i, row in enumerate(rows) if not row["measure"].endswith("/probability")]
    assert result.saliency["n_tested"] == len(told) < len(rows)
    for family in (told, sorted(set(range(len(rows))) - set(told))):  # what moves with confidence by itself
        worst = 0.0
        for place, i in enumerate(sorted(family, key=lambda i: p_values[i])):
            worst = max(worst, min(1.0, (len(family) - place) * p_values[i]))
            assert rows[i]["p_holm"] == pytest.approx(worst)
            assert rows[i]["changed"] == (worst < 0.05)
    for row in result.saliency["own"]:
        values = kept["dense", row["attribution"], row["measure"]]
        assert (row["n"], row["mean"]) == (len(values), pytest.approx(np.mean(list(values.values()))))
        assert row["low"] < row["mean"] < row["high"]
    for row in result.saliency["similarities"]:
        values = list(kept[row["model"], row["attribution"], row["measure"]].values())
        assert (row["n"], row["mean"]) == (len(values), pytest.approx(np.mean(values)))
    told = result.to_json()
    of_call = {name: told.pop(name) for name in AuditResult.of_call}
    assert of_call == {"out": str(out), "report": str(out / "report.html"), "finished": False}
    assert json.loads((out / "results.json").read_bytes()) == told
    rows = result.table()
    assert rows == table(out / "results.parquet")
    alike = [row for row in result.saliency["similarities"] if not row["itself"]]
    itself = {
        (row["attribution"], row["measure"]): row["mean"] for row in result.saliency["similarities"] if row["itself"]
    }
    assert {row["measure"] for row in rows} >= {row["measure"] for row in alike} != set()
    for row in rows[len(result.saliency["comparisons"]) :]:
        assert (row["difference"], row["p"]) == (None, None)
        assert row["reference"] == itself[row["attribution"], row["measure"]]
    for row, of in zip(rows, [*result.saliency["comparisons"], *alike], strict=True):
        assert row["subject"] == "saliency"
        assert {name: row[name] for name in of if name in row} == {name: of[name] for name in of if name in row}
        assert {"model", "attribution", "measure", "n", "difference", "p_holm", "said"} <= set(row)


def test_the_command_prints_a_row_for_each_comparison_that_is_told_then_what_is_said(done):
    result, out = done
    rows, said = result.text().split("\n\n", 1)
    told = [row for row in result.saliency["comparisons"] if "/" not in row["measure"]]
    for row, line in zip(told, rows.splitlines()[-len(told) :], strict=True):
        so = f"{row['said']}, {row['weight']}" if row["changed"] else row["said"]
        values = [f"{row['reference']:.3f}", f"{row['mean']:.3f}", *so.split()]
        assert line.split() == [row["model"], row["attribution"], row["measure"], *values]
    assert said.splitlines()[: 1 + len(result.lines)] == [result.verdict, *result.lines]
    assert str(out / "report.html") in said
    assert repr(result) == result.text()


def test_what_was_found_is_read_from_the_folder_again(done, monkeypatch):
    result, out = done
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    monkeypatch.setattr("sukashi.experiments.audit.run.prepare", None)
    assert sukashi.results(out) == result
    assert (out / "report.html").read_bytes() == page


def test_the_same_network_is_not_found_changed_and_a_harmed_one_is(done):
    result, out = done
    for row in result.saliency["comparisons"]:
        if row["model"] == "same":
            said = f"no detectable change in {row['n']} images [.000, .000]"
            assert (row["difference"], row["p_holm"], row["said"]) == (0, 1, said)
    assert all(row["mean"] == pytest.approx(1) for row in result.saliency["similarities"] if row["model"] == "same")
    alike = [row["mean"] for row in result.saliency["similarities"] if row["model"] == "noisy"]
    assert max(alike) < 0.97
    assert {row["model"] for row in result.saliency["similarities"]} == {"dense", "same", "noisy"}
    assert all(row["mean"] > 0.999 for row in result.saliency["similarities"] if row["model"] == "dense"), (
        "rounding is little"
    )
    least = {row["attribution"]: row for row in result.saliency["similarities"] if row["model"] == "noisy"}
    for name in least:
        (line,) = (line for line in result.lines if line.startswith(f"{name}: rank_correlation with the map of dense"))
        assert line.endswith(" for noisy, the lowest of 2; rounding alone leaves 1.000 [1.000, 1.000].")
    changed = [row for row in result.saliency["comparisons"] if row["model"] == "noisy" and row["changed"]]
    assert changed
    rows = [row for row in result.saliency["similarities"] if row["measure"] == "top_overlap"]
    least = min((row for row in rows if row["model"] == "noisy"), key=lambda row: row["mean"])
    assert result.verdict.startswith(
        f"Of the most relevant tenth of the pixels {least['mean']:.0%} [{100 * least['low']:.0f}, "
        f"{100 * least['high']:.0f}] are the same in noisy as in dense (by {least['attribution']}, the least of 2 "
        "models and 2 attributions). Rounding alone leaves 100%. "
    )
    assert "ROAD" in result.verdict
    assert "aopc" not in result.verdict.lower(), "it moves with how soon a network breaks"
    assert {row["model"] for row in result.saliency["moved"]} == {"noisy"}
    page = html.unescape((out / "report.html").read_text())
    assert result.verdict in page
    for figure in ("changes", "morf", "gallery-saliency", "gallery-integrated_gradients"):
        assert (out / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_a_change_is_said_in_the_sense_of_its_measure():
    said = verdict.said
    row = {"changed": True, "difference": 0.021, "low": 0.018, "high": 0.024, "n": 20, "better": "higher"}
    assert said({**row, "measure": "gini"}) == "sparser by .021 [.018, .024]"
    assert said({**row, "measure": "peak", "better": None}) == "higher in peak by .021 [.018, .024]"
    assert said({**row, "measure": "peak", "better": "lower"}) == "worse by peak by .021 [.018, .024]"
    assert said({**row, "measure": "deletion", "better": "lower"}) == "slower to take probability by .021 [.018, .024]"
    assert said({**row, "measure": "road/probability"}) == (
        "more faithful in probability by .021 [.018, .024], which moves with confidence"
    )
    assert said({**row, "measure": "gini", "n": 19}) == "too few images to say (19)"
    down = {**row, "difference": -1.021, "low": -1.5, "high": 0.018}
    assert said({**down, "measure": "localisation/mark"}) == "less on the mark by 1.021 [-.018, 1.500]"
    unsure = {**row, "changed": False, "low": 0.01, "high": 0.2, "measure": "gini"}
    assert said(unsure) == "no detectable change once corrected in 20 images [.010, .200]"
    low = said({**unsure, "low": -10.02, "high": -0.0001})
    assert low == "no detectable change once corrected in 20 images [-10.020, .000]"


def untagged(folder):
    """The words of a page, as they are read."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", (folder / "report.html").read_text())).split())


def test_without_means_to_compare_nothing_is_said_to_be_the_same(folders, tmp_path):
    asked = {"attributions": ["saliency"], "measures": ["ssim"], **READING}
    result = sukashi.audit(folders[::2], "digits", out=tmp_path / "out", **asked)
    assert result.saliency["comparisons"] == []
    assert result.verdict.startswith("Maps of noisy have a ssim of .")
    assert result.verdict.endswith(" with those of dense (by saliency). Rounding alone leaves 1.000.")
    line, unjudged = result.lines
    assert line.startswith("saliency: ssim with the map of dense is .")
    assert unjudged == verdict.UNJUDGED
    page = untagged(tmp_path / "out")
    assert line in page
    assert "rounded otherwise" in page


def test_averages_that_do_not_differ_are_all_that_no_change_speaks_of(folders, tmp_path):
    asked = {"attributions": ["saliency"], "measures": ["gini", "aopc"], **READING}
    result = sukashi.audit(folders[:2], "digits", out=tmp_path / "out", **asked)
    n_images = result.models[1]["n_images"]
    assert result.verdict == (
        f"Gini is not shown to change in the {n_images} test images that the reference and the model get right, which "
        "does not show that it is the same."
    )
    assert result.saliency["measures"] == ["gini", "aopc"]
    assert {row["measure"] for row in result.saliency["comparisons"]} == {"gini", "aopc", "aopc/probability"}


def test_beside_values_without_spread_a_change_is_large_and_comes_first():
    lines = verdict.lines
    row = {"attribution": "lrp", "measure": "gini", "changed": True, "said": "sparser by .1 [.1, .2]", "n": 20}
    rows = [
        {**row, "model": "a", "size": 3.0, "weight": "large"},
        {**row, "model": "b", "size": None, "weight": "large"},
    ]
    assert lines(rows, ["lrp"], 2) == [
        "lrp: sparser in 2 of 2 models, in SD most in b, by .1 [.1, .2] (gini, large: beside values all the same)."
    ]
    assert lines(rows[:1], ["lrp"], 1) == ["lrp: sparser by .1 [.1, .2] (gini, large: 3.00 SD)."]
    rows[1] |= {"said": "less sparse by .2 [.1, .3]", "size": -0.25, "weight": "small"}
    assert lines(rows, ["lrp"], 3) == [
        "lrp: sparser in 1 of 3 models, a, by .1 [.1, .2] (gini, large: 3.00 SD), "
        "but less sparse in 1 of 3 models, b, by .2 [.1, .3] (gini, small: .25 SD)."
    ]
    same = [row | {"changed": False, "said": "no detectable change in 20 images [.0, .1]"} for row in rows]
    same[1]["n"] = 31
    assert lines(same, ["lrp", "saliency"], 2) == ["lrp: no detectable change on average in 20 to 31 images."]
    assert [words.weight(size) for size in (None, 0.1, -0.3, 0.6, -0.9)] == [
        *("large", "slight", "small", "moderate", "large")
    ]


@pytest.mark.slow
def test_a_network_that_guesses_is_counted_and_left_out_of_what_is_said(trained_cnn, folders, tmp_path):
    blind = copy.deepcopy(trained_cnn)
    *_, last = blind.model.parameters()  # the biases of its answers
    last.data[3] += 100
    saved.save(tmp_path / "blind", blind, provenance={"trained": True})
    asked = {"attributions": ["saliency"], "measures": ["gini", "ssim"], "population": "all", **READING}
    result = sukashi.audit([folders[0], str(tmp_path / "blind")], "digits", out=tmp_path / "alone", **asked)
    assert result.verdict.endswith("blind is not shown to get more right than one answer for all.")
    assert [model["guesses"] for model in result.models] == [False, True]
    result = sukashi.audit([str(tmp_path / "blind"), folders[0]], "digits", out=tmp_path / "turned", **asked)
    assert "blind, the reference, is not shown to get more right than one answer for all. " in result.verdict
    result = sukashi.audit([folders[0], str(tmp_path / "blind")], "digits", out=tmp_path / "alone", **asked)
    assert (result.lines, result.saliency["moved"]) == ([verdict.UNJUDGED], [])
    (note,) = (note for note in result.warnings if note.startswith("trained after the cut: "))
    assert "blind; intervals are for new images" in note
    specs = [folders[0], str(tmp_path / "blind"), folders[2], folders[1]]
    result = sukashi.audit(specs, "digits", out=tmp_path / "out", **asked)
    first = "blind is not shown to get more right than one answer for all. Maps of "
    assert result.models[1]["label"].endswith("blind")
    assert first in result.verdict
    assert not any("blind" in line for line in result.lines)
    (blind,) = (row for row in result.saliency["comparisons"] if row["model"].endswith("blind"))
    assert blind["p_holm"] == blind["p"], "it makes no other comparison stricter"
    last_names = [
        {row["model"].rpartition("/")[2] for row in result.saliency[rows]} for rows in ("moved", "comparisons")
    ]
    assert last_names == [{"noisy"}, {"blind", "noisy", "same"}]
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert "blind: not shown to get more of the 40 test images right than one answer for all" in page


def test_a_verdict_rests_on_what_the_first_table_shows_and_on_enough_images(folders, tmp_path, monkeypatch):
    """Probabilities halved change those measures alone, and 19 images change nothing that is said."""
    plain = cells.measured

    def surer(names, inputs, options):
        weight = next(inputs.get("model", {}).parameters()).detach()
        change = 0.5 * float(weight.double().sum() != total)
        return {
            name: dataclasses.replace(found, values=found.values + change * name.endswith("/probability"))
            for name, found in plain(names, inputs, options).items()
        }

    total = float(next(models.load(folders[0]).model.parameters()).detach().double().sum())
    monkeypatch.setattr(cells, "measured", surer)
    specs = [*folders[:2], folders[2]]
    asked = {"attributions": ["saliency"], "measures": ["road", "aopc"], "population": "all"}
    result = sukashi.audit(specs, "digits", out=tmp_path / "out", test_images=40, **asked)
    by_measure = {row["measure"]: row for row in result.saliency["comparisons"] if row["model"] == "noisy"}
    assert by_measure["aopc/probability"]["changed"]
    assert by_measure["aopc/probability"]["said"].endswith(", which moves with confidence")
    assert "probability" not in result.verdict
    (line,) = (line for line in result.lines if "probability" in line)
    assert line.startswith("What moved most is aopc in probability: by saliency .")
    assert "this tells of confidence as much as of maps" in line
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    table, rest = page.partition('data-name="measures"')[2].split("</table>", 1)
    assert re.findall(r'<th scope="col">([^<]*)</th>', table)[-2:] == ["road", "aopc"]
    assert "aopc/probability" not in table
    assert "road/probability and aopc/probability: of the target's probability" in rest
    for row in (by_measure["road"], by_measure["aopc"]):
        assert f"{row['reference']:.3f} → {row['mean']:.3f}<small" in re.sub(r"</?strong>|\n", "", table)
    few = sukashi.audit(specs, "digits", out=tmp_path / "few", test_images=19, **asked)
    assert not any(row["changed"] for row in few.saliency["comparisons"])
    assert few.verdict == "same and noisy have too few images to say anything (19)."
    assert few.lines == [verdict.UNJUDGED]
    assert [model["few"] for model in few.models] == [True] * 3
    shown = html.unescape((tmp_path / "few" / "report.html").read_text())
    assert "same (19), noisy (19): too few images to say anything, below 20" in shown
    assert "no detectable change" not in shown.replace("That no change is detectable", "")


def test_models_stand_by_ratio_where_a_series_has_two_and_each_in_its_place_otherwise():
    def found(*levels):
        others = [{"label": str(i), "series": name, "ratio": ratio} for i, (name, ratio) in enumerate(levels)]
        groups = page.series({"models": [{"label": "dense"}, *others]})
        return {name: [model["label"] for model in models] for name, models in groups.items()}

    assert found(("a", 0.6), ("b", 0.3), ("a", 0.3)) == {"a": ["2", "0"], "b": ["1"]}
    assert found(("a", 0.5), ("b", 0.5), ("a", 0.5)) == {"": ["0", "1", "2"]}
    assert found(("a", 0.5), ("b", 0.3)) == {"": ["0", "1"]}
    assert found(("a", 0.5), ("a", 0.3), (None, None)) == {"": ["0", "1", "2"]}


def test_each_model_without_a_ratio_has_its_name_below_its_place(monkeypatch):
    drawn = []
    monkeypatch.setattr(page.figures, "drawn", drawn.append)
    labels = ["dense", "one", "two", "three"]
    result = {
        "reference": "dense",
        "attributions": ["lrp"],
        "models": [{"label": label, "series": "cut", "ratio": 0.5, "guesses": label == "three"} for label in labels],
        "comparisons": [
            {"model": label, "attribution": "lrp", "measure": measure, "difference": 0.1, "low": 0.0, "high": 0.2}
            for label in labels[1:]
            for measure in ("gini", "road")
        ],
    }
    page.draw_changes(result, ["gini", "road"])
    (top, bottom) = drawn[0].axes
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == labels[1:]
    assert [tick.get_text() for tick in top.get_xticklabels()] == [""] * 3
    assert [line.get_xdata()[0] for line in bottom.lines if line.get_marker() == "o"] == [0, 2], "hollow where guessed"
    assert not bottom.texts
    for model, ratio in zip(result["models"][1:], (0.025, 0.05, 0.5), strict=True):
        model["ratio"] = ratio
    page.draw_changes(result, ["gini", "road"])
    form = drawn[1].axes[0].xaxis.get_major_formatter()
    assert [form(x) for x in (0.025, 0.35)] == ["2.5%", "35%"]


def test_a_map_of_one_pixel_is_drawn_in_its_colour():
    spot = np.zeros((20, 20))
    spot[3, 4] = 2.0
    about = {"pixels": np.zeros((20, 20, 3)), "title": "x", "wrong": (), "marked": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bright, dark = (draw_gallery([Picture(maps={"a": m}, **about)], False) for m in (spot, 0 * spot))
    assert bright != dark


@pytest.mark.slow
def test_a_network_with_a_shortcut_is_said_to_point_at_it(tmp_path):
    spec = f"shapes:watermark=1,n={2 * N}"  # so that FEW images at least have the mark
    result = sukashi.audit(
        here("clean", "marked"),
        spec,
        out=tmp_path / "out",
        attributions=["lrp"],
        measures=["localisation", "gini"],
    )
    (row,) = (row for row in result.saliency["comparisons"] if row["measure"] == "localisation/watermark")
    assert row["said"].startswith("more on the watermark by ")
    assert row["low"] > 0.1
    at_mark = {row["model"]: row for row in result.saliency["pointing"] if row["concept"] == "watermark"}
    assert at_mark["marked"]["mean"] > 8 * at_mark["marked"]["area"]
    assert at_mark["clean"]["mean"] == pytest.approx(row["reference"])
    kept = [row for row in table(tmp_path / "out" / "values.parquet") if not np.isnan(row["value"])]
    for row in result.saliency["pointing"]:
        about = row["model"], f"localisation/{row['concept']}"
        ids = [each["image_id"] for each in kept if (each["model"], each["measure"]) == about]
        truth = data.load(spec).ground_truth(ids, PREPROCESS)[row["concept"]]
        assert row["n"] == len(ids)
        assert row["area"] == pytest.approx(float(truth.double().mean()))
    (line,) = (line for line in result.lines if " points at " in line)
    assert line.startswith("marked points at the watermark: there lies ")
    assert "marked points at the watermark: " in untagged(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<th scope="col">on watermark</th>' in page


# Names and levels.


def test_folders_are_named_by_what_tells_them_apart(tmp_path):
    made = [tmp_path / "run" / name for name in ("dense/0", "magnitude/0/0.50", "random/0/0.50")]
    for folder in made:
        folder.mkdir(parents=True)
    assert networks.labels(list(map(str, made))) == ["dense", "magnitude/0.50", "random/0.50"]
    of_one = [tmp_path / "cut" / ratio for ratio in ("0.1", "0.5")]
    for folder in of_one:
        folder.mkdir(parents=True)
    names = networks.labels(["sukashi:digits_cnn", *map(str, of_one), "sukashi:digits_cnn", str(of_one[0])])
    assert names == ["digits_cnn", "cut/0.1", "cut/0.5", "digits_cnn (2)", "cut/0.1 (2)"]


def test_a_saved_model_says_by_what_and_how_far_it_was_pruned(trained_cnn, tmp_path):
    told = {"cut": {"criterion": "drift", "ratio_asked": 0.5, "seed": 0}, "again": {"seed": 1}}
    told["level"] = {"contender": "magnitude/unenforced", "ratio_asked": 0.3, "seed": 2, "trained": True}
    told["mended"] = {**told["cut"], "repair": "refit"}
    for name, provenance in told.items():
        saved.save(tmp_path / name, trained_cnn, provenance=provenance)
    found = {name: networks._level(str(tmp_path / name)) for name in told}
    names = ("series", "ratio", "repair", "trained")
    assert {name: tuple(of[what] for what in names) for name, of in found.items()} == {
        "cut": ("drift", 0.5, None, False),
        "again": (None, None, None, False),
        "level": ("magnitude/unenforced, seed 2", 0.3, None, True),
        "mended": ("drift", 0.5, "refit", False),
    }
    label = {"label": "m", **found["mended"]}
    assert audit_page._made(label) == "m: drift at ratio 0.5, mended by refit."
    assert audit_page._made({"label": "m", **found["again"]}) == ""


# Kept.


def contents(folder):
    """All files but what tells when and how fast; the folder's name, which the page's command has, left out."""
    logs, own = {".lock", "log.jsonl"}, str(folder).encode()
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in logs)
    return {p.relative_to(folder): p.read_bytes().replace(own, b"OUT") for p in found}


@pytest.mark.slow
def test_a_killed_audit_goes_on_from_its_trials_to_the_same_bytes(done, folders, tmp_path, monkeypatch):
    whole, there = done
    out, plain_cell, calls = tmp_path / "audit", cells.Auditor._cell, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain_cell(*args)

    def torn(auditor, name, desk):
        desk.save("gallery", {"maps": np.zeros(3)})
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.Auditor, "_cell", failing)
    with pytest.raises(KeyboardInterrupt):
        sukashi.audit(folders, "digits", out=out, **READING)
    assert not (out / "values.parquet").exists()
    with pytest.raises(UsageError, match=r"3 of 9 trials finished: give the same `sukashi.audit` again"):
        sukashi.results(out)
    # The third cell compares maps with the reference's, which must come again as they were.
    with monkeypatch.context() as patched:
        patched.setattr(cells.Auditor, "_gallery", torn)
        with pytest.raises(KeyboardInterrupt):
            sukashi.audit(folders, "digits", out=out, **READING)
    assert len(calls) == 3 + 1
    result = sukashi.audit(folders, "digits", out=out, **READING)
    assert len(calls) == 3 + 4
    assert contents(there) == contents(out)
    for work in ("_cell", "_gallery"):
        monkeypatch.setattr(cells.Auditor, work, lambda *args: pytest.fail("what is finished is done again"))
    again = sukashi.audit(folders, "digits", out=out, **READING)
    assert (result.finished, again.finished) == (False, True)
    of_call = {"out": whole.out, "report": whole.report, "finished": False}
    assert result.model_copy(update=of_call) == again.model_copy(update=of_call) == whole


def test_the_same_network_twice_is_measured_once_and_stands_twice(folders, tmp_path, monkeypatch):
    plain_cell, calls = cells.Auditor._cell, []
    monkeypatch.setattr(cells.Auditor, "_cell", lambda *args: calls.append(args[1].label) or plain_cell(*args))
    specs = [folders[0], folders[2], folders[2]]
    asked = {"attributions": ["saliency"], "measures": ["gini", "ssim"], **READING}
    result = sukashi.audit(specs, "digits", out=tmp_path / "out", **asked)
    assert calls == ["dense", "noisy"]
    one, two = result.saliency["comparisons"]
    assert (one.pop("model"), two.pop("model")) == ("noisy", "noisy (2)")
    assert one == two


@pytest.mark.slow
def test_an_audit_grows_by_models_and_refuses_another_question(done, folders, tmp_path, monkeypatch):
    out, plain_cell, calls = tmp_path / "audit", cells.Auditor._cell, []
    sukashi.audit(folders[:2], "digits", out=out, attributions=["saliency"], **READING)
    monkeypatch.setattr(cells.Auditor, "_cell", lambda *args: calls.append(args[1].label) or plain_cell(*args))
    found = sukashi.audit(folders, "digits", out=out, attributions=["saliency"], **READING)
    assert calls == ["noisy"]
    of_saliency = [row for row in done[0].saliency["similarities"] if row["attribution"] == "saliency"]
    assert found.saliency["similarities"] == of_saliency
    for changes, message in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"population": "all"}, 'population was "both"'),
        ({"test_images": 30}, "data.test_images was 40, now 30"),
    ):
        with pytest.raises(UsageError, match=message):
            sukashi.audit(folders, "digits", out=out, attributions=["saliency"], **{**READING, **changes})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of mine")
    with pytest.raises(
        UsageError, match=r"mine is not empty \(notes.txt\) and holds no experiment: choose another `out`"
    ):
        sukashi.audit(folders, "digits", out=tmp_path / "mine", attributions=["saliency"], **READING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": (0, 2)}, r'models\.\w{12} was "sukashi:digits_cnn", now not given'),
        ({"attributions": ["lrp"]}, r"attributions\.integrated_gradients was {}, now not given"),
        (
            {"options": {"integrated_gradients": {"steps": 1}}},
            r"integrated_gradients\.steps was not given, now 1",
        ),
    ],
)
def test_no_model_and_no_attribution_of_an_audit_is_lost_or_replaced(folders, tmp_path, changes, words):
    def audit(models, attributions=("integrated_gradients",), **more):
        asked = {"attributions": list(attributions), "measures": ["gini"], "test_images": 10, **more}
        return sukashi.audit([folders[i] for i in models], "digits", out=tmp_path / "out", **asked)

    audit((0, 1))
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=f"{words}.*choose another `out` or remove the folder"):
        audit(**{"models": (0, 1), **changes})
    assert contents(tmp_path / "out") == before
    grown = audit((0, 2, 1), ["lrp", "integrated_gradients"])
    assert [one["label"] for one in grown.models] == ["dense", "noisy", "same"]
    assert grown.saliency["attributions"] == ["lrp", "integrated_gradients"]
    with pytest.raises(UsageError, match="choose another `out`"):
        audit((0, 1))


def test_an_audit_grows_by_a_pruned_model_though_the_names_of_the_others_change(trained_cnn, folders, tmp_path):
    asked = {"attributions": ["saliency"], "measures": ["gini"], "test_images": 10, "out": tmp_path / "out"}
    told = {"criterion": "drift", "ratio_asked": 0.5}
    saved.save(tmp_path / "half", trained_cnn, provenance=told)
    sukashi.audit([folders[0], str(tmp_path / "half")], "digits", **asked)
    shutil.copytree(tmp_path / "half", tmp_path / "deep" / "half")
    specs = [folders[0], str(tmp_path / "deep" / "half"), folders[2]]
    assert len(sukashi.audit(specs, "digits", **asked).models) == 3
    with pytest.raises(UsageError, match=r'models\.drift, 0\.5, \w{12} was "sukashi:digits_cnn", now not given'):
        sukashi.audit(folders[::2], "digits", **asked)


# Families, and what is refused.


@pytest.mark.slow
def test_a_transformer_is_audited_by_its_own_means(tmp_path):
    result = sukashi.audit(
        here("vit", "shaken_vit"),
        "digits",
        out=tmp_path / "out",
        population="all",
        test_images=12,
        options={"deletion": {"step": 16}},
    )
    assert result.saliency["attributions"] == ["saliency", "integrated_gradients", "chefer"]
    assert {row["measure"] for row in result.saliency["comparisons"]} >= {"insertion", "deletion", "gini"}
    assert Workspace(tmp_path / "out").identity["measures"]["deletion"] == {"step": 16}


def test_an_attribution_that_refuses_a_model_is_left_out_with_its_reason(folders, tmp_path):
    asked = {"attributions": ["saliency", "chefer"], "measures": ["gini"], **READING}
    result = sukashi.audit(folders[:2], "digits", out=tmp_path / "out", **asked)
    assert list(result.saliency["refused"]) == ["chefer"]
    assert result.saliency["refused"]["chefer"].startswith("dense: chefer ")
    assert {row["attribution"] for row in result.saliency["comparisons"]} == {"saliency"}
    with pytest.raises(ModelError, match="chefer refuses dense: chefer "):
        sukashi.audit(folders[:2], "digits", out=tmp_path / "none", **{**asked, "attributions": ["chefer"]})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (["plain"], {}, UsageError, "needs a reference and a model to hold against it, got 1"),
        (["plain", "plain"], {"measures": "gini,road"}, UsageError, "unknown measure 'gini,road': did you mean 'road'"),
        (["plain", "plain"], {"subjects": "salience"}, UsageError, "did you mean 'saliency'"),
        (["plain", "plain"], {"test_image": 3}, UsageError, "unknown setting 'test_image': did you mean 'test_images'"),
        (["plain", "plain"], {"attribution": []}, UsageError, "did you mean 'attributions'"),
        (["plain", "plain"], {"calibration": 3}, UsageError, "unknown setting 'calibration'"),
        (["plain", "plain"], {"subjects": ["salience"]}, UsageError, "did you mean 'saliency'"),
        (["plain", "plain"], {"attributions": ["salency"]}, UsageError, "did you mean 'saliency'"),
        (["plain", "plain"], {"attributions": []}, UsageError, "attributions must be different names, at least one"),
        (["plain", "plain"], {"measures": ["gni"]}, UsageError, "did you mean 'gini'"),
        (
            ["plain", "plain"],
            {"measures": ["accuracy"]},
            UsageError,
            "accuracy measures no saliency maps and no regions",
        ),
        (["plain", "plain"], {"measures": ["localisation"]}, UsageError, "digits has no masks that say where"),
        (["plain", "plain"], {"masks": ["nowhere"]}, UsageError, "`masks='nowhere'` is no folder: give one that holds"),
        (["plain", "plain"], {"masks": ["."], "measures": ["gini"]}, UsageError, "none of gini reads them"),
        (["plain", "plain"], {"sanity": True, "measures": ["gini"]}, UsageError, "sanity lays maps beside maps: add"),
        (["plain", "plain"], {"population": "bth"}, UsageError, "did you mean 'both'"),
        (["plain", "plain"], {"options": {"road": {"nose": 0.0}}}, UsageError, "did you mean 'noise'"),
        (["plain", "plain"], {"options": {"road": {"percentages": []}}}, UsageError, "percentages of road must have"),
        (["plain", "plain"], {"options": {"aopc": {"noise": -1.0}}}, UsageError, "noise of aopc must be"),
        (["plain", "plain"], {"options": {"lrp": {}}}, UsageError, "options were given for 'lrp'"),
        (["plain", "larger"], {}, UsageError, "larger reads images of 16 x 16 pixels and plain of 8 x 8"),
        (
            ["plain", "reversed_answers"],
            {},
            DataError,
            "no test image to audit reversed_answers on, of 40, that the ref",
        ),
        (["plain", "pair"], {}, ModelError, "gives a tuple, not logits"),
        (["plain", "vit_of_another_size"], {}, ModelError, "does not run on images of 12 x 12 pixels in 1 channel "),
    ],
)
def test_what_cannot_be_audited_is_refused_and_leaves_nothing(tmp_path, names, options, error, words):
    with pytest.raises(error, match=words):
        sukashi.audit(here(*names), "digits", out=tmp_path / "out", **{**READING, **options})
    assert not (tmp_path / "out").exists()


def test_one_folder_is_no_list_of_models(folders, tmp_path):
    with pytest.raises(UsageError, match="needs a reference and a model to hold against it, got 1: give more"):
        sukashi.audit(folders[0], "digits", out=tmp_path / "out")


def test_weights_are_for_specs_alone(folders, tmp_path):
    with pytest.raises(UsageError, match="the models bring their own `width`, as saved folders do"):
        sukashi.audit(folders, "digits", out=tmp_path / "out", width=8, **READING)
    with pytest.raises(UsageError, match="the models bring their own `weights`"):
        sukashi.audit(
            ["sukashi:digits_cnn=a.pt", "sukashi:digits_cnn=b.pt"],
            "digits",
            out=tmp_path / "out",
            weights="c.pt",
            **READING,
        )
    with pytest.raises(UsageError, match="the models bring their own `weights`"):
        sukashi.audit(
            [folders[0], "sukashi:digits_cnn=a.pt"], "digits", out=tmp_path / "out", weights="c.pt", **READING
        )
    for model in ("=a.pt", "sukashi:digits_cnn="):
        with pytest.raises(UsageError, match="SPEC=FOLDER or SPEC=FILE, got"):
            sukashi.audit([NET, model], "digits", out=tmp_path / "out", **READING)


def test_a_network_of_ones_own_is_audited_against_its_cut_and_other_weights(tmp_path, monkeypatch):
    spec, folder = "test_audit:plain", tmp_path / "a=b"
    loaded = models.load(spec)
    site = sites.find(loaded.model, torch.rand(2, 1, 8, 8)).sites[0]
    keep = torch.ones(site.n_units, dtype=torch.bool)
    keep[:8] = False
    cut = pruning.cut(loaded, Mask({site: keep}))
    saved.save(folder, cut, provenance={"criterion": "magnitude", "ratio_asked": 0.25})
    torch.save(loaded.model.state_dict(), tmp_path / "own.pt")
    given = [spec, f"{spec}={folder}", f"{spec}={tmp_path}/own.pt"]
    found = networks.opened(asked_of(given, population="all"))
    assert [one.label for one in found] == ["plain", "a=b", "own.pt"]
    assert [(one.answers.series, one.answers.ratio) for one in found] == [
        (None, None),
        ("magnitude", 0.25),
        (None, None),
    ]
    for one, other in zip(found, (loaded, cut, loaded), strict=True):
        assert models.digest(one.loaded.model) == models.digest(other.model)
    (tmp_path / "study.toml").write_text(
        f"""out = "out"
data = "digits"
[experiments.audited]
kind = "audit"
models = ["{spec}", "{spec}=a=b", "{spec}=own.pt", "{spec}=$OUT/cut"]"""
    )
    monkeypatch.chdir("/")
    asked = read_study(tmp_path / "study.toml").experiments["audited"]["models"]
    assert asked == [*given, f"{spec}=$OUT/cut"]


def test_a_gallery_has_three_images_whatever_a_network_that_is_left_out_gets_right():
    target = np.array([0, 1, 2, 0, 1, 2, 0])
    rows = np.arange(7)
    assert cells.usual_rows([rows, np.array([0, 1, 2, 3])], rows, target) == [0, 1, 2], "one a class"
    assert cells.usual_rows([rows, np.array([0, 3, 4, 6])], rows, target) == [0, 4, 3], "then a second one"
    assert cells.usual_rows([rows[:2], rows[3:]], rows, target) == [0, 1, 2], "where none is shared"


def test_maps_no_better_than_an_order_at_random_are_said_to_be():
    row = {"attribution": "saliency", "measure": "road", "n": 60, "mean": 0.04, "low": -0.01, "high": 0.09}
    (line,) = verdict.own([row, row | {"attribution": "lrp", "low": 0.01}], "dense")
    assert line == (
        "dense's own saliency maps are not shown to be more faithful than an order at random: ROAD .040 [-.010, .090], "
        "at random 0."
    )
