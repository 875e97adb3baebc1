"""ONNX files that are shipped: they say what they read, and run where neither sukashi nor torch can be imported."""

import copy
import hashlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sukashi
from sukashi import models
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Preprocess, rank
from sukashi.criteria import criteria, pruning
from sukashi.data import images
from sukashi.experiments.export import run
from sukashi.models import onnx

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install 'sukashi[onnx]'")
NAMES = ("null", "eins", "zwei", "drei, 3", "vier", "fünf", "sechs", "sieben", "acht", "neun")
# What infer.py may import: Python's own, and the three that it says.
ALONE = """
import runpy, sys
allowed = {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime", "__main__"}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def shipped(small, tmp_path_factory):
    """A cut network in a folder, as a file and as one in float16."""
    case, home = small["cnn"], tmp_path_factory.mktemp("shipped")
    scores = criteria["magnitude"](case.model, case.sites, case.data, generator=torch.Generator())
    reads = Preprocess(8, 8, 1, (0.3,), (0.7,))
    loaded = replace(case.loaded, class_names=NAMES, preprocess=reads)
    models.save(home / "cut", pruning.cut(loaded, rank(scores).mask(0.4)), provenance={})
    whole = sukashi.export(home / "cut")
    half = sukashi.export(home / "cut", fp16=True)
    return SimpleNamespace(folder=home / "cut", whole=whole, half=half, loaded=models.load(str(home / "cut")))


def alone(infer, *arguments):
    command = [sys.executable, "-I", "-c", ALONE, infer, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100)


def pictures(folder):
    """Images in every mode that has a fixed scale, by name."""
    noise = np.random.default_rng(0)
    colour = Image.fromarray(noise.integers(0, 256, (37, 23, 3), dtype=np.uint8))
    grey = Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8))
    deep = Image.fromarray(noise.integers(0, 65536, (19, 11), dtype=np.uint16))
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(noise.integers(0, 256, (37, 23), dtype=np.uint8)))
    turned = Image.Exif()
    turned[0x0112] = 6
    found = {
        **{"grey.png": grey, "colour.png": colour, "deep.png": deep, "alpha.png": alpha, "la.png": alpha.convert("LA")},
        **{"palette.png": colour.quantize(20), "palette.gif": colour.quantize(7), "bits.png": grey.convert("1")},
        **{"cmyk.jpg": colour.convert("CMYK"), "ycbcr.tif": colour.convert("YCbCr"), "web.webp": alpha},
    }
    for name, image in found.items():
        image.save(folder / name)
    colour.save(folder / "turned.jpg", exif=turned)
    colour.quantize(20).save(folder / "clear.png", transparency=3)
    return sorted(folder / name for name in (*found, "turned.jpg", "clear.png"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shorter", [None, 9, 13])
def test_the_script_reads_an_image_as_sukashi_does(tmp_path, channels, shorter):
    reads = Preprocess(14, 9, channels, (0.0,) * channels, (1.0,) * channels, shorter)
    script = runpy.run_path(str(Path(onnx.__file__).with_name(onnx.INFER)))
    for path in pictures(tmp_path):
        expected = images.fitted(images._plain(images._open(path.read_bytes(), 10**6)), reads)
        np.testing.assert_array_equal(
            script["pixels"](str(path), channels, 14, 9, shorter or 0), expected, err_msg=path.name
        )


def test_an_image_without_a_fixed_scale_is_refused(tmp_path):
    script = runpy.run_path(str(Path(onnx.__file__).with_name(onnx.INFER)))
    for name, mode in (("float.tif", "F"), ("int.tif", "I"), ("lab.tif", "LAB")):
        Image.new(mode, (4, 4)).save(tmp_path / name)
        with pytest.raises(SystemExit, match=f"of mode {mode} has no fixed scale"):
            script["pixels"](str(tmp_path / name), 3, 4, 4, 0)


def test_it_classifies_where_nothing_else_can_be_imported(shipped, tmp_path):
    paths = pictures(tmp_path)
    done = alone(shipped.whole.infer, shipped.whole.file, *paths)
    assert done.returncode == 0, done.stderr
    reads = shipped.loaded.preprocess
    mean, std = (torch.tensor(values).view(1, 1, 1) for values in (reads.mean, reads.std))
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        planes = images.fitted(images._plain(images._open(path.read_bytes(), 10**6)), reads)
        x = (torch.from_numpy(planes.copy()) - mean) / std
        with torch.no_grad():
            odds = shipped.loaded.model(x[None]).double().softmax(1)[0]
        said = line.removeprefix(f"{path}: ")
        best = odds.argsort(descending=True)[:5].tolist()
        assert [name for name in re.split(r" \d+\.\d%(?:, )?", said) if name] == [NAMES[k] for k in best]
        shares = [float(share) / 100 for share in re.findall(r" (\d+\.\d)%", said)]
        assert shares == pytest.approx([odds[k].item() for k in best], abs=6e-4)


def test_the_check_that_nothing_else_can_be_imported_would_see_it(tmp_path):
    (tmp_path / "greedy.py").write_text("import torch")
    assert "torch is not installed here" in alone(tmp_path / "greedy.py").stderr


def test_a_file_says_what_it_is(shipped):
    content = Path(shipped.whole.file).read_bytes()
    told = onnx.metadata(content)
    assert told == shipped.whole.metadata
    assert tuple(json.loads(told["class_names"])) == NAMES
    assert [json.loads(told[name]) for name in ("mean", "std")] == [[0.3], [0.7]]
    assert [told[name] for name in ("channels", "height", "width", "layout", "colour")] == [
        "1",
        "8",
        "8",
        "NCHW",
        "grey",
    ]
    assert told["recipe_sha256"] == hashlib.sha256((shipped.folder / "recipe.json").read_bytes()).hexdigest()
    assert told["weights_sha256"] == shipped.loaded.weights_sha256
    assert told["precision"] == "float32"
    assert "bilinear" in told["resize"]
    assert told["sukashi_version"]
    assert shipped.whole.sha256 == hashlib.sha256(content).hexdigest()
    assert shipped.whole.bytes == len(content)
    assert shipped.whole.file == str(shipped.folder / "onnx" / "model.onnx")
    assert f"python {shipped.whole.infer} {shipped.whole.file} IMAGE" in shipped.whole.text()


def test_float16_is_held_against_float32(shipped):
    of = shipped.half.fp16
    assert all(ms > 0 for ms in shipped.half.latency_ms.values())
    assert re.search(
        r"onnxruntime takes \S+ ms for one image and \S+ ms for 32 images at once, on \d", shipped.half.text()
    )
    assert shipped.half.file.endswith("onnx/model-fp16.onnx")
    assert shipped.half.bytes < shipped.whole.bytes
    assert shipped.half.metadata == shipped.whole.metadata | {"precision": "float16"}
    x = run._random(shipped.loaded)
    whole, half = (
        onnx.logits(onnx.session(Path(r.file).read_bytes()), x.numpy()) for r in (shipped.whole, shipped.half)
    )
    with torch.no_grad():
        rounded = copy.deepcopy(shipped.loaded.model).half()(x.half()).float().numpy()
    assert of["n_images"] == len(x) == 256
    assert of["images"] == "random inputs"
    apart = [np.abs(whole - found).max() / np.abs(whole).max() for found in (half, rounded)]
    assert of["largest_difference"] == pytest.approx(max(apart), rel=0.5), "as torch has it in float16"
    assert 1e-6 < of["largest_difference"] < 1e-2, "it is float16, and near"
    assert of["same_answers"] == ((whole.argmax(1) == half.argmax(1)) & (whole.argmax(1) == rounded.argmax(1))).mean()
    assert of["low"] < of["same_answers"] < of["high"] + 1e-9
    assert alone(shipped.half.infer, shipped.half.file).returncode == 0


def test_numbers_that_float16_does_not_hold_are_refused(shipped):
    import onnx as library
    from onnx import numpy_helper

    proto = library.load_from_string(Path(shipped.whole.file).read_bytes())
    for weight in proto.graph.initializer:
        if weight.data_type == library.TensorProto.FLOAT:
            grown = numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(300), weight.name)
            weight.CopyFrom(grown)
    whole = proto.SerializeToString()
    x = run._random(shipped.loaded)
    assert np.isfinite(onnx.logits(onnx.session(onnx.half(whole)), x.numpy())).all(), "no CPU would show it"
    with pytest.raises(ModelError, match=r"numbers above 65,504, which float16 does not hold"):
        run.agree(whole, onnx.half(whole), x.split(100))


def test_float16_on_images_of_data(shipped, monkeypatch):
    """Their names are those of the data, whose test images are counted."""
    whole = Path(shipped.whole.file).read_bytes()
    monkeypatch.setattr(models, "onnx_file", lambda loaded, about: whole)
    made = sukashi.export(
        shipped.folder, data="digits", test_images=50, fp16=True, file=shipped.folder / "x" / "y.onnx"
    )
    assert (made.fp16["n_images"], made.fp16["images"]) == (50, "test images of digits")
    assert {path.name for path in (shipped.folder / "x").iterdir()} == {"y.onnx", "infer.py"}


def test_what_can_not_be_written_is_refused_before_anything_is_loaded(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(UsageError, match=r"model\.onnx exists: nothing is overwritten"):
        sukashi.export(shipped.folder)
    with pytest.raises(UsageError, match=r"sukashi:digits_cnn is no folder .* `file='FILE\.onnx'`"):
        sukashi.export("sukashi:digits_cnn")
    with pytest.raises(UsageError, match="`label` is about data, and none are given"):
        sukashi.export(shipped.folder, label="x", file=tmp_path / "x.onnx")
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None if "transformers" in name else True)
    with pytest.raises(UsageError, match=r"needs onnxruntime\.transformers: pip install 'sukashi\[onnx\]'"):
        sukashi.export(shipped.folder, fp16=True, file=tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_another_script_is_not_overwritten(shipped, tmp_path):
    (tmp_path / "infer.py").write_text("mine")
    with pytest.raises(UsageError, match=r"infer\.py is another file"):
        sukashi.export(shipped.folder, file=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["infer.py"]


def test_what_is_no_classifier_of_images_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "dense_answers.py").write_text(
        "from sukashi import Preprocess\nfrom torch import nn\n"
        "def net():\n    made = nn.Conv2d(3, 5, 1)\n"
        "    made.preprocess = Preprocess(8, 8, 3, (0.,) * 3, (1.,) * 3)\n    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"dense_answers:net"):
        sukashi.export("dense_answers:net", file=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_what_one_who_runs_it_should_know(shipped, tmp_path, monkeypatch):
    content = Path(shipped.whole.file).read_bytes()
    monkeypatch.setattr(models, "onnx_file", lambda loaded, about: content)
    assert shipped.whole.notes == []
    random = sukashi.export("sukashi:digits_cnn", file=tmp_path / "random.onnx")
    assert ["has random weights" in note for note in random.notes] == [True]
    models.save(tmp_path / "held", shipped.loaded, provenance={"data": {"spec": "memory:0123"}})
    held = sukashi.export(tmp_path / "held")
    assert ["nobody knows how these were made of images" in note for note in held.notes] == [True]
    assert onnx.infer_script(Preprocess(8, 8, 4, (0.0,) * 4, (1.0,) * 4)) is None


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder '.*nowhere': give a saved network's"):
        sukashi.export(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="is no folder that a file could lie in"):
        sukashi.export("sukashi:digits_cnn")


def test_what_infer_cannot_read_is_one_line(shipped, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    infer, file = shipped.whole.infer, shipped.whole.file
    for arguments, words in [
        ((), "python infer.py MODEL.onnx IMAGE"),
        ((file, str(tmp_path / "none.png")), "none.png can't be read as an image: No such file or directory"),
        ((file, str(tmp_path / "text.png")), "text.png can't be read as an image: cannot identify"),
        ((str(tmp_path / "none.onnx"), "a.png"), "none.onnx can't be run: "),
        ((str(tmp_path / "text.png"), "a.png"), "text.png can't be run: "),
    ]:
        done = alone(infer, *arguments)
        assert done.returncode == 1
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
