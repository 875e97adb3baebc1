"""How a network reads images: the size and the crop are torchvision's, who says so is told, and asking comes first."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

import sukashi
from sukashi import data, models
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Preprocess
from sukashi.data import images
from sukashi.experiments.bench import Source
from sukashi.models import specs

SPEC = "sukashi:digits_cnn"
NET = {"model": SPEC, "width": 8, "data": "digits", "calibration": 4}
PLAIN = Preprocess(8, 8, 1, (0.0,), (1.0,))
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


@pytest.mark.parametrize(("shorter", "size"), [(256, 224), (64, 64), (73, 64), (33, 10), (20, 19)])
@pytest.mark.parametrize("shape", [(40, 90), (91, 40), (64, 64), (19, 300), (300, 19, 3), (45, 44, 3)])
def test_a_crop_is_that_of_torchvision_pixel_by_pixel(shorter, size, shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    theirs = transforms.Compose([transforms.Resize(shorter), transforms.CenterCrop(size)])(image)
    ours = images.resized(image, replace(PLAIN, height=size, width=size, shorter=shorter), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (10, 11)])
def test_a_crop_of_no_square_covers_it_and_keeps_proportions(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    found = images.resized(image, replace(PLAIN, height=20, width=30, shorter=25), Image.Resampling.BILINEAR)
    assert found.size == (30, 20)
    scale = max(25 / shape[0], 38 / shape[1])
    whole = image.resize((int(shape[1] * scale), int(shape[0] * scale)), Image.Resampling.BILINEAR)
    theirs = np.asarray(transforms.CenterCrop((20, 30))(whole)).astype(int)
    assert np.abs(np.asarray(found).astype(int) - theirs).mean() < 12  # noise moved by a pixel is 50 off and more


def test_a_strip_is_cropped_before_it_would_fill_memory(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 200), dtype=np.uint8))
    crop = replace(PLAIN, height=20, width=20, shorter=25)
    whole = np.asarray(images.resized(image, crop, Image.Resampling.BILINEAR)).astype(int)
    monkeypatch.setattr(images, "_MAX_RESIZED", 100)
    part = np.asarray(images.resized(image, crop, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(part - whole).max() <= 1


def test_a_mask_is_cropped_as_its_image_is(real_data):
    camvid = data.load(real_data / "camvid")
    some = camvid.train.subset([0, 1])
    square = Preprocess(32, 32, 3, (0.0,) * 3, (1.0,) * 3, 40)
    whole = Preprocess(40, 40 * 4 // 3, 3, (0.0,) * 3, (1.0,) * 3)
    cropped, all_of_it = some.whole(square), some.whole(whole)
    assert cropped.target.shape == (2, 32, 32)
    left = round((whole.width - 32) / 2)
    same = (cropped.target == all_of_it.target[:, 4:36, left : left + 32]).float().mean()
    assert same > 0.9  # squashed ones agree on half as much


def described(weights, path, **header):
    save_file(load_file(weights), path, header)
    return path


def test_asking_comes_before_the_weights_and_these_before_what_is_usual(cnn_weights, tmp_path):
    plain = models.load(SPEC, width=8, weights=cnn_weights)
    assert plain.assumed
    assert (
        plain.reads
        == "8 x 8, mean 0, std 1, whole images resized, aspect ratio not kept (sukashi's defaults for digits_cnn)"
    )
    names = json.dumps(list("abcdefghij"))
    told = described(
        cnn_weights, tmp_path / "w.safetensors", size="8,8", mean="0.5", std="0.25", resize="crop:9", class_names=names
    )
    found = models.load(SPEC, width=8, weights=told)
    assert found.preprocess == Preprocess(8, 8, 1, (0.5,), (0.25,), 9)
    assert (found.assumed, found.class_names) == (False, tuple("abcdefghij"))
    assert found.reads.endswith("shorter side resized to 9, the centre cropped (the header of w.safetensors)")
    asked = sukashi.load(SPEC, width=8, weights=told, mean=0.125, resize="squash")
    assert asked.preprocess == Preprocess(8, 8, 1, (0.125,), (0.25,))
    by = "(the header of w.safetensors), whole images resized, aspect ratio not kept (as asked)"
    assert f"mean 0.125 (as asked), std 0.25 {by}" in asked.reads


def test_a_saved_folder_keeps_how_images_are_read(cnn_weights, tmp_path):
    for name, given in {"crop": {"resize": "crop:9", "std": 0.5}, "squash": {}}.items():
        loaded = sukashi.load(SPEC, width=8, weights=cnn_weights, **given)
        models.save(tmp_path / name, loaded, provenance={})
        again = models.load(str(tmp_path / name))
        assert again.preprocess == loaded.preprocess
        assert again.reads.endswith("(the saved folder)")
        recipe = json.loads((tmp_path / name / "recipe.json").read_bytes())["preprocess"]
        assert recipe.get("shorter") == {"crop": 9}.get(name)
    assert sukashi.load(tmp_path / "crop", resize="squash").preprocess.shorter is None


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"size": "big"}, "gives size='big': it must be one or two whole numbers"),
        ({"mean": "0.5,0.5"}, "says what cannot be: mean must be a finite number for each of 1 channels"),
        ({"resize": "stretch"}, "says what cannot be: resize must be squash, crop, or crop:N"),
        ({"resize": "crop:4"}, "says what cannot be: the shorter side must be resized to 8 to 16384 pixels"),
        ({"class_names": '["a"]'}, "it must be a JSON list of 10 names"),
        ({"trained_on": "[1]"}, "it must be a JSON list of pairs"),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(cnn_weights, tmp_path, header, said):
    with pytest.raises(ModelError, match=said):
        models.load(SPEC, width=8, weights=described(cnn_weights, tmp_path / "w.safetensors", **header))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": []}, "`size` must have at least 1 item"),
        ({"size": [8, 8, 8]}, "`size` must have at most 2 items"),
        ({"size": 0}, "must be at least 1"),
        ({"mean": [0.1, 0.2]}, "mean must be a finite number for each of 1 channels"),
        ({"std": 0.0}, "std must be above 0"),
        ({"resize": "crop:x"}, "resize must be squash, crop, or crop:N"),
        ({"resize": "squash:9"}, "resize must be squash, crop, or crop:N"),
    ],
)
def test_what_no_image_can_be_read_as_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        sukashi.load(SPEC, width=8, **given)


def test_crop_is_as_far_as_the_architecture_was_published():
    shorter = {
        (spec, size): sukashi.load(spec, n_classes=2, size=size, resize="crop").preprocess.shorter
        for spec, size in [("torchvision:resnet18", 224), ("torchvision:resnet18", 112), ("timm:test_resnet", 160)]
    }
    assert shorter["torchvision:resnet18", 224] == 256
    assert shorter["torchvision:resnet18", 112] == 128
    assert shorter["timm:test_resnet", 160] == int(160 / 0.95)
    assert sukashi.load("sukashi:cifar_resnet20", resize="crop").preprocess.shorter == 32
    assert sukashi.load("torchvision:resnet18", n_classes=2).preprocess.shorter is None


def test_pretrained_weights_read_images_as_they_were_published(monkeypatch):
    model = specs.torchvision.models.get_model("squeezenet1_1")
    weights = specs.torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **how: model.state_dict())
    loaded = models.load("torchvision:squeezenet1_1", pretrained=True)
    assert (loaded.preprocess.height, loaded.preprocess.shorter, loaded.assumed) == (224, 256, False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8))
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.preprocess.mean, loaded.preprocess.std))
    ours = (torch.from_numpy(images.fitted(image, loaded.preprocess)) - mean) / std
    torch.testing.assert_close(ours, weights.transforms()(image), rtol=0, atol=1e-5)


def test_images_that_are_tensors_are_read_as_they_are():
    loader = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    with pytest.raises(UsageError, match="is tensors as a network takes them: leave `size` out"):
        sukashi.open(SPEC, loader, calibration=2, width=8, n_classes=2, size=9)


def test_the_identity_is_how_images_are_read_and_not_who_says_so(cnn_weights, tmp_path):
    def identity(weights, **given):
        source = Source(**NET, weights=str(weights), **given)
        return source.beside(source.read()).about_model["preprocess"]

    told = described(cnn_weights, tmp_path / "w.safetensors", mean="0.5", resize="crop:9")
    assert identity(told) == identity(cnn_weights, mean=[0.5], resize="crop:9") != identity(cnn_weights)
    assert identity(told)["shorter"] == 9


def test_every_command_that_reads_images_takes_how(cnn_weights, tmp_path):
    given = {**NET, "weights": cnn_weights, "test_images": 40}
    result = sukashi.prune(**given, criterion="magnitude", ratio=0.5, mean=0.25, out=tmp_path / "half")
    assert json.loads((tmp_path / "half" / "recipe.json").read_bytes())["preprocess"]["mean"] == [0.25]
    assert "mean 0.25 (as asked)" in next(note for note in result.notes if note.startswith("images are read as"))
    page = (tmp_path / "half" / "report.html").read_text()
    assert "mean 0.25 (as asked)" in page[page.index("<details") :]
    assert "mean 0.25 (as asked)" not in page[: page.index("<details")]


def test_check_asks_whether_the_network_is_what_it_should_be(cnn_weights):
    right, off = (
        sukashi.check(**NET, weights=cnn_weights, limit=0, **given) for given in ({}, {"mean": 1.0, "std": 0.1})
    )
    assert right.n_right > 150 > 100 > off.n_right
    assert off.text().startswith(
        "read as 8 x 8 (sukashi's defaults for digits_cnn), mean 1, std 0.1 (as asked), whole images resized"
    )
    assert f"right on {off.n_right} of 200 test images" in off.text().splitlines()[0]
    drawn = sukashi.check(**NET, limit=0)
    assert drawn.n_right is None
    assert "the weights are random" in drawn.text().splitlines()[0]
