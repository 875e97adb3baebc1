"""Models: what a spec gives, and every file, recipe or network that is refused before it can do harm."""

import hashlib
import json
import os
import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import sukashi
from sukashi import models
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask, Preprocess, Site
from sukashi.criteria import pruning
from sukashi.experiments import bench
from sukashi.models.architectures import OWN
from sukashi.network.layers import Attention

LAYERS = ("fc1", "fc2")
SMALL = Preprocess(8, 8, 1, (0.5,), (0.5,))


class Net(nn.Module):
    """A network for import paths; `twist` is what it does to its logits."""

    def __init__(self, twist=lambda net, logits: logits, n_classes=4, width=8):
        super().__init__()
        self.preprocess = SMALL
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, n_classes)
        self.register_buffer("calls", torch.zeros(()))
        self.twist = twist

    def forward(self, x):
        return self.twist(self, self.fc(self.norm(self.conv(x)).relu().mean((2, 3))))


def _count(net, logits):
    net.calls += 1
    return logits


shared = Net()
plain = Net
with_dict = partial(Net, lambda net, logits: {"logits": logits, "aux": logits[:, :2], "note": "x"})
with_tuple = partial(Net, lambda net, logits: (logits, 3 * logits))
noisy = partial(Net, lambda net, logits: logits + torch.randn(()))
counting = partial(Net, _count)
sociable = partial(Net, lambda net, logits: logits - logits.mean(0))
# As if rounding, which is another in batches of another size, were multiplied.
chaotic = partial(Net, lambda net, logits: logits * (1 + len(logits) * torch.finfo(logits.dtype).eps * 2**15))
overflowing = partial(Net, lambda net, logits: logits / 0)
mapping = partial(Net, lambda net, logits: logits[:, :, None])
trained_on = partial(getattr, sys.modules[__name__], "shared")
number = partial(int, 3)
probable = partial(Net, lambda net, logits: logits.softmax(1))
logarithmic = partial(Net, lambda net, logits: logits.log_softmax(1))
alike = partial(Net, lambda net, logits: (0 * logits).softmax(1))
lonely = partial(Net, lambda net, logits: logits.softmax(1), n_classes=1)
between = partial(Net, lambda net, logits: logits.sin().abs())
gated = partial(Net, lambda net, logits: logits * logits.sigmoid())
multilabel = partial(Net, lambda net, logits: logits.sigmoid())
binary = partial(Net, lambda net, logits: logits[:, :1].sigmoid_(), n_classes=1)
frozen = partial(Net, lambda net, logits: logits.flatten().detach().sigmoid().view(-1, 4))
hard = partial(Net, lambda net, logits: nn.functional.hardsigmoid(logits).clone())
log_multilabel = partial(Net, lambda net, logits: nn.functional.logsigmoid(logits))


def shared_net():
    return shared


def stubborn(n_classes):
    return Net()


def double():
    return Net().double()


def hooked(how):
    net = Net()
    how(net.conv)
    return net


normed = partial(hooked, nn.utils.weight_norm)
spectral = partial(hooked, nn.utils.spectral_norm)
zeroed = partial(hooked, partial(prune.l1_unstructured, name="weight", amount=0.5))
kept_sum = partial(hooked, lambda conv: setattr(conv, "total", conv.weight.sum()))


def lazy():
    net = Net()
    net.fc = nn.LazyLinear(4)
    return net


def sizeless():
    net = Net()
    del net.preprocess
    return net


@pytest.fixture
def digits(tmp_path):
    """A safetensors file of digits_cnn weights, and the model they came from."""
    torch.manual_seed(0)
    loaded = models.load("sukashi:digits_cnn")
    path = tmp_path / "w.safetensors"
    metadata = {"classes": "10", "mean": "0.25", "std": "0.5"}
    safetensors.torch.save_file(loaded.model.state_dict(), path, metadata=metadata)
    return loaded, path


@pytest.mark.parametrize(
    ("spec", "options", "shape", "n_classes"),
    [
        ("sukashi:cifar_resnet20", {}, (3, 32, 32), 10),
        ("sukashi:cifar_resnet18", {"width": 8, "n_classes": 3}, (3, 32, 32), 3),
        ("sukashi:digits_vit", {"n_classes": 5}, (1, 8, 8), 5),
        ("torchvision:mobilenet_v2", {"n_classes": 7}, (3, 224, 224), 7),
        ("timm:vit_tiny_patch16_224", {"n_classes": 7}, (3, 224, 224), 7),
    ],
)
def test_load(spec, options, shape, n_classes):
    loaded = models.load(spec, **options)
    view = loaded.preprocess
    assert (view.channels, view.height, view.width) == shape
    assert len(view.mean) == len(view.std) == shape[0]
    assert loaded.n_classes == n_classes == loaded.options["n_classes"]
    assert not any(module.training for module in loaded.model.modules())
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert any(isinstance(m, Attention) for m in loaded.model.modules()) == ("vit" in spec)


def test_preprocess_is_that_of_the_source():
    assert models.load("timm:vit_tiny_patch16_224").preprocess.mean == (0.5, 0.5, 0.5)
    assert models.load("torchvision:mobilenet_v2").preprocess.std == (0.229, 0.224, 0.225)
    assert models.load("sukashi:digits_cnn").preprocess == Preprocess(8, 8, 1, (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("sukashi:digit_cnn", "did you mean 'sukashi:digits_cnn'"),
        ("timm:vit_tiny_patch16_22", "did you mean 'timm:vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224.nothing", "unknown weights 'nothing'"),
        ("torchvision:resnt18", "did you mean 'torchvision:resnet18'"),
        ("torchvision:fcn_resnet50", "unknown model"),
        ("nope", "unknown model 'nope', and no such folder: Known"),
        ("runs/nope", "^no such folder 'runs/nope': give a saved model's, with recipe.json in it, or a model's name$"),
        ("resnet18", "did you mean 'torchvision:resnet18'"),
        ("hf-hub:timm/resnet18", "unknown model"),
        ("timm:hf-hub:timm/resnet18", "unknown model"),
        ("no_such_module_x:net", "cannot import"),
        ("test_models:no_such_net", "cannot import"),
    ],
)
def test_unknown_spec(spec, hint):
    with pytest.raises(UsageError, match=hint) as refused:
        models.load(spec)
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("sukashi:digits_cnn", {"pretrained": True}),
        ("sukashi:cifar_resnet20", {"width": 32}),
        ("sukashi:digits_cnn", {"n_classes": 0}),
        ("torchvision:resnet18", {"width": 32}),
        ("torchvision:resnet18", {"pretrained": True, "weights": "w.safetensors"}),
        ("test_models:plain", {"pretrained": True}),
    ],
)
def test_option_that_does_not_exist(spec, options):
    with pytest.raises(UsageError):
        models.load(spec, **options)


def test_names_can_be_loaded():
    assert "sukashi:cifar_resnet20" in models.names()
    assert "torchvision:vit_b_16" in models.names()
    for spec in models.names():
        source, _, name = spec.partition(":")
        known = {"sukashi": OWN, "timm": timm.list_models()}
        assert name in known.get(source, torchvision.models.list_models())


@pytest.mark.parametrize("spec", ["timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_pretrained_without_a_hub_fails_in_one_sentence(spec, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match="give a file of weights") as refused:
        models.load(spec, pretrained=True)
    assert "long story" not in str(refused.value)


def test_torchvision_pretrained_never_unpickles(monkeypatch):
    asked = {}

    def fetch(url, **options):
        asked.update(options)
        return torchvision.models.squeezenet1_1(weights=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    loaded = models.load("torchvision:squeezenet1_1", pretrained=True)
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True
    assert loaded.class_names[0] == "tench"
    with pytest.raises(ModelError, match="gives 1000 classes, 10 were expected"):
        models.load("torchvision:squeezenet1_1", pretrained=True, n_classes=10)


# Weights.


def test_safetensors(digits):
    source, path = digits
    loaded = models.load("sukashi:digits_cnn", weights=path)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.model(x), source.model(x))
    assert (loaded.preprocess.mean, loaded.preprocess.std) == ((0.25,), (0.5,))
    assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_half_precision_becomes_float32(digits, tmp_path):
    source, _ = digits
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    loaded = models.load("sukashi:digits_cnn", weights=tmp_path / "half.safetensors")
    assert loaded.model.fc1.weight.dtype == torch.float32
    assert torch.equal(loaded.model.fc1.weight, state["fc1.weight"].float())


def small_vit(n_classes=3):
    model = torchvision.models.VisionTransformer(8, 4, 2, 2, 12, 16, num_classes=n_classes)
    model.preprocess = Preprocess(8, 8, 3, (0.5,) * 3, (0.5,) * 3)
    return model


def test_weights_saved_with_attention_written_out_fit_again(tmp_path):
    loaded = models.load("test_models:small_vit")
    assert any(isinstance(module, Attention) for module in loaded.model.modules())
    safetensors.torch.save_file(loaded.model.state_dict(), tmp_path / "vit.safetensors")
    again = models.load("test_models:small_vit", weights=tmp_path / "vit.safetensors")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.model(x), loaded.model(x))


def test_a_model_itself_is_no_name():
    with pytest.raises(UsageError, match=r"got a Linear: give package\.module:callable"):
        models.load(nn.Linear(1, 1))


def test_double_precision_becomes_float32():
    loaded = models.load("test_models:double")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin"])
def test_missing_or_foreign_file(name, tmp_path):
    if name == "w.bin":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=r"w\."):
        models.load("sukashi:digits_cnn", weights=tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.05, 0.5, 0.999])
def test_truncated_safetensors(digits, share):
    _, path = digits
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match="no intact safetensors file"):
        models.load("sukashi:digits_cnn", weights=path)


def _lie(change):
    """A file whose header was changed, with the length in front of it put right."""

    def apply(content):
        n = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + n])
        changed = change(header)
        text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + n :]

    return apply


LIES = {
    "trailing bytes": lambda content: content + b"\0",
    "endless header": lambda content: b"\xff" * 8 + content[8:],
    "no JSON": _lie(lambda header: "{" * 60),
    "deep JSON": _lie(lambda header: "[" * 100_000),
    "a list": _lie(lambda header: "[]"),
    "shape": _lie(lambda header: header["fc1.bias"].update(shape=[63])),
    "negative shape": _lie(lambda header: header["fc1.bias"].update(shape=[-64, -1])),
    "huge shape": _lie(lambda header: header["fc1.bias"].update(shape=[2**62, 2**62])),
    "shape of another type": _lie(lambda header: header["fc1.bias"].update(shape="64")),
    "type": _lie(lambda header: header["fc1.bias"].update(dtype="F64")),
    "unknown type": _lie(lambda header: header["fc1.bias"].update(dtype="PICKLE")),
    "overlap": _lie(lambda header: header["fc1.bias"].update(data_offsets=[0, 256])),
    "outside": _lie(lambda header: header["fc1.bias"].update(data_offsets=[10**9, 10**9 + 256])),
    "no offsets": _lie(lambda header: header["fc1.bias"].pop("data_offsets") and None),
    "gap": _lie(lambda header: header.pop("fc1.bias") and None),
    "metadata": _lie(lambda header: header["__metadata__"].update(classes=10)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors(digits, lie):
    _, path = digits
    path.write_bytes(LIES[lie](path.read_bytes()))
    with pytest.raises(ModelError, match="no intact safetensors file"):
        models.load("sukashi:digits_cnn", weights=path)


@pytest.mark.parametrize("metadata", [{"mean": "0,0"}, {"mean": "x"}, {"std": "0"}, {"std": "nan"}, {"classes": "-1"}])
def test_header_metadata_that_means_nothing(digits, metadata):
    source, path = digits
    safetensors.torch.save_file(source.model.state_dict(), path, metadata=metadata)
    with pytest.raises(ModelError, match=next(iter(metadata))):
        models.load("sukashi:digits_cnn", weights=path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_pickle_bomb_does_not_go_off(write, tmp_path):
    write({"state_dict": Bomb(tmp_path / "boom")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="nothing in it was run"):
        models.load("sukashi:digits_cnn", weights=tmp_path / "w.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_pt(digits, wrap, tmp_path):
    source, _ = digits
    torch.save(wrap(source.model.state_dict()), tmp_path / "w.pt")
    loaded = models.load("sukashi:digits_cnn", weights=tmp_path / "w.pt")
    assert torch.equal(loaded.model.fc1.weight, source.model.fc1.weight)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2)])
def test_pt_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="state_dict"):
        models.load("sukashi:digits_cnn", weights=tmp_path / "w.pt")


def test_weights_that_do_not_fit_are_named(digits, tmp_path):
    source, _ = digits
    state = dict(source.model.state_dict())
    state["fc9.weight"] = state.pop("fc1.weight")
    state["fc2.bias"] = torch.zeros(11)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError) as refused:
        models.load("sukashi:digits_cnn", weights=tmp_path / "w.pt")
    for part in ("1 missing: fc1.weight", "1 unexpected: fc9.weight", "1 of another shape: fc2.bias (11,) instead of"):
        assert part in str(refused.value)


def test_class_counts_that_differ(digits):
    _, path = digits
    with pytest.raises(ModelError, match=r"10 classes, `n_classes` is 4"):
        models.load("sukashi:digits_cnn", weights=path, n_classes=4)
    with pytest.raises(ModelError, match="gives 4 classes, 5 were expected"):
        models.load("test_models:stubborn", n_classes=5)
    loaded = replace(models.load("test_models:plain"), n_classes=5)
    with pytest.raises(ModelError, match="gives 4 classes, 5 were expected"):
        models.probe(loaded, torch.randn(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "options", "layers"),
    [
        ("sukashi:digits_vit", {}, "head"),
        ("torchvision:squeezenet1_1", {}, "classifier.1"),
        ("timm:convnext_atto", {}, "head.fc"),
        ("timm:deit_tiny_distilled_patch16_224", {}, "head, head_dist"),
        ("test_models:with_dict", {"output": "logits"}, "fc"),
    ],
)
def test_a_new_head_replaces_the_classifier_alone(spec, options, layers, tmp_path):
    loaded = models.load(spec, **options)
    renewed = models.with_new_head(loaded, 3)
    assert renewed.n_classes == 3 == models.probe(renewed, torch.randn(2, *_sides(loaded))).shape[1]
    assert f"the classifier ({layers}) is new" in renewed.notes[0]
    before, after = loaded.model.state_dict(), renewed.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.removeprefix("model.").rpartition(".")[0] for name in changed} == set(layers.split(", "))
    models.save(tmp_path / "saved", renewed, provenance={})
    again = models.load(spec, weights=tmp_path / "saved")
    assert models.digest(again.model) == models.digest(renewed.model)


def _sides(loaded):
    view = loaded.preprocess
    return view.channels, view.height, view.width


def test_a_new_head_on_a_mask_and_a_cut_leaves_both(small):
    case = small["cnn"]
    units = torch.ones(case.sites[0].n_units, dtype=torch.bool)
    units[0] = False
    cut = pruning.cut(case.loaded, Mask({case.sites[0]: units}))
    weights = {layer: torch.ones_like(cut.model.get_parameter(f"{layer}.weight"), dtype=torch.bool) for layer in LAYERS}
    masked = replace(cut, mask=Mask({Site(layer, "weight", keep.numel(), 0): keep for layer, keep in weights.items()}))
    renewed = models.with_new_head(masked, 4)
    assert renewed.cuts == cut.cuts
    assert [site.layer for site in renewed.mask.keep] == ["fc1"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224"])
def test_a_transformer_is_laid_out_for_another_size(spec, tmp_path):
    loaded = models.load(spec, n_classes=3, size=[64])
    assert (loaded.preprocess.height, loaded.preprocess.width, loaded.options["size"]) == (64, 64, 64)
    models.save(tmp_path / "saved", loaded, provenance={})
    again = models.load(str(tmp_path / "saved"))
    assert models.digest(again.model) == models.digest(loaded.model)
    assert again.preprocess == loaded.preprocess
    torch.save(loaded.model.state_dict(), tmp_path / "w.pt")
    found = models.load(spec, weights=tmp_path / "w.pt")
    assert models.digest(found.model) == models.digest(loaded.model)
    assert (found.preprocess, found.n_classes) == (loaded.preprocess, 3)
    assert "images of 64 x 64 pixels" in found.notes[0]
    with pytest.raises(ModelError, match="70 x 70"):
        models.read_as(loaded, size=[70])


def test_a_transformer_whose_windows_would_change_is_left_alone():
    with pytest.raises(ModelError, match=r"cannot be laid out for 64 x 64 pixels .*: leave `size` out"):
        models.load("timm:swin_tiny_patch4_window7_224", n_classes=3, size=[64])


def test_the_recipe_of_a_network_of_its_own_size_says_nothing_of_one(tmp_path):
    models.save(tmp_path / "saved", models.load("sukashi:digits_cnn", width=4), provenance={})
    assert "size" not in json.loads((tmp_path / "saved" / "recipe.json").read_bytes())["model"]


@pytest.mark.parametrize("spec", ["test_models:shared_net", "memory"])
def test_a_network_of_one_class_count_has_no_new_head(spec):
    spec = models.hold(Net()) if spec == "memory" else spec
    with pytest.raises(ModelError, match="cannot be built for another number of classes"):
        models.with_new_head(models.load(spec), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(digits, value, tmp_path):
    source, _ = digits
    state = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    state["bn2.running_var"][3] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"bn2\.running_var"):
        models.load("sukashi:digits_cnn", weights=tmp_path / "w.pt")


# Import paths and probing.


def test_import_path():
    loaded = models.load("test_models:plain", n_classes=6, width=4)
    assert loaded.n_classes == 6
    assert loaded.model.conv.out_channels == 4
    assert loaded.preprocess == SMALL


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("with_dict", r"'logits' \(2, 4\), 'aux' \(2, 2\)"),
        ("with_tuple", r"'0' \(2, 4\), '1' \(2, 4\)"),
        ("noisy", "other logits in a second pass"),
        ("counting", "changes its buffer 'calls'"),
        ("sociable", "other company"),
        ("chaotic", "multiplies rounding until it rules the logits, in float64 they agree: give trained `weights`"),
        ("overflowing", "NaN or Inf"),
        ("mapping", r"\(images, classes\)"),
        ("number", "must return a torch.nn.Module"),
        ("sizeless", "does not say what it reads"),
        ("probable", "probabilities, not logits: leave the softmax out"),
        ("logarithmic", "probabilities, not logits"),
        ("alike", "probabilities, not logits"),
        *((name, "ends in a sigmoid, .* leave the sigmoid out") for name in ("multilabel", "binary", "frozen", "hard")),
        ("log_multilabel", "ends in a sigmoid"),
        ("normed", r"'conv' of test_models:normed .*: call torch\.nn\.utils\.remove_weight_norm"),
        ("spectral", r"'conv'.*call torch\.nn\.utils\.remove_spectral_norm"),
        ("zeroed", r"'conv'.*call torch\.nn\.utils\.prune\.remove\(layer, name\)"),
        ("kept_sum", "'total' of layer 'conv'.*computed from weights and kept"),
        ("lazy", "layer 'fc' .* is lazy.*pass a batch of images through"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_models_that_cannot_be_measured(name, reason):
    with pytest.raises(ModelError, match=reason):
        models.load(f"test_models:{name}")


@pytest.mark.parametrize("name", ["lonely", "between", "gated"])
def test_one_class_and_numbers_below_one_are_no_sign_of_a_softmax_or_sigmoid(name):
    assert models.load(f"test_models:{name}").n_classes in (1, 4)


def test_logits_that_look_like_probabilities_on_some_images_pass():
    net = Net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        net.fc.weight.mul_(1e-5)
        net.fc.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        net.conv.weight.abs_()
    loaded = models.load(models.hold(net))
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (models.probe(loaded, images).sum(1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "output", "n_classes"), [("with_dict", "aux", 2), ("with_tuple", "1", 4)])
def test_output_selects_a_tensor(name, output, n_classes):
    loaded = models.load(f"test_models:{name}", output=output)
    assert loaded.n_classes == n_classes
    assert loaded.options == {"output": output}
    inner = loaded.model.model(torch.ones(2, 1, 8, 8))
    chosen = inner["aux"] if name == "with_dict" else inner[1]
    assert torch.equal(loaded.model(torch.ones(2, 1, 8, 8)), chosen)


def test_output_that_does_not_exist():
    with pytest.raises(ModelError, match=r"no output 'x'.*'logits'"):
        models.load("test_models:with_dict", output="x")
    with pytest.raises(ModelError, match="one tensor"):
        models.load("test_models:plain", output="0")


def test_a_model_in_training_mode_stays_its_owners():
    shared.train()
    loaded = models.load("test_models:trained_on")
    assert shared.training
    assert shared.norm.training
    assert not loaded.model.norm.training
    assert loaded.model.fc.weight.data_ptr() != shared.fc.weight.data_ptr()


def test_probe_leaves_the_model_as_found():
    loaded = models.load("test_models:plain")
    loaded.model.train()
    loaded.model.conv.eval()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    logits = models.probe(loaded, torch.randn(5, 1, 8, 8))
    assert logits.shape == (5, 4)
    assert loaded.model.norm.training
    assert not loaded.model.conv.training
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_probe_puts_buffers_back():
    loaded = replace(models.load("test_models:plain"), model=counting())
    with pytest.raises(ModelError, match="changes its buffer"):
        models.probe(loaded, torch.randn(2, 1, 8, 8))
    assert loaded.model.calls == 0


def test_probe_of_a_wrong_shape():
    with pytest.raises(ModelError, match="images of 8 x 8 pixels in 3 channels"):
        models.probe(models.load("test_models:plain"), torch.randn(2, 3, 8, 8))


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("spec", "options", "file"),
    [
        ("sukashi:cifar_resnet20", {}, "resnet20-cifar10.safetensors"),
        ("sukashi:cifar_resnet18", {"width": 32}, "resnet18w32-cifar10.safetensors"),
    ],
)
def test_trained_weights(real_weights, spec, options, file):
    loaded = models.load(spec, weights=real_weights / file, **options)
    assert loaded.n_classes == 10
    assert loaded.preprocess.mean == (0.485, 0.456, 0.406)


# --- sizes and patches


class Patchy(nn.Module):
    """Reads images through one layer, and through one more that halves what is left."""

    def __init__(self, first, side, more=None):
        super().__init__()
        self.first, self.more = first, more or nn.Identity()
        self.preprocess = Preprocess(*side, 1, (0.0,), (1.0,))

    def forward(self, x):
        return self.more(self.first(x)).mean((2, 3))


def patchy(*given, **more):
    model = Patchy(*given, **more)
    return models.Loaded(model.eval(), "mine:net", {}, model.preprocess, 4, None, "")


def probed(loaded):
    view = loaded.preprocess
    return models.probe(loaded, torch.randn(2, view.channels, view.height, view.width))


@pytest.mark.parametrize(
    ("layer", "side", "words"),
    [
        (nn.Conv2d(1, 4, 2, 2), (9, 9), "patches of 2 x 2 pixels, of which 9 x 9 is .*: .* are 8 x 8 and 10 x 10$"),
        (nn.Conv2d(1, 4, (2, 5), (2, 5)), (8, 9), "patches of 2 x 5 pixels, .* are 8 x 5 and 8 x 10$"),
        (nn.Conv2d(1, 4, 4, 4, padding="valid"), (10, 8), "of which 10 x 8 is .* are 8 x 8 and 12 x 8$"),
    ],
)
def test_patches_that_leave_pixels_over_are_refused(layer, side, words):
    with pytest.raises(ModelError, match=words):
        probed(patchy(layer, side))


@pytest.mark.parametrize(
    ("layer", "side", "more"),
    [
        (nn.Conv2d(1, 4, 2, 2), (8, 8), None),
        (nn.Conv2d(1, 4, 1, 1), (9, 9), None),
        (nn.Conv2d(1, 4, 2, 2, dilation=3), (9, 9), None),
        (nn.Conv2d(1, 4, 3, 2), (10, 10), None),
        (nn.Conv2d(1, 4, 2, 2, padding=1), (9, 9), None),
        (nn.Conv2d(1, 1, 3, 1, 1), (9, 9), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 4, 3, 3))),
    ],
)
def test_other_convolutions_may_end_where_they_like(layer, side, more):
    assert probed(patchy(layer, side, more=more)).shape == (2, 4)


class ByName(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


def test_patches_are_seen_and_taken_where_the_layer_is_called_by_keyword():
    assert probed(patchy(ByName(nn.Conv2d(1, 4, 2, 2)), (8, 8))).shape == (2, 4)
    with pytest.raises(ModelError, match="patches of 2 x 2 pixels, of which 9 x 9"):
        probed(patchy(ByName(nn.Conv2d(1, 4, 2, 2)), (9, 9)))


def test_the_size_an_architecture_was_made_for_is_its_own_affair(monkeypatch):
    # As timm:vit_so400m_patch14_siglip_384, whose 27 x 27 patches leave 6 pixels over.
    made = timm.create_model
    small = {"img_size": 30, "patch_size": 14, "embed_dim": 24, "depth": 1}

    def create(name, **options):
        model = made(name, **options, **small)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 30, 30)}
        return model

    monkeypatch.setattr(timm, "create_model", create)
    loaded = models.load("timm:vit_tiny_patch16_224", n_classes=4)
    assert (loaded.preprocess.height, loaded.preprocess.width) == (30, 30)
    assert probed(loaded).shape == (2, 4)


def test_another_size_is_taken_or_refused_in_our_words():
    vit, cnn = models.load("sukashi:digits_vit", width=8), models.load("sukashi:cifar_resnet20")
    assert models.read_as(vit) is vit
    assert models.read_as(cnn, size=[17]).preprocess.width == 17
    with pytest.raises(ModelError, match=r"digits_vit cuts images into patches of 2 x 2 .* 8 x 8 and 10 x 10$"):
        models.read_as(vit, size=[9])
    with pytest.raises(
        ModelError,
        match=r"^sukashi:digits_vit does not run on images of 12 x 12 pixels in 1 channel "
        r"\(RuntimeError: .*\): leave `size` out, its own is 8 x 8$",
    ):
        models.read_as(vit, size=[12])


def test_a_file_of_weights_is_no_model(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"is a file of weights and not a model.* `weights`"):
        models.load(str(tmp_path / "w.pt"))


# Networks of one's own.

CODE = """
from torch import nn
from sukashi import Preprocess

def plain(num_classes=10, width=4):
    body = nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(width, num_classes))

def asking(num_classes):
    return plain(num_classes)

def fixed(width=4):
    return plain(10, width)

def told():
    net = plain()
    net.preprocess = Preprocess(8, 8, 3, (0.5,) * 3, (0.25,) * 3)
    return net

def bytewise():
    net = plain()
    net.preprocess = Preprocess(8, 8, 3, (124.0, 116.0, 104.0), (58.0, 57.0, 57.0))
    return net
"""
READ = {"size": [8], "mean": [0.5, 0.4, 0.3], "std": [0.25]}


@pytest.fixture
def own(alone):
    Path("birds").mkdir()
    Path("birds/__init__.py").touch()
    Path("birds/net.py").write_text(CODE)
    alone()


@pytest.mark.usefixtures("own")
@pytest.mark.filterwarnings("ignore:.*random weights")
class TestOwn:
    def test_what_it_reads_may_be_said_where_its_code_does_not(self, tmp_path):
        loaded = models.load("birds.net:plain", **READ)
        assert loaded.preprocess == Preprocess(8, 8, 3, (0.5, 0.4, 0.3), (0.25,) * 3)
        read = "8 x 8, mean 0.5, 0.4, 0.3, std 0.25, 0.25, 0.25 (as asked), whole images resized, aspect ratio not kept"
        assert loaded.reads == f"{read} (where nobody says)"
        assert models.load("birds.net:plain", size=[8], mean=[0.5], std=[0.25]).preprocess.channels == 3
        models.save(tmp_path / "saved", loaded, provenance={})
        assert models.load("birds.net:plain", weights=tmp_path / "saved").preprocess == loaded.preprocess
        header = {"size": "8", "mean": "0.5,0.4,0.3", "std": "0.25"}
        safetensors.torch.save_file(loaded.model.state_dict(), tmp_path / "a.safetensors", header)
        assert models.load("birds.net:plain", weights=tmp_path / "a.safetensors").preprocess == loaded.preprocess

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (
                {},
                "give `size`, `mean` and `std`, or in its code .*: from sukashi import Preprocess; model.preprocess = ",
            ),
            ({"size": [8], "mean": [0.5]}, "give `std` too, or"),
        ],
    )
    def test_where_nobody_says_what_it_reads_both_remedies_are_named(self, given, words):
        with pytest.raises(ModelError, match=words):
            models.load("birds.net:plain", **given)

    def test_its_class_count_is_called_as_its_parameter_is(self, tmp_path):
        loaded = models.load("birds.net:asking", n_classes=7, **READ)
        assert loaded.n_classes == 7
        models.save(tmp_path / "saved", loaded, provenance={})
        assert models.load("birds.net:asking", weights=tmp_path / "saved").n_classes == 7
        assert models.with_new_head(models.load("birds.net:plain", **READ), 3).n_classes == 3
        with pytest.raises(ModelError, match="must be told its class count, num_classes: give `n_classes=N`"):
            models.load("birds.net:asking", **READ)
        with pytest.raises(ModelError, match=r"takes \(width\) and no n_classes or num_classes: leave `n_classes` out"):
            models.load("birds.net:fixed", n_classes=7, **READ)
        with pytest.raises(ModelError, match=r"takes \(num_classes\) and no width: leave `width` out"):
            models.load("birds.net:asking", n_classes=7, width=3, **READ)

    @pytest.mark.parametrize(
        ("spec", "near"),
        [
            ("birds/net.py:plain", "'birds.net:plain'?"),
            ("./birds/net.py:plain", "'birds.net:plain'?"),
            ("birds/net:plain", "'birds.net:plain'?"),
            ("birds.net.plain", "'birds.net:plain'?"),
            ("birds/net.py", "'birds.net:NAME'?"),
        ],
    )
    def test_a_file_in_place_of_a_module_is_told_as_the_module(self, spec, near):
        with pytest.raises(UsageError) as caught:
            models.load(spec)
        assert str(caught.value) == f"unknown model {spec!r}: did you mean {near}"

    def test_a_file_in_another_folder_is_told_with_the_path_of_python(self, monkeypatch):
        folder = Path.cwd()
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        with pytest.raises(UsageError, match=f"did you mean 'net:plain' with PYTHONPATH={folder}/birds"):
            models.load(f"{folder}/birds/net.py:plain")
        monkeypatch.chdir("../birds")
        with pytest.raises(UsageError, match=r"cannot import net\.py:plain: did you mean 'net:plain'"):
            models.load("net.py:plain")

    def test_means_of_pixels_up_to_255_are_refused_whoever_says_them(self):
        words = r"pixels in \[0, 1\], got 124,116,104, as of pixels in \[0, 255\]: divide .* \(0.4863,0.4549,0.4078 is"
        with pytest.raises(UsageError, match=words):
            models.load("birds.net:bytewise")
        with pytest.raises(UsageError, match=words):
            models.load("birds.net:told", mean=[124, 116, 104])
        with pytest.raises(UsageError, match=words):
            sukashi.check("nobody:asks", "nor:this", mean=[124, 116, 104], std=[58, 57, 57])

    def test_a_saved_folder_is_refused_with_the_call_that_names_its_code(self):
        models.save("cut", models.load("birds.net:told"), provenance={})
        for call, told in [
            (
                lambda: sukashi.finetune("cut", "digits", epochs=2, out="tuned"),
                "`sukashi.finetune(model='birds.net:told', data='digits', epochs=2, out='tuned', weights='cut')`",
            ),
            (
                lambda: sukashi.export("cut", file="a.onnx"),
                "`sukashi.export(model='birds.net:told', file='a.onnx', weights='cut')`",
            ),
            (
                lambda: sukashi.audit(["cut", "cut"], "digits", out="o"),
                "`sukashi.audit(models=['birds.net:told=cut', 'birds.net:told=cut'], data='digits', out='o')`",
            ),
            (lambda: sukashi.load("cut"), "`model='birds.net:told'` with `weights='cut'`"),
        ]:
            with pytest.raises(ModelError) as caught:
                call()
            head = "cut needs the code of birds.net:told, and a recipe must not choose what code runs"
            assert str(caught.value) == f"{head}: name it yourself, {told}"

    def test_a_saved_folder_of_its_code_is_exported_into_itself_and_read_as_asked(self):
        pytest.importorskip("onnxscript")
        models.save("cut", models.load("birds.net:told"), provenance={})
        found = sukashi.export("birds.net:told", weights="cut", mean=[0.4], std=[0.2])
        assert found.file == "cut/onnx/model.onnx"
        assert found.metadata["mean"] == "[0.4, 0.4, 0.4]"
        assert "recipe_sha256" in found.metadata

    @pytest.mark.parametrize(
        "given",
        [
            {"model": "birds.net:plain"},
            {"model": "birds/net.py:plain"},
            {"model": "birds.net:told", "weights": "nowhere.pt"},
            {"model": "sukashi:digits_cmm"},
            {"model": "timm:resnet_18"},
        ],
    )
    def test_a_model_is_refused_before_images_are_read(self, monkeypatch, given):
        monkeypatch.setattr(bench.datasets, "load", lambda *given, **named: pytest.fail("images were read"))
        for call in (
            partial(sukashi.check, **given),
            partial(sukashi.train, **given, out="o"),
            partial(sukashi.compare, **given, criteria=["random"], out="o"),
            partial(sukashi.export, **given, file="a.onnx"),
        ):
            with pytest.raises((ModelError, UsageError)):
                call(data="digits")
