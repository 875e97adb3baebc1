"""The experiment of concepts: what it finds on generated images, what it refuses, and a cut that does without."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sukashi
from cases import fitted
from sukashi import data
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.objective import Classification
from sukashi.core.types import Preprocess
from sukashi.data.watermark import Watermark, stamped
from sukashi.decompositions.contrast import highest
from sukashi.decompositions.subspaces import ablated
from sukashi.decompositions.vectors import features
from sukashi.experiments.concepts.summary import opened
from sukashi.measures.precision import average_precision
from sukashi.models import load
from sukashi.network import hooks

PREPROCESS = Preprocess(16, 16, 3, (0.3,) * 3, (0.3,) * 3)
MARKED = "shapes:watermark=0.9,size=16,n=40"
ASKED = {"layer": "3", "of": "circle", "images": 40}
CONTRAST = {"method": "contrast", "concept": "watermark", "dimensions": 3}


@pytest.fixture(scope="module")
def net():
    """A small CNN that has learned generated shapes, of which most circles carry a mark."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1)]
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 6)]
        model = nn.Sequential(*layers)
        fitted(model, data.load(MARKED).train.whole(PREPROCESS, 0), epochs=10, size=32, rate=1e-2)
    model.preprocess = PREPROCESS
    return model


@pytest.fixture(scope="module")
def twins():
    """The same test images without any mark, and with one on every circle."""
    found = [data.load(f"shapes:{name}size=16,n=40").test.whole(PREPROCESS, 0) for name in ("", "watermark=1,")]
    assert found[0].image_id == found[1].image_id
    return found


@pytest.fixture(scope="module")
def contrasted(net, tmp_path_factory):
    return sukashi.concepts(net, MARKED, **ASKED, **CONTRAST, out=tmp_path_factory.mktemp("made") / "contrast")


def found_in(folder):
    """The subspaces in a folder, whatever their network."""
    return opened(folder, json.loads((Path(folder) / "experiment.json").read_text())["identity"]["model"])


def risen(model, twins):
    """By how much the mark raises the logit of circles, on circles."""
    plain, marked = twins
    circles = plain.target == 0
    with torch.no_grad():
        return float((model(marked.x) - model(plain.x))[circles, 0].mean())


def test_what_masks_show_is_found_and_taken_out(net, twins, contrasted):
    (found,) = contrasted.subspaces
    assert found["tells"]["watermark"]["low"] > found["tells"]["watermark"]["by_chance"]
    assert 0.2 < contrasted.changed <= 1
    assert "watermark" in contrasted.verdict
    subspaces = found_in(contrasted.out)
    assert (subspaces.layer, subspaces.n_subspaces, subspaces.n_dimensions) == ("3", 1, 3)
    with ablated(net, subspaces, [0]):
        without = risen(net, twins)
    assert without < 0.6 * risen(net, twins)


@pytest.mark.filterwarnings("ignore")
def test_a_cut_that_is_mended_to_do_without_forgets_it_and_another_does_not(net, twins, contrasted, tmp_path):
    cut = {"criterion": "taylor", "ratio": 0.2, "round_to": 1, "calibration": 30, "repair": "refit", "test_images": 60}
    plain = sukashi.prune(net, MARKED, **cut, out=tmp_path / "plain")
    without = sukashi.prune(net, MARKED, **cut, ablate=f"{contrasted.out}:0", out=tmp_path / "without")
    assert plain.ablated is None
    assert without.ablated["numbers"] == [0]
    assert "towards the dense network without subspace 0 of 3" in without.text()
    spec = json.loads((tmp_path / "plain" / "experiment.json").read_text())["identity"]["model"]["spec"]
    rise = [risen(load(spec, weights=tmp_path / name).model, twins) for name in ("plain", "without")]
    assert rise[1] < 0.7 * rise[0]
    assert rise[0] > 0.8 * risen(net, twins)


@pytest.fixture(scope="module")
def parted(net, tmp_path_factory):
    parts = {"subspaces": 3, "positions": 10, "trials": 1}
    return sukashi.concepts(net, MARKED, **ASKED, **parts, out=tmp_path_factory.mktemp("made") / "parts")


def test_what_a_subspace_sees_is_contrasted_without_masks(net, twins, parted, tmp_path):
    given = {**ASKED, "method": "contrast", "dimensions": 3, "imputed": 0.3}
    rises = []
    for k in range(3):
        found = sukashi.concepts(net, MARKED, **given, where=f"{parted.out}:{k}", out=tmp_path / str(k))
        assert f"of what changes without what subspace {k} of 3 sees" in found.verdict
        with ablated(net, found_in(found.out), [0]):
            rises.append(risen(net, twins))
    assert min(rises) < 0.6 * risen(net, twins)
    # Not the mean of circles alone, but of the data.
    site = features(net, "3", twins[0].x[:2])
    mean = hooks.means(net, [site], [data.load(MARKED).train.limit(40).whole(PREPROCESS, 0).x])[site].mean(1)
    torch.testing.assert_close(found_in(tmp_path / "0").mean, mean)
    assert "0 of 3 is most relevant imputed" in (tmp_path / "0" / "report.html").read_text()
    with pytest.raises(UsageError, match="where"):
        sukashi.concepts(net, MARKED, **given, where=f"{parted.out}:1", out=tmp_path / "0")


def test_units_are_subspaces_by_themselves(net, tmp_path):
    asked = {**ASKED, "method": "units", "positions": 16}
    some = sukashi.concepts(net, MARKED, **asked, units=[7, 2], out=tmp_path / "some")
    assert [of["name"] for of in some.subspaces] == ["unit 7", "unit 2"]
    every = sukashi.concepts(net, MARKED, **asked, subspaces=12, out=tmp_path / "every")
    shares = {of["name"]: of["share"] for of in every.subspaces}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    for of in some.subspaces:
        assert of["share"] == pytest.approx(shares[of["name"]], abs=1e-6)
    most = sukashi.concepts(net, MARKED, **asked, subspaces=2, out=tmp_path / "most")
    assert [of["name"] for of in most.subspaces] == [of["name"] for of in every.subspaces[:2]]
    assert every.subspaces[0]["share"] > every.subspaces[-1]["share"]


def test_the_highest_places_of_maps_are_taken():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert highest(maps, 0.5).tolist() == [[[False, True], [True, False]], [[True, True], [False, False]]]
    for share in (0.1, 0.9):
        with pytest.raises(UsageError, match="at least one of the 4 pixels"):
            highest(maps, share)


def test_relevance_is_parted(parted):
    found = parted
    shares = [of["share"] for of in found.subspaces]
    assert np.isclose(sum(shares), 1, atol=1e-3)
    assert [len(found.pictures), found.n_dimensions] == [3 * 6, 4]
    assert found.n_own == 10


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"layer": "33"}, ModelError, "no layer '33'"),
        ({"of": "circel"}, UsageError, "no class 'circel'.*circle"),
        ({"subspaces": 5}, UsageError, "5 subspaces do not divide 12 features into equal parts: take 3, 4, 6"),
        ({**CONTRAST, "concept": "watermarks"}, UsageError, "no masks show a concept 'watermarks'.*watermark"),
        ({**CONTRAST, "dimensions": 12}, UsageError, "`dimensions` must be below the 12 features"),
        ({"method": "contrast"}, UsageError, "needs a `concept`.*or `where`"),
        ({**CONTRAST, "where": "runs:0"}, UsageError, "give one of them"),
        ({**CONTRAST, "imputed": 0.2}, UsageError, "`imputed` is about `where`"),
        ({"where": "runs:0"}, UsageError, "`where` is of another method"),
        ({"method": "contrast", "where": "runs"}, UsageError, "`where` is a folder of concepts and numbers"),
        ({"method": "contrast", "where": "nowhere:0"}, UsageError, "nowhere"),
        ({"dimensions": 2}, UsageError, "`dimensions` is of another method"),
        ({"method": "units", "units": [12]}, UsageError, "has features 0 to 11, got 12"),
        ({"method": "units", "units": [1, 1]}, UsageError, "`units` are different numbers"),
        ({"units": [1]}, UsageError, "`units` is of another method"),
        (
            {"images": 2, "data": "shapes:size=16,n=40", **CONTRAST},
            DataError,
            "0 training images that show 'watermark'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_work_starts(net, tmp_path, changed, error, words):
    given = {"data": MARKED, **ASKED, **changed}
    images = given.pop("data")
    with pytest.raises(error, match=words):
        sukashi.concepts(net, images, **given, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"repair": "none"}, "give `repair='refit'` too"),
        ({"ablate": "OUT"}, "is chosen to be taken out"),
        ({"ablate": "OUT:0,"}, "a folder of concepts and numbers of its subspaces"),
        ({"ablate": "OUT:3"}, "has subspaces 0 to 0, got 3"),
        ({"ablate": "OUT/tables:0"}, "holds no experiment"),
    ],
)
def test_an_ablation_that_does_nothing_is_refused(net, contrasted, tmp_path, asked, words):
    given = {"repair": "refit", "ablate": "OUT:0", **asked}
    given["ablate"] = given["ablate"].replace("OUT", contrasted.out)
    with pytest.raises(UsageError, match=words):
        sukashi.prune(net, MARKED, "magnitude", ratio=0.2, calibration=5, **given, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore")
def test_subspaces_of_another_network_are_refused(net, contrasted, tmp_path):
    other = copy.deepcopy(net)
    other.load_state_dict({name: 2 * value for name, value in net.state_dict().items()})
    other.preprocess = PREPROCESS
    with pytest.raises(UsageError, match="are of a network with other weights"):
        sukashi.prune(
            *(other, MARKED, "magnitude"),
            ratio=0.2,
            calibration=5,
            repair="refit",
            ablate=f"{contrasted.out}:0",
            out=tmp_path / "a",
        )


@pytest.mark.filterwarnings("ignore")
def test_other_dimensions_of_the_same_directions_are_another_ablation(net, contrasted, tmp_path):
    cut = {"criterion": "magnitude", "ratio": 0.2, "calibration": 5, "repair": "refit", "out": tmp_path / "cut"}
    fewer = sukashi.concepts(net, MARKED, **ASKED, **{**CONTRAST, "dimensions": 1}, out=tmp_path / "fewer")
    assert torch.equal(found_in(fewer.out).dual, found_in(contrasted.out).dual)
    sukashi.prune(net, MARKED, **cut, ablate=f"{fewer.out}:0")
    with pytest.raises(UsageError, match="ablated"):
        sukashi.prune(net, MARKED, **cut, ablate=f"{contrasted.out}:0")


def test_features_that_move_to_another_axis_are_followed_or_refused():
    class Moved(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.linear, self.how = nn.Linear(6, 5), how

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1)).permute(*self.how)

    x = torch.randn(2, 6, 7, 8)
    for how, axis in (((0, 3, 1, 2), 1), ((0, 1, 3, 2), 2), ((0, 1, 2, 3), -1)):
        model = nn.Sequential(Moved(how), nn.Flatten(), nn.Linear(5 * 56, 3)).eval()
        assert features(model, "0", x).axis % 4 == axis % 4
    flat = nn.Sequential(Moved((0, 3, 1, 2)), nn.Flatten(), nn.Linear(5 * 56, 3)).eval()
    with pytest.raises(ModelError, match="on which axis they are can't be told"):
        features(flat, "1", x)
    square = nn.Sequential(Moved((0, 3, 1, 2)), nn.Flatten(), nn.Linear(5 * 25, 3)).eval()
    with pytest.raises(ModelError, match="on which axis they are can't be told"):
        features(square, "0", torch.randn(2, 6, 5, 5)[:, :, :5, :5])


def test_features_lie_where_the_layers_before_say(small):
    vit, x = small["vit"].model, small["vit"].data.x
    assert [features(vit, name, x).axis for name in ("patches", "blocks.1", "blocks.1.fc1", "norm")] == [1, -1, -1, -1]
    cnn = small["cnn"]
    assert features(cnn.model, "bn2", cnn.data.x).axis == 1


# What is measured.


def test_average_precision_is_the_mean_of_precisions():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        score, has = rng.normal(size=60), rng.random(60) < 0.3
        score = score.round() if ties else score
        literal = np.mean([has[score >= value].mean() for value in score[has]])
        found = average_precision(score, has)
        assert np.isclose(found.mean, literal, atol=1e-12)
        assert 0 < found.low < found.mean < found.high < 1
        wider = average_precision(score, has, level=0.99)
        assert wider.low < found.low < found.high < wider.high
    assert average_precision(score, score > 99) is None
    perfect = average_precision(np.arange(10.0), np.arange(10) > 5)
    assert perfect.mean == perfect.high == 1
    assert perfect.low < 1


def test_a_margin_is_the_lead_over_the_next_class():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, 5.0]])
    found = Classification(explains="margin").explained(logits, torch.tensor([1, 0]))
    assert found.tolist() == [2.0, -5.0]
    some = Classification(outputs=(0, 2), explains="margin")
    assert some.explained(logits, torch.tensor([0, 1])).tolist() == [-1.0, 5.0]


# Watermarks.


def test_a_mark_is_laid_over_pixels_half_transparent():
    mark, x = Watermark("XX", size=0.5, at=(0.1, 0.2), opacity=0.5), torch.rand(2, 3, 32, 32)
    alpha = mark.alpha(32, 32)
    assert alpha.max() == 0.5
    assert 0.02 < (alpha > 0).float().mean() < 0.5
    assert not alpha[:6].any()
    plain = Preprocess(32, 32, 3, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(stamped(x, mark, plain), x * (1 - alpha) + alpha)
    scaled = Preprocess(32, 32, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    mean, std = (torch.tensor(of)[:, None, None] for of in (scaled.mean, scaled.std))
    torch.testing.assert_close(stamped((x - mean) / std, mark, scaled) * std + mean, stamped(x, mark, plain))


def test_a_logo_is_where_it_is_opaque_or_dark(tmp_path):
    from PIL import Image

    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    Image.fromarray(255 - pixels[..., 3]).save(tmp_path / "dark.png")
    found = [
        Watermark(logo=str(tmp_path / name), size=0.5, at=(0, 0), opacity=1.0).alpha(16, 16)
        for name in ("clear.png", "dark.png")
    ]
    assert torch.equal(*found)
    assert found[0][2:6, 2:6].eq(1).all()
    assert found[0].sum() == 16


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "a text or a logo"),
        ({"text": "a", "logo": "b"}, "a text or a logo"),
        ({"text": "a", "opacity": 2}, "opacity of a watermark must be in"),
        ({"text": "a", "size": 0}, r"size of a watermark must be in \(0, 1\]"),
        ({"text": "a", "at": (1.0, 1.0)}, "nothing of the watermark is seen"),
        ({"text": "a", "font": "nowhere.ttf"}, "nowhere.ttf is no font"),
        ({"logo": "nowhere.png"}, "nowhere.png is no image"),
    ],
)
def test_a_mark_that_is_none_is_refused(asked, words):
    with pytest.raises(UsageError, match=words):
        Watermark(**asked).alpha(16, 16)
