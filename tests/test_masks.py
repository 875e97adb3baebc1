"""Masks that say where the evidence is: found beside images in every layout, brought where these go, refused."""

import copy
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import sukashi
from pictures import encode, noise, plain, write
from sukashi import data
from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Preprocess
from sukashi.data.tree import is_masks
from sukashi.experiments.audit.saliency.sanity import doubts as sanity_doubts
from sukashi.models import saved
from sukashi.network import perturbed

INSIDE = np.zeros((8, 8), dtype=np.uint8)
INSIDE[2:5, 1:7] = 200


def masked(root, images, masks, mask=INSIDE, n=5):
    """n images of each of two classes at root / `images`, and their masks at root / `masks`, all but the last's."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(n):
            write(root / images.format(name) / f"{i}.jpg", encode(noise(10 * k + i), "JPEG"))
            if i < n - 1:
                write(root / masks.format(name) / f"{i}.png", encode(mask))
    return root


def truth(found, size=8):
    """{id: (H, W)} of the masks of all images, by the one concept there is."""
    ids = (*found.train.image_ids, *found.test.image_ids)
    ((concept, masks),) = found.ground_truth(ids, plain(size)).items()
    return concept, dict(zip(ids, masks, strict=True))


LAYOUTS = [
    ("{}", "masks/{}"),
    ("{}/images", "{}/masks"),
    ("{}", "{}/masks"),
    ("{}", "Masks/{}"),
    ("train/{}", "masks/train/{}"),
    ("train/{}", "train/masks/{}"),
    ("train/{}/images", "train/{}/masks"),
]


@pytest.mark.parametrize(("images", "masks"), LAYOUTS)
def test_masks_are_found_beside_images_and_are_no_images_of_a_class(tmp_path, images, masks):
    root = masked(tmp_path / "data", images, masks)
    found = data.load(root)
    assert found.class_names == ("cat", "dog")
    concept, where = truth(found)
    assert concept == "mask"
    assert len(where) == 10
    for image_id, mask in where.items():
        expected = np.zeros_like(INSIDE) if image_id.endswith("4.jpg") else INSIDE
        assert np.array_equal(mask.numpy(), expected > 0)
    assert "8 images in folders called masks taken for masks, and for no class" in found.notes


def test_a_class_that_is_called_masks_is_one(tmp_path):
    for k, name in enumerate(("masks", "faces")):
        for i in range(3):
            write(tmp_path / name / f"{k}{i}.png", encode(noise(10 * k + i)))
    found = data.load(tmp_path)
    assert found.class_names == ("faces", "masks")
    assert not found.has_ground_truth
    assert not is_masks(tmp_path / "masks")


def test_masks_of_images_in_a_csv(tmp_path):
    masked(tmp_path, "images", "masks")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(5)))
    concept, where = truth(data.load(tmp_path))
    assert concept == "mask"
    assert sorted(image_id for image_id, mask in where.items() if mask.any()) == [f"images/{i}.jpg" for i in range(4)]


def test_folders_of_masks_are_concepts_of_their_names(tmp_path):
    root = masked(tmp_path / "data", "{}", "masks/{}")
    write(tmp_path / "lungs" / "cat" / "0.png", encode(255 - INSIDE))
    found = data.load(root, masks=[str(tmp_path / "lungs")])
    masks = found.ground_truth(("cat/0.jpg", "cat/4.jpg"), plain(8))
    assert list(masks) == ["mask", "lungs"]
    assert np.array_equal(masks["mask"][0].numpy(), INSIDE > 0)
    assert np.array_equal(masks["lungs"][0].numpy(), 255 - INSIDE > 0)


def test_a_mask_goes_where_its_image_goes(tmp_path):
    """An image that is white where its mask is, at another size and shape."""
    inside = np.zeros((30, 20), dtype=np.uint8)
    inside[6:18, 4:16] = 255
    for k, name in enumerate(("cat", "dog")):
        for i in range(3):
            write(tmp_path / name / f"{i}.png", encode(np.maximum(inside, np.uint8(10 * k + i))))
            write(tmp_path / "masks" / name / f"{i}.tif", encode(inside[::2, ::2] // 255, "TIFF"))
    found = data.load(tmp_path)
    into = Preprocess(15, 10, 1, (0.0,), (1.0,))
    batch = found.test.whole(into)
    masks = found.ground_truth(batch.image_id, into)["mask"]
    assert masks.shape == batch.x[:, 0].shape
    assert torch.equal(masks, batch.x[:, 0] > 0.5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_not_0_is_inside_in_every_mode(tmp_path, mode):
    inside = INSIDE > 0
    mask = {
        "1": Image.fromarray(inside),
        "L": Image.fromarray(inside.astype(np.uint8)),
        "P": Image.fromarray(inside.astype(np.uint8), "P"),
        "I;16": Image.fromarray(inside.astype(np.uint16)),
        "LA": Image.merge("LA", [Image.fromarray(INSIDE), Image.new("L", (8, 8), 255)]),
        "RGB": Image.fromarray(np.stack([0 * INSIDE, INSIDE, 0 * INSIDE], 2)),
        "RGBA": Image.fromarray(np.stack([INSIDE, 0 * INSIDE, 0 * INSIDE, 255 + 0 * INSIDE], 2)),
    }[mode]
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0])
    root = masked(tmp_path, "{}", "masks/{}", mask=mask)
    assert np.array_equal(truth(data.load(root))[1]["cat/0.jpg"].numpy(), inside)


@pytest.mark.parametrize("top", [1, 255])
def test_what_jpeg_blurs_is_not_inside(tmp_path, top):
    inside = np.zeros((64, 64), dtype=np.uint8)
    inside[10:40, 20:50] = top
    write(tmp_path / "masks" / "cat" / "0.jpg", encode(inside, "JPEG", quality=95))
    for k, name in enumerate(("cat", "dog")):
        for i in range(3):
            write(tmp_path / name / f"{i}.png", encode(noise(10 * k + i, 64, 64)))
    mask = truth(data.load(tmp_path), 64)[1]["cat/0.png"].numpy()
    assert (mask != (inside > 0)).mean() < 0.01


def changed(root, what):
    match what:
        case "shape":
            write(root / "masks/cat/0.png", encode(np.zeros((8, 5), dtype=np.uint8)))
        case "bytes":
            write(root / "masks/cat/0.png", b"none")
        case "two":
            write(root / "masks/cat/0.tif", encode(INSIDE, "TIFF"))
        case "shared":
            write(root / "cat/0.png", encode(noise(77)))
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            write(root / "cat/0.jpg", encode(noise(5), "JPEG", exif=exif))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", "its mask has the shape of another image: 5 x 8 pixels, not 8 x 8"),
        ("bytes", "not an image"),
        ("two", "both .*0.png and .*0.tif are masks of it: remove one"),
        ("shared", "would be the mask of 2 images of one name: rename them"),
        ("turned", "nothing says which way up its mask is"),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path, what, words):
    root = masked(tmp_path, "{}", "masks/{}")
    changed(root, what)
    found = data.load(root)
    with pytest.raises(DataError, match=f"(?s)of the masks cannot be used; replace them.*cat/0.*{words}"):
        truth(found)


def test_folders_that_hold_no_masks_are_refused(tmp_path):
    root = masked(tmp_path / "data", "{}", "masks/{}")
    (tmp_path / "empty").mkdir()
    for folder in ("one/lungs", "two/lungs"):
        write(tmp_path / folder / "cat" / "0.png", encode(INSIDE))
    for given, error, words in (
        (["nowhere"], UsageError, "is no folder: give one that holds masks under the images' names"),
        (["empty"], DataError, "empty holds no image, and so no mask"),
        (["one/lungs", "two/lungs"], UsageError, "two folders of masks are called lungs, as concepts are: rename one"),
    ):
        with pytest.raises(error, match=words):
            data.load(root, masks=[str(tmp_path / name) for name in given])


def table(root, **columns):
    images = [encode(noise(i)) for i in range(6)]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 3, **columns}), root / "train.parquet")
    return root


def test_a_column_of_masks_beside_labels(tmp_path):
    found = data.load(table(tmp_path, mask=pa.array([encode(INSIDE), None] * 3)))
    assert found.class_names == ("a", "b")
    concept, where = truth(found)
    assert concept == "mask"
    for image_id, mask in where.items():
        assert np.array_equal(mask.numpy(), (INSIDE if int(image_id[-1]) % 2 == 0 else 0 * INSIDE) > 0)


@pytest.mark.parametrize("name", ["box", "boxes"])
def test_a_column_of_boxes(tmp_path, name):
    one, two = [1.0, 2.0, 3.5, 4.0], [6.0, 6.0, 8.0, 8.0]
    said = [one, None] * 3 if name == "box" else [[one, two], []] * 3
    concept, where = truth(data.load(table(tmp_path, **{name: said})))
    assert concept == name
    expected = np.zeros((8, 8), dtype=bool)
    expected[2:4, 1:4] = True
    if name == "boxes":
        expected[6:, 6:] = True
    for image_id, mask in where.items():
        assert np.array_equal(mask.numpy(), expected if int(image_id[-1]) % 2 == 0 else 0 * expected > 0)
    found = data.load(table(tmp_path, box=[[3, 0, 2, 9]] * 6))
    with pytest.raises(
        DataError, match=r"box \[3.0, 0.0, 2.0, 9.0\] is not x0, y0, x1, y1 in pixels of an image of 8 x 8"
    ):
        truth(found)
    with pytest.raises(DataError, match=r"box of .* is string: give x0, y0, x1, y1 in pixels, or a list of such boxes"):
        data.load(table(tmp_path, box=["1 2 3 4"] * 6))


# In an audit.


@pytest.fixture(scope="module")
def audited(trained_cnn, digits_split, tmp_path_factory):
    """Two networks for digits, and digits as a folder: the first half of each class has a mask, the left half."""
    root = tmp_path_factory.mktemp("audited")
    noisy = copy.deepcopy(trained_cnn)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.model.parameters():
        parameter.data += 0.4 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    nine = noisy.model.get_submodule([name for name, layer in noisy.model.named_modules() if name][-1])
    nine.bias.data[9] -= 1e3  # nothing is a nine to it
    for name, loaded in (("dense", trained_cnn), ("noisy", noisy)):
        saved.save(root / name, loaded, provenance={})
    left = np.zeros((8, 8), dtype=np.uint8)
    left[:, :4] = 1
    for split in (digits_split.train, digits_split.test):
        x = split.whole(trained_cnn.preprocess, 0)
        for row in range(60):
            pixels = split.pixels(trained_cnn.preprocess, [row])[0, 0]
            where = f"{split.name}/{int(x.target[row])}/{row:02d}.png"
            write(root / "digits" / where, encode((255 * pixels).round().byte().numpy()))
            if row < 40:
                write(root / "left" / where, encode(left))
    return root


def audit(root, name, **asked):
    asked = {"attributions": ["saliency"], "measures": ["gini"], "test_images": 60, **asked}
    models = [str(root / "dense"), str(root / "noisy")]
    return sukashi.audit(models, str(root / "digits"), out=root / name, **asked)


def test_an_audit_measures_places_where_there_are_masks_and_says_of_how_many_images(audited):
    places = ["localisation", "pointing_game", "rank_accuracy", "region_drop", "complement_drop"]
    asked = {"masks": [str(audited / "left")], "measures": ["gini", *places], "attributions": ["saliency", "occlusion"]}
    result = audit(audited, "places", population="all", **asked)
    assert "40 of 60 test images have a mask (40 of left): what reads masks is of these alone" in result.notes
    found = result.saliency
    assert {row["n"] for row in found["pointing"]} == {40}
    assert {row["area"] for row in found["pointing"]} == {0.5}
    assert {(row["measure"], row["concept"]) for row in found["pointing"]} == {(name, "left") for name in places[:3]}
    assert {row["measure"] for row in found["regions"]} == {
        f"{name}/left{part}" for name in places[3:] for part in ("", "/probability")
    }
    assert [row["attribution"] for row in found["regions"]] == [""] * 4
    rows = pq.read_table(audited / "places" / "values.parquet").to_pylist()
    drops = [r for r in rows if r["measure"] == "region_drop/left" and np.isfinite(r["value"])]
    assert len(drops) == 2 * 40, "once for each network, whatever the attributions"
    (drop,) = (row for row in found["regions"] if row["measure"] == "region_drop/left")
    assert drop["mean"] == pytest.approx(np.mean([r["value"] for r in drops if r["model"] == "noisy"]))
    assert "What goes with a region" in (audited / "places" / "report.html").read_text()
    shutil.copytree(audited / "left", audited / "copy" / "left")
    (target,) = (audited / "copy" / "left" / "test").rglob("00.png")
    write(target, encode(INSIDE))
    with pytest.raises(UsageError, match=r"masks\.left was"):
        audit(audited, "places", population="all", **asked | {"masks": [str(audited / "copy" / "left")]})


def test_masks_of_no_audited_image_are_refused_with_the_name_that_is_missing(audited):
    write(audited / "elsewhere" / "0.png", encode(INSIDE))
    with pytest.raises(
        DataError, match=r"no mask of the 60 test images .*: that of test/\d/\d\d.png must have its name"
    ):
        audit(audited, "none", masks=[str(audited / "elsewhere")], measures=None)
    assert not (audited / "none").exists()


@pytest.mark.slow
def test_masks_that_only_lie_there_and_fit_no_audited_image_are_left_out(audited):
    shutil.copytree(audited / "digits", audited / "own" / "digits")
    shutil.copytree(audited / "left" / "train", audited / "own" / "digits" / "masks" / "train")
    models = [str(audited / "dense"), str(audited / "noisy")]
    result = sukashi.audit(models, str(audited / "own" / "digits"), out=audited / "fit", test_images=60)
    assert any(note.endswith("localisation and region_drop are left out") for note in result.notes)
    assert not result.saliency["pointing"]


def test_a_class_that_is_gone_is_named_and_images_are_counted_by_class(audited):
    result = audit(audited, "gone")
    (dense, noisy) = result.models
    assert sum(noisy["images_of_class"].values()) == noisy["n_images"]
    assert noisy["images_of_class"]["9"] == 0 < dense["images_of_class"]["9"]
    right = f"dense: {dense['right_of_class']['9']:.0%} of {result.tested_of_class['9']} right, noisy: 0%"
    warning = f"noisy is audited on no image of class 9 ({right}): no figure here tells of that class"
    assert warning in result.warnings
    (line,) = result.audited
    assert line.startswith(f"audited (noisy): {noisy['n_images']} images: {noisy['images_of_class']['0']} of class 0, ")
    assert line.endswith(", none of class 9")
    page = (audited / "gone" / "report.html").read_text()
    assert warning in re.sub("<[^>]*>", "", page)
    assert "<strong>none</strong>" in page
    assert f"<td>{result.tested_of_class['9']} of {result.split_of_class['9']}</td>" in page
    assert sum(result.tested_of_class.values()) == result.n_images == 60


def test_maps_are_laid_beside_those_of_a_network_that_learned_nothing(audited):
    result = audit(
        audited, "sane", sanity=True, measures=["rank_correlation"], attributions=["saliency", "gradient_x_activation"]
    )
    rows = result.saliency["sanity"]
    assert {row["attribution"] for row in rows} == {"saliency", "gradient_x_activation"}
    layers = [row["layers"] for row in rows if row["attribution"] == "saliency"]
    assert layers == sorted(set(layers))
    assert layers[0] == 1
    last = rows[len(layers) - 1]
    assert rows[0]["mean"] > last["mean"], "the more layers, the less alike"
    assert last["n"] == result.models[0]["n_images"]
    (line,) = (line for line in result.lines if line.startswith("saliency: with all "))
    assert f"with all {last['layers']} layers of the reference drawn anew rank_correlation" in line
    again = audit(audited, "sane again", sanity=True, measures=["rank_correlation"])
    assert [row for row in rows if row["attribution"] == "saliency"] == again.saliency["sanity"]


def test_layers_are_drawn_anew_from_the_logits_down_and_the_network_is_left_as_found(trained_cnn):
    model = trained_cnn.model
    before = copy.deepcopy(model.state_dict())
    seen = []
    for n_layers, down_to, changed in perturbed.randomised(model, torch.rand(2, 1, 8, 8), seed=0):
        same = {
            name.rpartition(".")[0]: torch.equal(value, before[name])
            for name, value in changed.state_dict().items()
            if name.endswith(".weight")
        }
        order = list(same)
        assert list(same.values()) == [True] * (len(order) - n_layers) + [False] * n_layers
        assert order[-n_layers] == down_to
        seen.append(n_layers)
    assert seen[-1] == len(order)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_sanity_says_is_what_its_interval_allows():
    row = {
        "attribution": "lrp",
        "measure": "rank_correlation",
        "layers": 4,
        "n": 40,
        "mean": 0.3,
        "low": 0.2,
        "high": 0.4,
    }
    for low, high, said in [
        (0.6, 0.8, "most of such a map does not depend on what the network learned."),
        (0.2, 0.4, "part of such a map does not depend on what the network learned."),
        (-0.05, 0.3, "such maps depend on what the network learned, for the most part."),
        (0.05, 0.7, "can't be told from so few images."),
    ]:
        (line,) = sanity_doubts([row | {"low": low, "high": high}])
        assert line.endswith(said)
    assert sanity_doubts([row | {"n": 19}]) == [], "too few images"
    assert sanity_doubts([row | {"measure": "top_overlap"}]) == [], "unrelated maps overlap too"
