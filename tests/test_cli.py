"""The command line as a user meets it: exit codes, one sentence on stderr, JSON on stdout, nothing half-written."""

import errno
import importlib.metadata
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from sukashi import models
from sukashi.cli import console, main
from sukashi.core import progress
from sukashi.core.errors import ResourceError, UsageError
from sukashi.core.files import FORMAT
from sukashi.experiments import demo
from sukashi.experiments.bench import Source
from sukashi.experiments.functions import compare
from sukashi.report import waiting

NET = "sukashi:digits_cnn"
DIGITS = [NET, "--width", "8", "--data", "digits", "--calibration", "4"]
SMALL = ["--seeds", "1", "--ratios", "0,0.5", "--test-images", "60"]

# Networks a user might bring, by import path.
ZOO = """
import torch
from torch import nn
from sukashi.core.types import Preprocess


class Net(nn.Module):
    def __init__(self, n_classes=10, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.preprocess = kind, Preprocess(8, 8, 1, (0.0,), (1.0,))
        self.a, self.norm, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, n_classes)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        z = self.b(x.mean((2, 3)))
        match self.kind:
            case "pair":
                return z, x
            case "named":
                return {"logits": z, "map": x}
            case "nan":
                return z / (z - z)
            case "noisy":
                return z + torch.randn_like(z)
            case "counting":
                self.norm.num_batches_tracked += 1
        return z


def plain(): return Net()
def five(): return Net(5)
def two(): return Net(2)
def training(): return Net().train()
def pair(): return Net(kind="pair")
def named(): return Net(kind="named")
def nan(): return Net(kind="nan")
def noisy(): return Net(kind="noisy")
def counting(): return Net(kind="counting")
def number(): return 3
def raising(): raise KeyError("gone")
def mute():
    net = Net()
    del net.preprocess
    return net
"""


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """No line on stderr about work that takes long here: a slow machine is no fault."""
    monkeypatch.setattr(waiting, "FIRST_LINE", math.inf)


@pytest.fixture
def sukashi(monkeypatch, capsys):
    """Runs a command line in this process: its exit code, stdout and stderr."""

    def run(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sukashi", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return run


@pytest.fixture
def refused(sukashi, tmp_path):
    """Runs what must be refused: one sentence on stderr that holds `words`, nothing on stdout, nothing written."""

    def run(code, words, *args):
        before = sorted(tmp_path.rglob("*"))
        found = sukashi(*args)
        lines = [line for line in found.err.splitlines() if not line.startswith("sukashi: warning: ")]
        assert (found.code, found.out, len(lines)) == (code, "", 1), found
        assert lines[0].startswith("sukashi: ")
        for word in words:
            assert word in lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def idle(monkeypatch):
    """Fails where data are loaded or a model is built."""
    for name in ("sukashi.data.load", "sukashi.models.load"):
        monkeypatch.setattr(name, lambda *args, name=name, **options: pytest.fail(f"{name} was called"))


@pytest.fixture(autouse=True)
def zoo(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "zoo"
    folder.mkdir(exist_ok=True)
    (folder / "zoo.py").write_text(ZOO)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, trained_cnn):
    path = tmp_path_factory.mktemp("weights") / "cnn.safetensors"
    safetensors.torch.save_file(trained_cnn.model.state_dict(), path)
    return path


def image_folder(root, classes=("ant", "bee"), n=6):
    """Grey noise, 8 x 8, n images a class, without splits."""
    draw = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def strict(text):
    """The one JSON object on stdout; NaN and Infinity are no JSON."""
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def contents(folder):
    """Every file's bytes but those a clock decides."""
    clocks = {"log.jsonl", "report.html", "costs.csv", "costs.tex"}
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in clocks}


# Help.


def test_help_does_not_wait_for_torch():
    heavy = ("torch", "numpy", "timm", "matplotlib")
    code = f"import sys, sukashi.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_names_every_command(sukashi, args):
    found = sukashi(*args)
    assert (found.code, found.err) == (0, "")
    for command in ("demo", "list", "check", "prune", "train", "finetune", "compare", "study", "report"):
        assert f"  {command} " in found.out


def test_version(sukashi):
    found = sukashi("--version")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"sukashi {importlib.metadata.version('sukashi')}\n"


# Refusals: usage.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["prnue"], ["prnue", "'prune'", "--help"]),
        (["prune"], ["Missing argument", "sukashi prune --help"]),
        (["list"], ["say what to list: criteria, attributions, measures, repairs, schedules, models or data"]),
        (["list", "foo"], ["'foo'", "criteria, attributions, measures, repairs, schedules, models, data"]),
        (["list", "criterai"], ["did you mean 'criteria'?"]),
        (["compare", "--ratoi", "0.5"], ["--ratoi", "--ratios"]),
        (["report", "nowhere"], ["nowhere holds no experiment", "give the --out of an experiment"]),
        (["check", "nope", "--data", "digits"], ["unknown model 'nope'", "sukashi:digits_cnn"]),
        (["check", "sukashi:digits_cn", "--data", "digits"], ["did you mean 'sukashi:digits_cnn'?"]),
        (["check", "timm:resnet81", "--data", "digits"], ["did you mean 'timm:resnet18'?"]),
        (["check", "zoo:lion", "--data", "digits"], ["zoo:lion", "no attribute 'lion'"]),
        (["check", "nozoo:lion", "--data", "digits"], ["No module named 'nozoo'", "PYTHONPATH"]),
        (["check", NET, "--data", "digit"], ["unknown data 'digit'", "did you mean 'digits'?"]),
        (["check", NET, "--data", "shapes:siez=32"], ["'siez'", "did you mean 'size'?"]),
        (["check", NET, "--data", "digits", "--pretrained"], ["no pretrained weights"]),
        (["check", NET, "--data", "digits", "--calibration", "0"], ["calibration must be at least 1, got 0"]),
        (["check", NET, "--data", "digits", "--width", "0"], ["width must be at least 1, got 0"]),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_usage(refused, args, words):
    refused(2, words, *args)


@pytest.mark.parametrize(
    ("code", "args", "words"),
    [
        (2, ["--criteria", "cswp"], ["unknown criterion 'cswp'", "did you mean 'cswap'?"]),
        (2, ["--criteria", ""], ["criteria must be", "drift", "got []"]),
        (2, ["--criteria", "random,random"], ["criteria must be different names", "['random', 'random']"]),
        (2, ["--ratios", "0,1"], ["ratio must be in [0, 1), got 1.0", "REMOVED"]),
        (2, ["--ratios", "0:1:0.1"], ["ratio must be in [0, 1), got 1.0"]),
        (2, ["--ratios", "50"], ["got 50.0"]),
        (2, ["--ratios", "-0.1"], ["got -0.1"]),
        (2, ["--ratios", "nan"], ["got nan"]),
        (2, ["--ratios", "half"], ["'half'", "0:0.95:0.05"]),
        (2, ["--ratios", ""], ["got ''"]),
        (2, ["--ratios", "0:0.9"], ["START:STOP:STEP", "'0:0.9'"]),
        (2, ["--ratios", "0:0.9:nan"], ["STEP >= 0.001", "'0:0.9:nan'"]),
        (2, ["--ratios", "0:0.9:1e-9"], ["STEP >= 0.001"]),
        (2, ["--ratios", "0:inf:0.1"], ["got inf"]),
        (2, ["--ratios", "0.9:0:0.1"], ["STOP >= START"]),
        (2, ["--seeds", "0"], ["seeds must be at least 1, got 0"]),
        (2, ["--seeds", "many"], ["--seeds", "valid integer"]),
        (2, ["--calibration", "0"], ["calibration must be at least 1, got 0"]),
        (3, ["--calibration", "500"], ["class '0' has 142 images", "needs 500", "--calibration 139"]),
        (2, ["--test-images", "9"], ["--test-images must be at least 10", "got 9"]),
        (2, ["--workers", "-1"], ["workers must be at least 0, got -1"]),
        (2, ["--device", "gpu"], ["device must be auto, cpu or cuda, got 'gpu'"]),
        (2, ["--max-pixels", "0"], ["--max-pixels must be in [1, ", "got 0"]),
        (2, ["--sampling", "cluster"], ["unknown sampling 'cluster'", "did you mean 'clustering'?"]),
        (2, ["--sampling", "random,random"], ["sampling must be different names"]),
        (2, ["--mode", "mask"], ["mode must be cut or zero, got 'mask'"]),
        (2, ["--margin", "0"], ["margin must be in (0, 1), got 0.0"]),
        (2, ["--margin", "5"], ["margin must be in (0, 1), got 5.0"]),
        (2, ["--set", "cswap.alhpa=0.1"], ["no option 'alhpa'", "did you mean 'alpha'?"]),
        (2, ["--set", "cswap.alpha=high"], ["alpha of cswap must be a valid number, got 'high'", "0.05"]),
        (2, ["--set", "cswap.alpha=NaN"], ["alpha of cswap must be a finite number, got nan"]),
        (2, ["--set", "cswap.baseline=orginal"], ["'original' or 'current', got 'orginal'"]),
        (2, ["--set", "cswap.budget=1.5"], ["budget of cswap must be a valid integer, got 1.5"]),
        (2, ["--set", "cswap.scoring=loss"], ["scoring of cswap must be callable, got 'loss'"]),
        (2, ["--set", "random.alpha=1"], ["random has no option 'alpha': Known: none"]),
        (2, ["--set", "drift.share=0.1"], ["'drift'", "not among random, cswap"]),
        (2, ["--set", "alpha=0.1"], ["with several methods give METHOD.NAME=VALUE"]),
        (2, ["--set", "cswap.alpha"], ["NAME=VALUE", "'cswap.alpha'"]),
        (2, ["--class-map", "nowhere.json"], ["nowhere.json", "--class-map"]),
        (4, ["--classes", "3"], ["the model has 3 classes and the data 10"]),
        (4, ["--weights", "nowhere.safetensors"], ["nowhere.safetensors", "No such file"]),
        (4, ["--weights", __file__], ["a file of safetensors or of torch.save, and this is neither"]),
        (4, ["--output", "logits"], ["no output 'logits' to select"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else str(value),
)
def test_a_comparison_that_cannot_be_right(refused, tmp_path, code, args, words):
    refused(code, words, "compare", *DIGITS, *SMALL, "--criteria", "random,cswap", "--out", tmp_path / "out", *args)


@pytest.mark.parametrize(
    ("code", "args", "words"),
    [
        (2, ["--ratio", "1"], ["ratio must be in [0, 1), got 1.0"]),
        (2, ["--ratio", "50%"], ["--ratio", "valid number", "; 50% is 0.5"]),
        (2, ["--ratio", "half"], ["--ratio", "valid number"]),
        (2, ["--mode", "zero", "--round-to", "8"], ["--round-to is for widths", "leave it out"]),
        (2, ["--mode", "null"], ["mode must be cut or zero, got 'null'"]),
        (2, ["--sampling", "confident"], ["unknown sampling 'confident'", "did you mean 'confidence'?"]),
        (2, ["--round-to", "0"], ["--round-to must be at least 1, got 0"]),
        (2, ["--criterion", "drfit"], ["did you mean 'drift'?"]),
        (2, ["--set", "cswap.alpha=0.1"], ["'cswap'", "not among random"]),
        (2, ["--criterion", "wanda"], ["wanda scores sites of kind weight, not 'channel'", "--scope row"]),
        (2, ["--criterion", "taylor", "--scope", "row"], ["taylor scores", "not 'weight'", "without --scope"]),
        (2, ["--scope", "rows"], ["scope must be global, layer, row or N:M", "got 'rows'"]),
        (2, ["--scope", "2:4", "--ratio", "0.6"], ["keeps 2 of every 4 weights: give --ratio 0.5, got 0.6"]),
        (2, ["--scope", "row", "--mode", "zero"], ["--mode zero is for units, and --scope row removes single weights"]),
        (2, ["--scope", "row", "--round-to", "1"], ["--round-to is for units, and --scope row removes single weights"]),
        (2, ["--scope", "row", "--sequential"], ["random looks at no image", "leave --sequential out"]),
        (2, ["--criterion", "wanda", "--scope", "global", "--sequential"], ["scope global compares all layers"]),
        (2, ["--sequential"], ["--sequential is for single weights: give a --scope too"]),
        (5, ["--out", f"{__file__}/out"], [f"cannot write {__file__}/out", "another place"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else str(value),
)
def test_a_cut_that_cannot_be_right_is_refused_before_work(refused, idle, tmp_path, code, args, words):
    refused(code, words, "prune", *DIGITS, "--criterion", "random", "--ratio", 0.5, "--out", tmp_path / "out", *args)


def test_too_few_images_are_refused(refused):
    refused(3, ["needs 500 of every class"], "check", *DIGITS, "--calibration", 500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(refused, idle):
    refused(5, ["device cuda", "leave --device out"], "check", *DIGITS, "--device", "cuda")


def test_an_extra_that_is_missing_is_missed_before_work(refused, idle, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["ONNX export needs onnx", "pip install 'sukashi[onnx]'"]
    args = ["prune", *DIGITS, "--criterion", "random", "--ratio", 0.5, "--out", tmp_path / "out", "--onnx"]
    refused(2, words, *args)


def test_an_option_that_cannot_be_kept_is_refused_from_python(tmp_path):
    with pytest.raises(UsageError, match=r"options of cswap .* must be JSON"):
        compare(NET, "digits", ["cswap"], options={"cswap": {"scoring": min}}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Refusals: models and weights.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("five", ["the model has 5 classes and the data 10"]),
        ("pair", ["gives a tuple", "'0' (2, 10)", "'1' (2, 8, 8, 8)"]),
        ("named", ["gives a dict", "'logits' (2, 10)", "'map' (2, 8, 8, 8)"]),
        ("nan", ["gives NaN or Inf"]),
        ("noisy", ["other logits in a second pass"]),
        ("counting", ["changes its buffer 'norm.num_batches_tracked'"]),
        ("number", ["returned a int"]),
        ("raising", ["could not be built", "KeyError: 'gone'"]),
        ("mute", ["give --size, --mean and --std", "preprocess = Preprocess("]),
    ],
)
def test_a_network_that_cannot_be_used(refused, name, words):
    refused(4, words, "check", f"zoo:{name}", "--data", "digits")


@pytest.mark.parametrize(("name", "output"), [("pair", "0"), ("named", "logits")])
def test_output_selects_the_logits(sukashi, refused, tmp_path, name, output):
    cut = tmp_path / "cut"
    data = ["--data", "digits", "--calibration", 4]
    args = ["--criterion", "magnitude", "--ratio", 0.5, "--round-to", 1, "--output", output, "--out", cut]
    figures = strict(sukashi("prune", f"zoo:{name}", *data, *args, "--json").out)
    assert figures["units_removed"] == 0.5
    assert sukashi("check", f"zoo:{name}", *data, "--weights", cut).code == 0
    refused(4, ["no output 'x'", repr(output)], "check", f"zoo:{name}", *data, "--output", "x")


def test_a_network_in_training_mode_is_used_in_eval_mode(sukashi):
    args = ["--data", "digits", "--calibration", 4, "--limit", 0, "--json"]
    training, plain = sukashi("check", "zoo:training", *args), sukashi("check", "zoo:plain", *args)
    assert {**strict(training.out), "model": ""} == {**strict(plain.out), "model": ""}


def test_weights_that_cannot_be_used(refused, tmp_path, weights):
    state = safetensors.torch.load_file(weights)
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["conv3.weight"][0, 0, 0, 0] = torch.nan
    safetensors.torch.save_file(broken, tmp_path / "nan.safetensors")
    whole = weights.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "liar.safetensors").write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    safetensors.torch.save_file({"conv1.weight": state["conv1.weight"]}, tmp_path / "few.safetensors")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "exploded")}))
    for name, words in {
        "nan.safetensors": ["'conv3.weight' holds NaN"],
        "half.safetensors": ["half.safetensors is no intact safetensors file"],
        "liar.safetensors": ["liar.safetensors is no intact safetensors file"],
        "few.safetensors": ["18 missing: bn1.weight"],
        "bomb.pt": ["bomb.pt was refused", "nothing in it was run"],
    }.items():
        args = ["--criterion", "random", "--ratio", 0.5, "--out", tmp_path / "cut", "--weights", tmp_path / name]
        refused(4, words, "prune", NET, "--data", "digits", *args)
    refused(4, ["do not fit the model", "of another shape: conv1.weight"], "check", *DIGITS, "--weights", weights)


def test_a_folder_whose_weights_were_changed(sukashi, refused, tmp_path):
    cut = tmp_path / "cut"
    assert sukashi("prune", *DIGITS, "--criterion", "random", "--ratio", 0.5, "--out", cut).code == 0
    content = bytearray((cut / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (cut / "model.safetensors").write_bytes(content)
    refused(4, ["SHA-256", "first tensor at fault: fc2.weight"], "check", cut, "--data", "digits")


# Refusals: data.


def truncate(folder):
    Image.new("L", (64, 64)).save(folder / "ant" / "0.jpg")
    (folder / "ant" / "0.png").unlink()
    path = folder / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-20])


def empty_file(folder):
    (folder / "bee" / "1.png").write_bytes(b"")


def text(folder):
    (folder / "bee" / "2.png").write_text("no image")


@pytest.mark.parametrize(
    ("harm", "name"),
    [(truncate, "ant/0.jpg"), (empty_file, "bee/1.png"), (text, "bee/2.png")],
    ids=["truncated", "empty", "text"],
)
def test_an_unreadable_image_is_named_or_left_out_and_counted(sukashi, refused, tmp_path, harm, name):
    harm(image_folder(tmp_path / "data"))
    args = ["check", "zoo:two", "--data", tmp_path / "data", "--calibration", 2]
    refused(3, [name, "leave them out with --skip-bad:"], *args)
    found = strict(sukashi(*args, "--skip-bad", "--json").out)
    assert sum(map(sum, found["class_counts"].values())) == 11
    assert any("1 unreadable image(s)" in note for note in found["warnings"])


@pytest.mark.parametrize(
    ("classes", "n", "args", "words"),
    [
        (("ant", "bee"), 1, [], ["class 'ant' has one image", "add images"]),
        (("ant", "bee"), 6, ["--calibration", 9], ["class 'ant' has 5 images", "needs 9", "--calibration 5"]),
        (("ant", "bee"), 6, ["--max-pixels", 63], ["8 x 8 pixels", "which --max-pixels sets"]),
        (("ant", "bee"), 0, [], ["data holds no images"]),
        ((), 0, [], ["neither Parquet files nor class folders"]),
    ],
)
def test_data_that_breaks_a_rule(refused, tmp_path, classes, n, args, words):
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data", classes, n)
    refused(3, words, "check", "zoo:two", "--data", tmp_path / "data", "--calibration", 2, *args)


def test_an_empty_class_is_never_renumbered(refused, tmp_path):
    for split in ("train", "test"):
        image_folder(tmp_path / "data" / split, ("ant", "bee"))
    shutil.rmtree(tmp_path / "data" / "test" / "ant")
    refused(3, ["no folder for ant"], "check", "zoo:two", "--data", tmp_path / "data", "--calibration", 2)
    (tmp_path / "data" / "test" / "ant").mkdir()
    refused(3, ["no image of 'ant'"], "check", "zoo:two", "--data", tmp_path / "data", "--calibration", 2)


def test_every_conversion_is_noted(sukashi, tmp_path):
    data = image_folder(tmp_path / "data")
    Image.new("CMYK", (8, 8)).save(data / "ant" / "cmyk.jpg")
    Image.new("RGBA", (8, 8)).save(data / "ant" / "rgba.png")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(data / "bee" / "deep.png")
    found = sukashi("check", "zoo:two", "--data", data, "--calibration", 2, "--limit", 0)
    assert found.code == 0
    for rule in ("CMYK", "transparent", "16-bit"):
        assert any(line.startswith("note: ") and rule in line for line in found.out.splitlines()), rule


def test_classes_in_another_order_need_a_map(sukashi, refused, tmp_path):
    ours, theirs = image_folder(tmp_path / "ours"), image_folder(tmp_path / "theirs", ("bee", "cat"))
    cut = tmp_path / "cut"
    args = ["--calibration", 2, "--criterion", "random", "--ratio", 0.5, "--round-to", 1, "--out", cut]
    assert sukashi("prune", NET, "--data", ours, *args).code == 0
    check = ["check", cut, "--calibration", 2, "--limit", 0, "--data"]
    assert sukashi(*check, ours).code == 0
    refused(3, ["class 'bee' is number 1 of the model and 0 of the data", "give a --class-map"], *check, theirs)
    numbers = tmp_path / "map.json"
    for content, code, word in [
        ('{"bee": 1, "dog": 0}', 3, "--class-map has 'dog', which is no class of the data"),
        ('{"bee": 1}', 3, "--class-map must give each of bee, cat"),
        ('{"bee": "1"}', 2, '{"cat": 0, "dog": 1}'),
        ("bee", 2, '{"cat": 0, "dog": 1}'),
    ]:
        numbers.write_text(content)
        refused(code, [word], *check, theirs, "--class-map", numbers)
    numbers.write_text('{"bee": 1, "cat": 0}')
    assert strict(sukashi(*check, theirs, "--class-map", numbers, "--json").out)["class_names"] == ["cat", "bee"]
    numbers.write_text('{"bee": 0, "cat": 1}')
    assert sukashi(*check, theirs, "--class-map", numbers).code == 0, "a map is the last word on what names mean"


def test_masks_instead_of_classes(refused, monkeypatch, digits_split):
    masks = SimpleNamespace(train=SimpleNamespace(has_masks=True))
    monkeypatch.setattr("sukashi.data.load", lambda spec, **options: masks)
    refused(3, ["map of classes", "one class an image"], "check", NET, "--data", "digits")


# Folders and disks.


def test_folders_that_exist_are_left_as_they_are(sukashi, refused, tmp_path):
    cut, out, foreign = tmp_path / "cut", tmp_path / "out", tmp_path / "foreign"
    prune = ["prune", *DIGITS, "--criterion", "random", "--ratio", 0.5, "--out"]
    compare = ["compare", *DIGITS, *SMALL, "--criteria", "random", "--out"]
    assert sukashi(*prune, cut).code == sukashi(*compare, out).code == 0
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(2, ["cut is an existing output folder", "ratio_asked was 0.5, now 0.25"], *prune, cut, "--ratio", 0.25)
    refused(2, ["cut is an existing output folder of another experiment (prune, now compare)"], *compare, cut)
    refused(2, ["out is an existing output folder", "mode was", "now"], *compare, out, "--mode", "zero")
    refused(2, ["data.calibration was 4, now 3"], *compare, out, "--calibration", 3)
    for command in (prune, compare):
        refused(2, ["foreign is not empty (thesis.txt)"], *command, foreign)
        refused(2, ["thesis.txt is a file"], *command, foreign / "thesis.txt")
    refused(2, ["foreign holds no experiment", "give the --out of an experiment"], "report", foreign)
    assert {path: path.read_bytes() for path in before} == before
    assert "was finished already: nothing was done" in sukashi(*prune, cut).out
    after = {path: path.read_bytes() for path in before}
    assert {path.name for path in before if after[path] != before[path]} <= {
        *("log.jsonl", "report.html", "costs.csv", "costs.tex")
    }


def test_a_comparison_refused_in_its_first_trial_leaves_nothing(sukashi, refused, tmp_path):
    compare = ["compare", *DIGITS, *SMALL, "--calibration", 1, "--out", tmp_path / "out"]
    too_few = ["a t-test needs 2"]
    refused(3, too_few, *compare, "--criteria", "cswap", "--set", "samples=all")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.tmp").write_text("mine")
    refused(3, too_few, *compare, "--criteria", "cswap", "--set", "samples=all")
    assert sukashi(*compare, "--criteria", "random,cswap", "--set", "cswap.samples=all").code == 3
    assert len(list((tmp_path / "out" / "trials").glob("*/trial.json"))) == 1, "what is finished is kept"


@pytest.mark.slow
def test_a_second_process_waits_for_what_another_one_does(sukashi, tmp_path):
    """A trial is leased to one process; where that dies, the other does it."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    compare = ["compare", *DIGITS, *SMALL, "--criteria", "random", "--out"]
    assert sukashi(*compare, undisturbed).code == 0
    ((key, _),) = json.loads((undisturbed / "experiment.json").read_text())["trials"]
    (out / ".leases").mkdir(parents=True)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(600)", str(out / ".leases" / key)], stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout.readline() == b"held\n"
        rival = subprocess.Popen(
            [sys.executable, "-m", "sukashi", *map(str, compare), str(out), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not (out / "log.jsonl").exists():
            assert rival.poll() is None, rival.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        assert rival.poll() is None
        assert not list(out.glob("trials/*/*")), "it does not begin"
        owner.kill()
    printed, said = rival.communicate(timeout=60)
    assert rival.returncode == 0, said
    assert strict(printed)["sauce"]
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_a_full_disk(sukashi, refused, tmp_path, monkeypatch, weights):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync(number, left=[0], really=os.fsync):  # noqa: B006
        left[0] -= 1
        if left[0] == 0:
            raise full
        really(number)

    def fill(n):
        fsync.__defaults__[0][0] = n

    monkeypatch.setattr(os, "fsync", fsync)
    args = [NET, "--data", "digits", "--calibration", "4", "--weights", weights]
    commands = {
        "prune": (["prune", *args, "--criterion", "random", "--ratio", 0.5, "--test-images", 60], (1, 3, 5, 7, 9)),
        "compare": (["compare", *args, *SMALL, "--criteria", "random,amp"], (1, 4, 8, 12)),
    }
    for name, (command, writes) in commands.items():
        out, undisturbed = tmp_path / name, tmp_path / f"{name} undisturbed"
        assert sukashi(*command, "--out", undisturbed).code == 0
        for n in writes:
            fill(n)
            found = sukashi(*command, "--out", out)
            assert (found.code, found.out) == (5, ""), n
            assert "no space left" in found.err
            assert len(found.err.splitlines()) == 1
        assert sukashi(*command, "--out", out).code == 0
        assert contents(out) == contents(undisturbed)


def test_a_cut_whose_page_cannot_be_written_is_kept(sukashi, tmp_path, monkeypatch):
    def write(folder, page, spelled):
        raise ResourceError("no space left; make room")

    args = ["prune", *DIGITS, "--test-images", 60, "--criterion", "random", "--ratio", 0.5, "--out", tmp_path / "cut"]
    with monkeypatch.context() as full:
        full.setattr("sukashi.report.page.write", write)
        found = sukashi(*args)
    assert (found.code, found.out) == (5, "")
    assert found.err.splitlines()[-1] == "sukashi: no space left; make room"
    assert not (tmp_path / "cut" / "report.html").exists()
    monkeypatch.setattr("sukashi.criteria.pruning.cut", lambda *args: pytest.fail("it was cut already"))
    assert "was finished already" in sukashi(*args).out
    assert (tmp_path / "cut" / "report.html").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "secret.png"), ["secret.png: Permission denied"]),
        (MemoryError(), ["out of memory", "--calibration"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB"), ["out of memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["out of memory"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_machine_lacks(refused, monkeypatch, error, words):
    def load(*args, **options):
        raise error

    monkeypatch.setattr("sukashi.data.load", load)
    refused(5, words, "check", *DIGITS)


def test_our_own_mistakes_keep_their_traceback(sukashi, monkeypatch):
    def load(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sukashi.data.load", load)
    with pytest.raises(RuntimeError, match="a bug"):
        sukashi("check", *DIGITS)


# Interruptions.


# The command line, waiting after each decision it has written down so that a signal finds it at work.
SLOWLY = """
import time
from sukashi.cli import console, main
from sukashi.core import files

write = files.Journal.__setitem__
files.Journal.__setitem__ = lambda *args: (write(*args), time.sleep(0.3))
main.main()
"""


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(sukashi, tmp_path, weights):
    args = ["compare", NET, "--data", "digits", "--weights", str(weights), "--calibration", "4", *SMALL]
    args += ["--criteria", "random,drift", "--json", "--out"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *args, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs, and what they start, are born deaf to Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (list(out.glob("trials/*/trial.json")) and list(out.glob("trials/*/under_way/journal.jsonl"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said.splitlines()[-1].startswith("sukashi: interrupted; give the same command again")
    assert "Traceback" not in said
    assert len(list(out.glob("trials/*/trial.json"))) == 1
    assert sukashi(*args, out).code == sukashi(*args, tmp_path / "undisturbed").code == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["sukashi.criteria.pruning.cut", "sukashi.models.contents", "sukashi.report.page.write"]
)
def test_an_interrupted_cut_goes_on(sukashi, tmp_path, monkeypatch, stage):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    args = ["prune", *DIGITS, "--test-images", 60, "--criterion", "random", "--ratio", 0.5, "--out"]
    with monkeypatch.context() as stopped:
        stopped.setattr(stage, interrupted)
        found = sukashi(*args, tmp_path / "cut")
    assert (found.code, found.out) == (130, "")
    assert "sukashi: interrupted; give the same command again" in found.err
    assert not (tmp_path / "cut" / "results.json").exists()
    assert sukashi(*args, tmp_path / "cut").code == sukashi(*args, tmp_path / "undisturbed").code == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "undisturbed")


# What comes out.


@pytest.mark.parametrize("what", ["criteria", "attributions", "models", "data", "measures"])
def test_lists(sukashi, what):
    rows = strict(sukashi("list", what, "--json").out)[what]
    assert rows
    shown = sukashi("list", what).out
    assert all(row["name"] in shown for row in rows)


def test_list_tells_all_about_one_method(sukashi, refused):
    found = strict(sukashi("list", "criteria", "lrp", "--json").out)
    assert found["options"]["normalise"] == "none"
    shown = sukashi("list", "criteria", "lrp").out
    assert "--set lrp.normalise=none\n" in shown
    assert found["documentation"] in shown
    # What would be JSON is quoted for the shell and for JSON.
    assert """--set saliency.classes='"true"'\n""" in sukashi("list", "criteria", "saliency").out
    refused(2, ["unknown criterion 'lpr'", "did you mean 'lrp'?"], "list", "criteria", "lpr")
    refused(2, ["models have no options"], "list", "models", "sukashi:digits_cnn")


def test_check(sukashi):
    found = strict(sukashi("check", *DIGITS, "--json").out)
    assert found["units"] == sum(site["units"] for site in found["sites"]) == 32
    assert "output" in found["refused"]["fc2"]
    assert sum(found["class_counts"]["train"]) == 1438
    criteria = strict(sukashi("list", "criteria", "--json").out)["criteria"]
    assert set(found["estimated_seconds"]) == {row["name"] for row in criteria}
    shown = sukashi("check", *DIGITS, "--limit", 0)
    assert "3 sites, 32 units" in shown.out
    assert shown.out.count("fc2: ") == 1
    assert "not cut: fc2: " in shown.out
    assert "cswap: not estimated within 0 s" in shown.out


def test_compare_and_report(sukashi, tmp_path, weights):
    args = ["compare", NET, "--data", "digits", "--weights", weights, "--calibration", 4, "--test-images", 60]
    args += ["--ratios", "0:0.5:0.25", "--seeds", 2, "--criteria", "random,amp", "--set", "amp.tau=0.05"]
    args += ["--out", tmp_path / "out"]
    found = sukashi(*args, "--json")
    result = strict(found.out)
    assert (found.code, found.err) == (0, "")
    assert set(result["sauce"]) == {"random", "amp"}
    assert list(result["sauce"]) == result["contenders"]
    assert result["sauce"][result["contenders"][0]]["mean"] >= result["sauce"][result["contenders"][1]]["mean"]
    assert all(s["low"] <= s["mean"] <= s["high"] for s in result["sauce"].values())
    assert [len(curve) for curve in result["curves"]["random"]] == [3, 3]
    assert result["dense_accuracy"] == result["curves"]["amp"][0][0]["accuracy"] > 0.9
    about = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert (about["format"], about["kind"]) == (FORMAT, "compare")
    assert about["identity"]["options"] == {"amp": {"tau": 0.05}, "random": {}}
    assert about["identity"]["ratios"] == [0.0, 0.25, 0.5]

    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines() if line]
    timed = [entry for entry in log if entry["event"] == "latency"]
    assert sorted((entry["contender"], entry["seed"]) for entry in timed) == [
        *(("amp", 0), ("amp", 1)),
        *(("random", 0), ("random", 1)),
    ]
    assert all(min(entry["dense_ms"]) > 0 and len(entry["dense_ms"]) == len(entry["cut_ms"]) for entry in timed)
    assert {place for _, place in about["trials"]} == {f"trials/{path.name}" for path in tmp_path.glob("out/trials/*")}

    before = contents(tmp_path / "out")
    shown = sukashi(*args)
    assert shown.code == 0
    assert f"dense accuracy {result['dense_accuracy']:.1%}" in shown.out
    assert shown.out.endswith(f"Report: {tmp_path / 'out' / 'report.html'}\n")
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "out" / "log.jsonl").read_text().count('"event":"latency"') == len(timed) == 4, "timed once"

    page = tmp_path / "out" / "report.html"
    assert "latency, ms" in page.read_text()
    page.unlink()
    assert strict(sukashi("report", tmp_path / "out", "--json").out) == result
    assert page.exists()


def test_samplings_mode_and_margin(sukashi, tmp_path, weights):
    args = ["compare", NET, "--data", "digits", "--weights", weights, "--calibration", 4, "--test-images", 150]
    args += ["--ratios", "0,0.02,0.5", "--seeds", 1, "--criteria", "taylor", "--sampling", "random,confidence"]
    args += ["--mode", "zero", "--margin", "0.1", "--out", tmp_path / "out"]
    result = strict(sukashi(*args, "--json").out)
    assert set(result["sauce"]) == {"taylor", "taylor/confidence"}
    free = result["lossless"]["taylor/confidence"]
    assert (result["margin"], free["ratio_asked"]) == (0.1, 0.02)
    assert free["removed"] == 3 / 128, "of 128 units"
    assert (free["units_removed"], free["parameters_removed"]) == (free["removed"], None)
    assert list(result["accuracy_at"]["taylor"]) == ["0.15", "0.3", "0.5", "0.7"]
    assert result["accuracy_at"]["taylor"]["0.7"] is None
    shown = sukashi(*args)
    assert "ratio, at most 10 points lower" in shown.out
    assert "2.3%" in shown.out
    page = sukashi("report", tmp_path / "out", "--margin", "0.02")
    assert page.code == 0
    assert "at most 2 points lower" in " ".join((tmp_path / "out" / "report.html").read_text().split())
    few = sukashi(*args[:-2], "--margin", 0.001, "--out", tmp_path / "few")
    assert "can't be said with 150 test images: 5,019 could show that accuracy is at most 0.1 points lower" in few.out


def test_a_study_file(sukashi, refused, tmp_path):
    file = tmp_path / "study.toml"
    file.write_text(
        'out = "out"\ndata = "digits"\ncriteria = ["random", "taylor"]\nratios = [0.0, 0.8]\nseeds = 1\n'
        'calibration = 4\ntest_images = 60\nmargin = 0.3\npairs = [["taylor", "random"]]\n'
        '[models.cnn]\nspec = "sukashi:digits_cnn"\nwidth = 8\n'
    )
    result = strict(sukashi("study", file, "--json").out)
    assert result["experiments"]["cnn"]["kind"] == "compare"
    assert set(result["experiments"]["cnn"]["sauce"]) == {"random", "taylor"}
    shown = sukashi("study", file)
    assert shown.code == 0
    assert "cnn: taylor minus random: " in shown.out
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in shown.out
    log = (tmp_path / "out" / "cnn" / "log.jsonl").read_text()
    assert f"sukashi study {file}" in log
    refused(2, ["cannot read", "nowhere.toml"], "study", tmp_path / "nowhere.toml")
    file.write_text("criteria = 3")
    refused(2, ["study.toml", "has no 'data': add data = ", "or give --data"], "study", file)


def test_prune_says_what_came_of_the_ratio(sukashi, tmp_path, weights):
    args = ["prune", NET, "--data", "digits", "--weights", weights, "--calibration", 4, "--criterion", "magnitude"]
    found = strict(sukashi(*args, "--ratio", 0.99, "--round-to", 1, "--out", tmp_path / "most", "--json").out)
    assert found["units_removed"] == 125 / 128, "one unit of each of three sites stays"
    assert (found["ratio_asked"], found["weights_removed"]) == (0.99, None)
    assert found["pruned"]["parameters"] < found["dense"]["parameters"]
    assert found["parameters_removed"] == 1 - found["pruned"]["parameters"] / found["dense"]["parameters"]
    shown = sukashi(*args, "--ratio", 0.05, "--out", tmp_path / "rounded")
    assert (shown.code, shown.err) == (0, "")
    assert "5.0% were asked for: widths are rounded up to multiples of 8" in shown.out
    assert "latency, ms" in shown.out
    assert models.load(str(tmp_path / "most")).class_names == tuple("0123456789")


def test_prune_makes_sparse_and_says_that_nothing_gets_smaller(sukashi, refused, tmp_path, weights):
    args = ["prune", NET, "--data", "digits", "--weights", weights, "--calibration", 4, "--criterion", "wanda"]
    shown = sukashi(*args, "--ratio", 0.5, "--scope", "row", "--exclude", "fc2", "--out", tmp_path / "a")
    assert (shown.code, shown.err) == (0, "")
    for words in (
        "conv2",
        "zeros in the masked layers",
        "zeros in all parameters",
        "accuracy",
        "weights removed",
        "pruned",
    ):
        assert words in shown.out
    assert "Masked zeros are not compression" in " ".join(shown.out.split())
    assert "fc2" not in shown.out
    found = strict(sukashi(*args, "--ratio", 0.5, "--scope", "row", "--out", tmp_path / "b", "--json").out)
    assert {row["layer"] for row in found["layers"]} == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    assert found["pruned"]["parameters"] == found["dense"]["parameters"]
    assert models.load(str(tmp_path / "b")).mask.n_removed == sum(row["removed"] for row in found["layers"])
    refused(
        4,
        ["no convolution or linear layer 'fc3'", "'fc2'"],
        *args,
        "--ratio",
        0.5,
        "--scope",
        "row",
        "--exclude",
        "fc3",
        "--out",
        tmp_path / "c",
    )
    refused(
        2,
        ["layer 'conv1' reads 9 inputs", "group by 4"],
        *args,
        "--ratio",
        0.5,
        "--scope",
        "2:4",
        "--out",
        tmp_path / "c",
    )


def test_an_audit(sukashi, refused, tmp_path, weights):
    args = ["audit", NET, NET, "--weights", weights, "--data", "digits", "--test-images", 40, "--out", tmp_path / "out"]
    args += ["--attributions", "saliency", "--measures", "gini,deletion", "--set", "deletion.step=16"]
    result = strict(sukashi(*args, "--json").out)
    assert {row["said"].partition(" in ")[0] for row in result["saliency"]["comparisons"]} == {"no detectable change"}
    shown = sukashi(*args)
    assert (shown.code, shown.err) == (0, "")
    assert "Gini is not shown to change in" in shown.out
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in shown.out
    refused(2, ["deletion.step was 16, now 8"], *args[:-1], "deletion.step=8")
    refused(2, ["no option 'stpe'", "'step'"], *args[:-1], "deletion.stpe=8")


@pytest.mark.slow
def test_demo_keeps_what_is_finished(sukashi, tmp_path, monkeypatch, trained_cnn):
    trained = []
    monkeypatch.setattr(demo, "CRITERIA", ("random", "magnitude"))
    monkeypatch.setattr(demo, "train_digits", lambda *args: trained.append(args) or trained_cnn)
    found = strict(sukashi("demo", "--out", tmp_path / "demo", "--json").out)
    assert set(found["sauce"]) == {"random", "magnitude"}
    assert Path(found["report"]).exists()
    before = contents(tmp_path / "demo")
    shown = sukashi("demo", "--out", tmp_path / "demo")
    assert shown.code == 0
    assert f"Report: {found['report']}" in shown.out
    assert "sukashi compare MODEL" in shown.out
    assert contents(tmp_path / "demo") == before
    assert len(trained) == 1
    shutil.rmtree(tmp_path / "demo" / "pruned")
    (tmp_path / "demo" / "pruned").mkdir()
    (tmp_path / "demo" / "pruned" / "thesis.txt").write_text("mine")
    assert sukashi("demo", "--out", tmp_path / "demo").code == 2, "a folder that is not ours is not replaced"
    for foreign in ("pruned", "."):
        other = tmp_path / f"other{foreign}"
        (other / foreign).mkdir(parents=True)
        (other / foreign / "thesis.txt").write_text("mine")
        shown = sukashi("demo", "--out", other)
        assert (shown.code, len(trained)) == (2, 1), "nothing is trained before"
        assert "is not empty (thesis.txt)" in shown.err


def test_json_has_no_nan(capsys):
    console.print_json({"a": [1.0, float("nan")], "b": {"c": float("-inf"), "d": (True, None, "x", 2)}})
    assert strict(capsys.readouterr().out) == {"a": [1.0, None], "b": {"c": None, "d": [True, None, "x", 2]}}


# Progress and warnings.


def test_warnings_are_one_line_each(sukashi, capsys):
    found = sukashi("check", *DIGITS, "--limit", 0)
    said = f"{NET} has random weights, its figures mean nothing: give --weights FILE or --pretrained"
    assert found.err == f"sukashi: warning: {said}\n"
    assert "note: digits has no test split" in found.out
    assert said not in found.out, "once is enough"
    again = sukashi("check", *DIGITS, "--limit", 0)
    assert (again.err, again.out.count(said)) == (found.err, 0)
    with warnings.catch_warnings(action="always"):
        console.warned.clear()
        for told in ("one", "two", "one"):
            console.warn(told, str)
    assert capsys.readouterr().err == "sukashi: warning: one\nsukashi: warning: two\n"
    handler = warnings.showwarning
    sukashi("list", "data")
    assert warnings.showwarning is handler


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_random_weights_are_the_same_in_every_run():
    found = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(Source(model=NET, data="digits", width=8).open().loaded.weights_sha256)
            assert torch.initial_seed() == seed
    assert found[0] == found[1]


def test_a_log_file_shows_life_now_and_then(monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(waiting, "FIRST_LINE", 10.0)
    with console.working(), progress.task("trials", 4) as trials:
        trials.advance(0, "cswap, seed 0")
        with progress.task("cswap", 100) as units:
            for second in range(1, 61):
                clock.now = 100.0 + second
                units.advance(note=f"removed {second // 2}")
        trials.advance(note="amp, seed 0")
        clock.now += 30
        trials.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "sukashi: trials 0/4, cswap, seed 0; cswap 10/100, removed 5, about 2 min left",
        "sukashi: trials 0/4, cswap, seed 0; cswap 40/100, removed 20, about 60 s left",
        "sukashi: trials 2/4, about 2 min left",
    ]


def test_bars_on_a_terminal(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(waiting, "log", Console(file=shown, force_terminal=True, width=100))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.working(), progress.task("trials [/b]", 4) as trials, progress.task("cswap", 100) as units:
        units.advance(7, "removed 3")
        trials.advance(0, "cswap, seed 0 [/i]")  # which rich would read as markup
        deadline = time.monotonic() + 30
        while "removed 3" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread draws
    for part in ("trials [/b]", "0/4", "cswap, seed 0 [/i]", "7/100", "removed 3", "left"):
        assert part in shown.getvalue()


def test_a_comparison_says_which_trial_is_running(sukashi, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_LINE", 0.0)
    monkeypatch.setattr(waiting, "LINE", 0.0)
    found = sukashi("compare", *DIGITS, *SMALL, "--criteria", "random,amp", "--out", tmp_path / "out", "--json")
    assert strict(found.out)["sauce"]
    assert "sukashi: trials 0/2, random, seed 0\n" in found.err
    assert re.search(r"sukashi: trials 1/2, amp, seed 0(, about \d+ s left)?; amp 1/32, removed ", found.err)


def test_ls_lists_experiments_with_what_they_found(sukashi, tmp_path, refused):
    args = ["compare", *DIGITS, *SMALL, "--criteria", "random"]
    done = strict(sukashi(*args, "--out", tmp_path / "runs" / "a", "--json").out)
    sukashi(*args, "--out", tmp_path / "runs" / "more" / "b")
    (trial,) = (tmp_path / "runs" / "more" / "b").rglob("trial.json")
    trial.unlink()
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "experiment.json").write_text("{}")
    rows = strict(sukashi("ls", tmp_path / "runs", "--json").out)["experiments"]
    assert [Path(row["folder"]).name for row in rows] == ["a", "broken", "b"]
    assert (rows[0]["kind"], rows[0]["data"], rows[0]["found"]) == ("compare", "digits", done["verdict"])
    assert "this version reads" in rows[1]["found"]
    assert rows[2]["found"] == "0 of 1 trial: give its command again to go on"
    assert done["verdict"].split()[0] in sukashi("ls", tmp_path / "runs").out
    refused(2, ["is no folder: give one with experiments"], "ls", tmp_path / "nothere")
    refused(2, ["holds no experiment"], "ls", tmp_path / "runs" / "a" / "figures")


# --- train and finetune


def test_train_finetune_and_prune_go_hand_in_hand(sukashi, tmp_path):
    run = [*DIGITS[:5], "--epochs", "2", "--batch-size", "64", "--optimizer", "adamw", "--test-images", "60"]
    first = sukashi("train", *run, "--out", tmp_path / "trained", "--augment", "affine")
    assert (first.code, first.err) == (0, "")
    assert "test accuracy" in first.out
    again = sukashi("train", *run, "--out", tmp_path / "trained", "--augment", "affine")
    assert "finished already" in again.out
    tuned = sukashi(
        *("finetune", tmp_path / "trained", "--data", "digits", "--out", tmp_path / "tuned", "--epochs", "1", "--json")
    )
    found = json.loads(tuned.out)
    assert found["accuracy_before"] is not None
    assert found["out"] == str(tmp_path / "tuned")
    cut = sukashi(
        *("prune", tmp_path / "tuned", "--data", "digits", "--criterion", "random", "--ratio", "0.3"),
        *("--calibration", "4", "--out", tmp_path / "cut", "--json"),
    )
    assert json.loads(cut.out)["dense"]["accuracy"] == pytest.approx(found["accuracy"])


def test_the_options_of_training_have_one_home(sukashi):
    shown = sukashi("train", "--help").out
    assert "--label-smoothing" in shown
    assert "--test-images" in shown
    assert "--calibration" not in shown


def test_trainings_that_are_refused(refused, tmp_path):
    out = ["--data", "digits", "--out", tmp_path / "run"]
    refused(2, ["lr must be greater than 0, got -1.0"], "train", NET, *out, "--lr", "-1")
    refused(2, ["fine-tuning starts from weights", "--weights"], "finetune", NET, *out)
    refused(2, ["warmup must be below epochs"], "train", NET, *out, "--epochs", "1", "--warmup", "1")
    refused(
        4,
        ["does not run on images of 12 x 12 pixels", "leave --size out, its own is 8 x 8"],
        "train",
        NET,
        *out,
        "--size",
        "12",
    )


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(sukashi, tmp_path, monkeypatch):
    monkeypatch.setattr("sukashi.training.checkpoint.Checkpoints.due", lambda self: True)
    args = ["train", NET, "--data", "digits", "--out", tmp_path / "run", "--lr", "1e18"]
    found = sukashi(*args)
    assert (found.code, "last checkpoint is kept" in found.err) == (4, True)
    assert (tmp_path / "run" / "under_way" / "checkpoint.safetensors").exists()
    again = sukashi(*args)
    assert (again.code, again.err.splitlines()[-1]) == (4, found.err.splitlines()[-1])


def test_a_loss_that_is_not_finite_names_the_step(sukashi, tmp_path):
    found = sukashi("train", NET, "--data", "digits", "--out", tmp_path / "run", "--lr", "1e18")
    assert found.code == 4
    assert "step 2" in found.err or "step 3" in found.err
    assert "last checkpoint is kept" in found.err
    assert "with another --out" in found.err


def test_other_processes_of_a_training_are_silent(sukashi, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    found = sukashi("finetune", NET, "--data", "digits", "--out", tmp_path / "run")
    assert (found.code, found.out, found.err) == (2, "", "")
