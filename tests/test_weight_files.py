"""Files of weights as tools write them: seen through where what they hold is certain, refused by name where not."""

import argparse
import json
import os
import types

import numpy as np
import pytest
import safetensors.torch as st
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sukashi import models
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Preprocess

SPEC, WIDTH = "sukashi:digits_cnn", 4
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two layers that hold one tensor, and a layer under two names."""

    def __init__(self):
        super().__init__()
        self.preprocess = Preprocess(8, 8, 1, (0.5,), (0.5,))
        self.first, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.two.weight = self.one.weight
        self.again = nn.Sequential(self.first)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.two(self.one(self.again(x)).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.load(SPEC, width=WIDTH).model


@pytest.fixture
def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def loaded(path, **options):
    return models.load(SPEC, width=WIDTH, weights=path, **options)


def same(one, other):
    with torch.no_grad():
        return torch.equal(one(X), other(X))


def before(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
AS_THEY_ARE = {
    "net": lambda state: {"net": state, "acc": 87.8, "epoch": 12},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": OPTIMIZER},
    "deep": lambda state: {"checkpoint": {"weights": state}, "version": 3},
    "numbers beside": lambda state: {**state, "epoch": 3},
    "another network": lambda state: {"generator": {"a.weight": torch.ones(3)}, "classifier": state},
    "loss": lambda state: {"state_dict": state, "criterion": {"weight": torch.ones(10)}},
}
NOTED = {
    "DataParallel": (lambda state: before("module.", state), "module.conv1.weight for conv1.weight"),
    "compile": (lambda state: before("_orig_mod.module.", state), "_orig_mod.module.conv1.weight"),
    "Lightning": (lambda state: {"state_dict": before("model.", state), "loops": {}}, "model.conv1.weight"),
    "a metric": (lambda state: before("net.", state) | {"metric.total": torch.ones(())}, "left out.*as metric.total"),
    "AveragedModel": (lambda state: before("module.", state) | {"n_averaged": torch.tensor(5)}, "n_averaged"),
    "thop": (lambda state: state | {"conv1.total_ops": torch.zeros(1)}, "left out, as conv1.total_ops"),
    "no counts": (lambda state: {n: t for n, t in state.items() if "batches" not in n}, "no counts of batches"),
}


@pytest.mark.parametrize("how", AS_THEY_ARE)
def test_an_entry_that_fits_is_found(network, state, how, tmp_path):
    torch.save(AS_THEY_ARE[how](state), tmp_path / "w.pth.tar")
    found = loaded(tmp_path / "w.pth.tar")
    assert same(found.model, network)
    assert found.notes == ()


@pytest.mark.parametrize("how", NOTED)
def test_what_was_done_to_names_is_noted(network, state, how, tmp_path):
    wrap, words = NOTED[how]
    torch.save(wrap(state), tmp_path / "w.ckpt")
    found = loaded(tmp_path / "w.ckpt")
    assert same(found.model, network)
    (note,) = [note for note in found.notes if all(part in note for part in words.split(".*"))]
    assert note.startswith(f"{tmp_path}/w.ckpt: ")


@pytest.mark.parametrize("name", ["w.PTH", "w.bin", "w", "w.safetensors"])
def test_what_a_file_is_follows_from_what_is_in_it(network, state, name, tmp_path):
    torch.save(state, tmp_path / name)
    st.save_file(before("module.", state), tmp_path / f"other.{name}")
    assert same(loaded(tmp_path / name).model, network)
    assert same(loaded(tmp_path / f"other.{name}").model, network)


def test_of_several_that_fit_one_must_be_named(network, state, tmp_path):
    raw = {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"state_dict": raw, "state_dict_ema": state, "arch": "x"}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"2 sets of weights that fit, 'state_dict', 'state_dict_ema'.*weights_key"):
        loaded(tmp_path / "w.pt")
    average, own = (loaded(tmp_path / "w.pt", weights_key=key) for key in ("state_dict_ema", "state_dict"))
    assert same(average.model, network)
    assert not same(own.model, network)
    assert len({average.weights_sha256, own.weights_sha256}) == 2
    with pytest.raises(UsageError, match="no weights 'state_dict_em': did you mean 'state_dict_ema'"):
        loaded(tmp_path / "w.pt", weights_key="state_dict_em")
    with pytest.raises(UsageError, match="there are no weights to take"):
        models.load(SPEC, weights_key="state_dict")


def test_networks_side_by_side_in_one_set_are_several(network, state, tmp_path):
    other = {name: tensor + 1 for name, tensor in state.items()}
    st.save_file(before("student.", other) | before("teacher.", state), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="'student', 'teacher'"):
        loaded(tmp_path / "w.safetensors")
    assert same(loaded(tmp_path / "w.safetensors", weights_key="teacher").model, network)


def test_the_mask_of_torchs_pruning_is_the_networks(network, tmp_path):
    pruned = models.load(SPEC, width=WIDTH).model
    pruned.load_state_dict(network.state_dict())
    for layer in (pruned.conv1, pruned.fc1):
        prune.l1_unstructured(layer, "weight", 0.25)
    prune.random_unstructured(pruned.fc2, "bias", 0.5)
    torch.save(pruned.state_dict(), tmp_path / "w.pt")
    found = loaded(tmp_path / "w.pt")
    assert same(found.model, pruned)
    assert {site.layer: int((~keep).sum()) for site, keep in found.mask.keep.items()} == {"conv1": 9, "fc1": 128}
    models.save(tmp_path / "saved", found, provenance={})
    again = models.load(str(tmp_path / "saved")).mask.keep
    assert all(torch.equal(again[site], keep) for site, keep in found.mask.keep.items())


@pytest.mark.parametrize(
    ("compute", "remedy"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.orthogonal, "remove_parametrizations"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_weights_that_are_computed_are_refused_with_what_makes_them_weights(compute, remedy, tmp_path):
    model = models.load(SPEC, width=WIDTH).model
    compute(model.fc1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=rf"not 'fc1.weight' but what it is computed from: call torch\S*{remedy}"):
        loaded(tmp_path / "w.pt")


def sharded(state, folder):
    folder.mkdir()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for part in set(where.values()):
        st.save_file({name: tensor for name, tensor in state.items() if where[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_weights_in_parts(network, state, tmp_path):
    folder = sharded(state, tmp_path / "parts")
    found = loaded(folder)
    assert same(found.model, network)
    assert found.weights_sha256 == loaded(folder / "model.safetensors.index.json").weights_sha256
    with pytest.raises(ModelError, match="give the folder of all its parts"):
        loaded(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        loaded(folder)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": []}',
        '{"a": 1}',
        '{"a":' * 5000,
        "{",
    ],
)
def test_an_index_that_leads_elsewhere_is_none(index, state, tmp_path):
    folder = sharded(state, tmp_path / "parts")
    st.save_file(state, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="index"):
        loaded(folder)


def test_a_folder_of_a_hub(network, state, tmp_path):
    st.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert same(loaded(tmp_path).model, network)
    with pytest.raises(UsageError, match="give the model's name, and `weights="):
        models.load(str(tmp_path))


def test_tied_weights_may_be_stored_once(tmp_path):
    torch.manual_seed(0)
    model = Tied().eval()
    st.save_model(model, str(tmp_path / "w.safetensors"))
    found = models.load("test_weight_files:Tied", weights=tmp_path / "w.safetensors")
    assert same(found.model, model)
    state = model.state_dict() | {"two.weight": model.two.weight + 1}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"one\.weight and two\.weight are one tensor"):
        models.load("test_weight_files:Tied", weights=tmp_path / "w.pt")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.float64(0.9), "numpy._core.multiarray.scalar"),
        (types.SimpleNamespace(x=1), "types.SimpleNamespace"),
    ],
)
def test_what_is_more_than_tensors_is_named(state, beside, named, old, tmp_path):
    torch.save({"state_dict": state, "args": beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=f"nothing in it was run: it holds more than tensors, {named}"):
        loaded(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_torchscript_archive_is_called_one(network, tmp_path):
    torch.jit.save(torch.jit.trace(network, X), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="TorchScript"):
        loaded(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"hello", "neither"),
        (b"", "neither"),
        (b"PK\x03\x04 and no archive", "damaged"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(content, words, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        loaded(tmp_path / "w.pt")


WRONG = {
    "int8": (lambda tensor: (tensor * 10).to(torch.int8), "of type int8"),
    "bool": (lambda tensor: tensor > 0, "of type bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "of type complex64"),
    "sparse": (lambda tensor: tensor.to_sparse(), r"sparse: save it after \.to_dense"),
    "meta": (lambda tensor: tensor.to("meta"), "device meta"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor[0, 0], tensor[0, 0, :2]]), "of different shapes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_tensor_of_another_kind_is_no_weight(state, kind, tmp_path):
    change, words = WRONG[kind]
    torch.save(state | {"conv2.weight": change(state["conv2.weight"])}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=rf"'conv2\.weight' in .*{words}"):
        loaded(tmp_path / "w.pt")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_number_of_another_precision_is_one(state, kind, tmp_path):
    st.save_file({n: t.to(kind) if t.dim() == 4 else t for n, t in state.items()}, tmp_path / "w.safetensors")
    assert torch.equal(loaded(tmp_path / "w.safetensors").model.conv2.weight, state["conv2.weight"].to(kind).float())


def test_counts_that_were_stored_as_floats_are_counts(network, state, tmp_path):
    torch.save({n: t.float() for n, t in state.items()}, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt").model, network)


@pytest.mark.parametrize("key", [3, None, (1, 2), b"conv1.weight"])
def test_names_that_are_no_text_are_none(state, key, tmp_path):
    torch.save({key: state["conv1.weight"]}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds none"):
        loaded(tmp_path / "w.pt")


def test_a_mapping_that_holds_itself_ends(tmp_path):
    endless = {"epoch": 1}
    endless["again"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds none"):
        loaded(tmp_path / "w.pt")


def counted(n_classes=10):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, n_classes))
    net.preprocess = Preprocess(8, 8, 1, (0.5,), (0.5,))
    return net


def uncounted():
    return counted(10)


def test_a_network_of_one_class_count_keeps_it(tmp_path):
    torch.save(counted(3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"1\.weight \(3, 64\) instead of \(10, 64\)"):
        models.load("test_weight_files:uncounted", weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    "spec", ["sukashi:digits_cnn", "sukashi:digits_vit", "torchvision:squeezenet1_1", "test_weight_files:counted"]
)
def test_the_class_count_is_that_of_the_weights(spec, tmp_path):
    source = models.load(spec, n_classes=3)
    st.save_file(source.model.state_dict(), tmp_path / "w.safetensors")
    found = models.load(spec, weights=tmp_path / "w.safetensors")
    assert found.n_classes == 3 == found.options["n_classes"]
    assert models.digest(found.model) == models.digest(source.model)
    assert models.load(spec, weights=tmp_path / "w.safetensors", n_classes=3).n_classes == 3
    with pytest.raises(ModelError, match="for 3 classes, 7 were asked for"):
        models.load(spec, weights=tmp_path / "w.safetensors", n_classes=7)


def test_a_saved_folder_holds_one_set_of_tensors(state, tmp_path):
    models.save(tmp_path / "saved", models.load(SPEC, width=WIDTH), provenance={})
    torch.save({"model": state, "model_ema": state}, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ModelError, match="must hold tensors alone, and has model, model_ema"):
        models.load(str(tmp_path / "saved"))


def test_only_a_regular_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ModelError, match="a device or a pipe, not a file"):
            loaded(path)
