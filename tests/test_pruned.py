"""Prune: rounded masks, saved folders that come back equal, and everything that must not be written or believed."""

import builtins
import copy
import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sukashi import models
from sukashi.core.errors import ModelError, ResourceError, UsageError
from sukashi.core.files import FORMAT
from sukashi.core.types import Batch, Mask, Plan, Scores, Site, rank
from sukashi.criteria import plans, pruning
from sukashi.models import onnx_file, save
from sukashi.network import hooks, sites


def _plan(found):
    generator = torch.Generator().manual_seed(0)
    return rank(Scores({site: torch.rand(site.n_units, generator=generator) for site in found}, 1, "random"))


@pytest.fixture(scope="module", params=["sukashi:cifar_resnet20", "sukashi:digits_cnn", "sukashi:digits_vit"])
def scene(request):
    """A model with random BatchNorm, a plan, and images."""
    torch.manual_seed(3)
    loaded = models.load(request.param)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    view = loaded.preprocess
    x = torch.randn(4, view.channels, view.height, view.width)
    return loaded, _plan(sites.find(loaded.model, x).sites), x


@pytest.fixture
def saved(tmp_path):
    """A cut digits_cnn and its folder."""
    torch.manual_seed(0)
    loaded = models.load("sukashi:digits_cnn")
    found = sites.find(loaded.model, torch.randn(2, 1, 8, 8)).sites
    small = pruning.cut(loaded, _plan(found).mask(0.5))
    save(tmp_path / "cut", small, provenance={"seed": 0})
    return small, tmp_path / "cut"


def _logits(model, x):
    with torch.no_grad():
        return model(x)


# Masks.


@st.composite
def _plans(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    found = [Site(f"layer{i}", "channel", size) for i, size in enumerate(sizes)]
    order = draw(st.permutations([(s, u) for s, size in enumerate(sizes) for u in range(size)]))
    return Plan.build(found, order, method="any")


@given(_plans(), st.floats(0, 0.999), st.integers(1, 12))
def test_round_mask(plan, ratio, round_to):
    exact, rounded = plan.mask(ratio), plans.round_mask(plan, ratio, round_to)
    for position, site in enumerate(plan.sites):
        kept, before = rounded.keep[site], exact.keep[site]
        # The slow definition: give back the last removed until the count fits.
        expected = before.clone()
        for unit in plan.unit[: exact.n_removed][plan.site[: exact.n_removed] == position][::-1]:
            if int(expected.sum()) % round_to == 0:
                break
            expected[int(unit)] = True
        assert torch.equal(kept, expected)
        assert int(kept.sum()) % round_to == 0 or kept.all()
        assert not (before & ~kept).any()


def test_round_mask_refuses():
    plan = _plan([Site("a", "channel", 8)])
    with pytest.raises(UsageError, match="`round_to` must be at least 1, got 0"):
        plans.round_mask(plan, 0.5, 0)
    with pytest.raises(UsageError, match="ratio must be in"):
        plans.round_mask(plan, 50)


def test_round_mask_leaves_the_exact_mask_alone():
    plan = _plan([Site("a", "channel", 20)])
    assert plans.round_mask(plan, 0.5, 1).n_removed == 10
    assert plans.round_mask(plan, 0.5).n_removed == 4


# Cut, save, load.


def test_a_saved_model_with_zeroed_units_is_the_masked_model_and_can_be_cut_further(scene, tmp_path):
    loaded, plan, x = scene
    mask = plan.mask(0.4)
    silent = pruning.cut(loaded, mask, "zero")
    save(tmp_path / "silent", silent, provenance={})
    back = models.load(str(tmp_path / "silent"))
    with hooks.ablated(loaded.model, mask):
        expected = _logits(loaded.model, x)
    assert (_logits(back.model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(_logits(back.model, x), _logits(silent.model, x))
    assert [p.shape for p in back.model.parameters()] == [p.shape for p in loaded.model.parameters()]
    save(tmp_path / "cut", pruning.cut(back, mask), provenance={})
    both = models.load(str(tmp_path / "cut"))
    assert (_logits(both.model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(p.numel() for p in both.model.parameters()) < sum(p.numel() for p in back.model.parameters())


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_saved_model_is_the_masked_model(scene, ratio, round_to, tmp_path):
    loaded, plan, x = scene
    mask = plans.round_mask(plan, ratio, round_to)
    before = models.digest(loaded.model)
    small = pruning.cut(loaded, mask)
    save(tmp_path / "deep" / "cut", small, provenance={"criterion": "random"})
    back = models.load(str(tmp_path / "deep" / "cut"))
    with hooks.ablated(loaded.model, mask):
        expected = _logits(loaded.model, x)
    assert (_logits(small.model, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(_logits(back.model, x), _logits(small.model, x))
    assert models.digest(loaded.model) == before
    assert models.digest(back.model) == models.digest(small.model) == small.weights_sha256 != before
    assert (back.spec, back.options, back.preprocess) == (loaded.spec, loaded.options, loaded.preprocess)
    assert (back.n_classes, back.class_names, back.cuts) == (loaded.n_classes, None, small.cuts)
    recipe = json.loads((tmp_path / "deep" / "cut" / "recipe.json").read_text())
    assert back.weights_sha256 == recipe["weights_sha256"]
    assert (recipe["provenance"], recipe["format"]) == ({"criterion": "random"}, FORMAT)
    assert sorted(os.listdir(tmp_path / "deep")) == ["cut"]


def test_a_saved_model_can_be_cut_again(scene, tmp_path):
    loaded, plan, x = scene
    save(tmp_path / "one", pruning.cut(loaded, plan.mask(0.3)), provenance={})
    once = models.load(str(tmp_path / "one"))
    twice = pruning.cut(once, _plan(sites.find(once.model, x).sites).mask(0.4))
    save(tmp_path / "two", twice, provenance={})
    back = models.load(str(tmp_path / "two"))
    assert len(back.cuts) == 2
    assert torch.equal(_logits(back.model, x), _logits(twice.model, x))


def test_equal_models_give_equal_bytes(saved, tmp_path):
    small, folder = saved
    save(tmp_path / "again", small, provenance={"seed": 0})
    for name in ("model.safetensors", "recipe.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_is_saved_is_its_contents_and_the_recipe_comes_last(saved, sparse_folder):
    for small, folder, names in (
        (*saved, ["model.safetensors", "recipe.json"]),
        (*sparse_folder, ["model.safetensors", "masks.safetensors", "recipe.json"]),
    ):
        files = models.contents(small, json.loads((folder / "recipe.json").read_text())["provenance"])
        assert list(files) == names, "a folder whose recipe is there is whole"
        assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_new_process_gives_the_same_logits(saved, tmp_path):
    small, folder = saved
    x = torch.randn(3, 1, 8, 8)
    safetensors.torch.save_file({"x": x}, tmp_path / "x")
    program = (
        "import sys, safetensors.torch as st\nfrom sukashi import models\n"
        "model = models.load(sys.argv[1]).model\n"
        "st.save_file({'y': model(st.load_file(sys.argv[2])['x']).detach()}, sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "x", tmp_path / "y"], check=True)
    torch.testing.assert_close(
        safetensors.torch.load_file(tmp_path / "y")["y"], _logits(small.model, x), rtol=1e-6, atol=1e-6
    )


def test_an_output_is_still_selected(tmp_path):
    loaded = models.load("test_models:with_dict", output="logits")
    found = sites.find(loaded.model, torch.randn(2, 1, 8, 8)).sites
    small = pruning.cut(loaded, _plan(found).mask(0.5))
    save(tmp_path / "cut", small, provenance={})
    with pytest.raises(ModelError, match="must not choose what code runs"):
        models.load(str(tmp_path / "cut"))
    back = models.load("test_models:with_dict", weights=tmp_path / "cut")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(_logits(back.model, x), _logits(small.model, x))
    with pytest.raises(ModelError, match="not a test_models:plain"):
        models.load("test_models:plain", weights=tmp_path / "cut")


# What is not believed.


def _edit(folder, change):
    recipe = json.loads((folder / "recipe.json").read_text())
    change(recipe)
    (folder / "recipe.json").write_text(json.dumps(recipe))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.update(provenence={}), "'provenence': did you mean 'provenance'"),
        (lambda r: r["model"].update(widht=3), r"model\.widht'?: did you mean 'width'"),
        (lambda r: r["preprocess"].update(man=[0.0]), r"preprocess\.man'?: did you mean 'mean'"),
        (lambda r: r.update(format=1), f"has format 1, this version reads {FORMAT}: save the network again"),
        (lambda r: r.update(format=FORMAT + 1), f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        (lambda r: r.pop("format"), "format"),
        (lambda r: r.update(figures={}), "unknown key 'figures'"),
        (lambda r: r.update(n_classes="10"), "n_classes"),
        (lambda r: r.pop("cuts"), "cuts"),
        (lambda r: r["cuts"][0].update(conv1={"out": ["0"]}), "cuts"),
        (lambda r: r["cuts"][0].update(conv9={"out": [0]}), "conv9"),
        (lambda r: r["cuts"][0]["conv1"].update(out=[99]), "conv1"),
        (lambda r: r["cuts"][0]["conv1"]["out"].pop(), "conv1"),
        (lambda r: r["cuts"].clear(), r"conv1\.weight \(.*\) instead of \(32"),
        (lambda r: r.update(n_classes=9), "gives 10 classes, 9"),
        (lambda r: r["preprocess"].update(channels=3, mean=[0.0] * 3, std=[1.0] * 3), "does not run on images"),
        (lambda r: r["model"].update(spec="os:abort"), "must not choose what code runs"),
        (lambda r: r["model"].update(spec="sukashi:digits_vit"), "lacks"),
    ],
)
def test_recipe_that_is_not_believed(saved, change, reason):
    _, folder = saved
    _edit(folder, change)
    with pytest.raises((ModelError, UsageError), match=reason):
        models.load(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["class_names"].reverse(),
        lambda r: r.update(class_names=None),
        lambda r: r["preprocess"].update(mean=[0.25]),
        lambda r: r["preprocess"].update(std=[2.0]),
        lambda r: r.update(sha256="0" * 64),
    ],
)
def test_a_recipe_that_could_be_and_is_not_as_it_was_written_is_refused(saved, change):
    small, folder = saved
    save(folder.parent / "named", replace(small, class_names=tuple("abcdefghij")), provenance={"of": "somebody"})
    _edit(folder.parent / "named", lambda recipe: recipe["provenance"].update(of="somebody else"))
    assert models.load(str(folder.parent / "named")).class_names == tuple("abcdefghij")
    _edit(folder.parent / "named", change)
    with pytest.raises(ModelError, match=r"recipe\.json is not as it was written, .* restore the folder"):
        models.load(str(folder.parent / "named"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_recipe_that_is_no_json(saved, content):
    _, folder = saved
    (folder / "recipe.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"recipe\.json is no recipe"):
        models.load(str(folder))


def test_weights_and_recipe_that_disagree(saved):
    small, folder = saved
    state = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    for name in ("fc1.weight", "conv3.weight"):
        state[name][0] += 1
    safetensors.torch.save_file(state, folder / "model.safetensors")
    said = json.loads((folder / "recipe.json").read_text())["weights_sha256"]
    with pytest.raises(ModelError, match=rf"{said[:16]}.*first tensor at fault: conv3\.weight"):
        models.load(str(folder))


def test_folder_with_something_missing(saved, tmp_path):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        models.load(str(folder))
    with pytest.raises(ModelError, match=r"recipe\.json"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("options", [{"n_classes": 3}, {"width": 8}, {"pretrained": True}, {"output": "0"}])
def test_a_folder_brings_its_own_options(saved, options):
    _, folder = saved
    name = next(iter(options)).removeprefix("n_")  # as the command line has it
    with pytest.raises(UsageError, match=name):
        models.load(str(folder), **options)
    with pytest.raises(UsageError, match=name):
        models.load("sukashi:digits_cnn", weights=folder, **options)


# Masks of single weights.


def _sparse(loaded, ratio=0.6, scope="global", criterion="random", **options):
    found, view = sites.weights(loaded.model), loaded.preprocess
    x = torch.randn(6, view.channels, view.height, view.width, generator=torch.Generator().manual_seed(1))
    data = Batch(x, torch.zeros(6, dtype=torch.long), tuple("abcdef"))
    mask = pruning.weight_mask(
        loaded, found, data, criterion, ratio, scope, generator=torch.Generator().manual_seed(0), **options
    )
    return pruning.sparse(loaded, mask), data


@pytest.fixture
def sparse_folder(tmp_path):
    """A sparse digits_cnn and its folder."""
    torch.manual_seed(0)
    small, _ = _sparse(models.load("sukashi:digits_cnn", width=8))
    save(tmp_path / "sparse", small, provenance={})
    return small, tmp_path / "sparse"


def test_a_sparse_model_comes_back_with_its_mask_to_the_byte(sparse_folder, tmp_path):
    small, folder = sparse_folder
    back = models.load(str(folder))
    assert list(back.mask.keep) == list(small.mask.keep)
    for site, keep in small.mask.keep.items():
        assert torch.equal(back.mask.keep[site], keep)
        assert (back.model.get_submodule(site.layer).weight[~keep] == 0).all()
    again = replace(back, class_names=small.class_names)
    save(tmp_path / "again", again, provenance={})
    names = {"model.safetensors", "masks.safetensors", "recipe.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    n_weights = sum(site.n_units for site in small.mask.keep)
    assert (folder / "masks.safetensors").stat().st_size < n_weights / 8 + 600, "a bit a weight, and a header"


def test_a_network_without_a_mask_is_saved_without_one(saved):
    _, folder = saved
    assert json.loads((folder / "recipe.json").read_text())["mask"] is None
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "recipe.json"}
    assert models.load(str(folder)).mask is None


def _forged(folder, change):
    """Masks changed by someone who keeps the recipe's hash right."""
    packed = safetensors.torch.load_file(folder / "masks.safetensors")
    change(packed)
    content = safetensors.torch.save(packed)
    (folder / "masks.safetensors").write_bytes(content)
    _edit(folder, lambda r: r["mask"].update(sha256=hashlib.sha256(content).hexdigest()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "masks.safetensors").unlink(), r"cannot read weights .*masks\.safetensors"),
        (
            lambda folder: (folder / "masks.safetensors").write_bytes(b"x" * 40),
            r"masks\.safetensors is no intact safetensors file",
        ),
        (lambda folder: _edit(folder, lambda r: r["mask"].update(sha256="0" * 64)), "SHA-256 .*its recipe says 0000"),
        (lambda folder: _edit(folder, lambda r: r["mask"].update(shap={})), r"mask\.shap'?: did you mean 'shapes'"),
        (
            lambda folder: _edit(folder, lambda r: r["mask"]["shapes"].update(fc2=[16, 10])),
            r"layer 'fc2' has shape \(16, 10\) in it and \(10, 16\) in the",
        ),
        (
            lambda folder: _edit(folder, lambda r: r["mask"]["shapes"].update(fc2=[10, 99])),
            "mask of layer 'fc2' has .* for 990 weights",
        ),
        (lambda folder: _edit(folder, lambda r: r["mask"]["shapes"].pop("fc2")), "mask of layer 'fc2' has bits only"),
        (lambda folder: _forged(folder, lambda m: m.pop("fc2")), "mask of layer 'fc2' has a shape only"),
        (lambda folder: _forged(folder, lambda m: m["fc1"].zero_()), r"\d+ weights of layer 'fc1' .* are not zero"),
    ],
)
def test_a_mask_that_is_not_believed(sparse_folder, change, reason):
    _, folder = sparse_folder
    models.load(str(folder))
    change(folder)
    with pytest.raises(ModelError, match=reason):
        models.load(str(folder))


def test_a_mask_of_another_architecture_is_put_on_no_model(sparse_folder):
    small, _ = sparse_folder
    other = models.load("sukashi:digits_cnn", width=16)
    with pytest.raises(ModelError, match="the mask is for another architecture: layer 'conv1' has shape"):
        pruning.sparse(other, small.mask)


def test_a_sparse_folder_runs_semi_structured_where_a_gpu_does(tmp_path):
    torch.manual_seed(0)
    dense = models.load("sukashi:digits_vit", width=128)
    small, _ = _sparse(dense, 0.5, "2:4")
    # Ten outputs are no size that torch takes.
    mask = Mask({site: keep for site, keep in small.mask.keep.items() if site.layer != "head"})
    save(tmp_path / "sparse", replace(small, mask=mask), provenance={})
    loaded = models.load(str(tmp_path / "sparse"))
    with pytest.raises(UsageError, match="digits_vit has no mask of single weights: prune with `scope='2:4'`"):
        models.semi_structured(dense)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        with pytest.raises(ResourceError, match=r"compute capability 8\.0 or newer"):
            models.semi_structured(loaded)
    else:
        x = torch.randn(64, 1, 8, 8)
        found = models.semi_structured(loaded)(x.half().cuda()).float().cpu()
        torch.testing.assert_close(found, loaded.model(x), rtol=2e-2, atol=2e-2)
    assert loaded.model.head.weight.dtype == torch.float32


def test_units_cut_from_a_sparse_model_take_their_masks_along(sparse_folder, tmp_path):
    small, _ = sparse_folder
    plan = _plan(sites.find(small.model, torch.randn(2, 1, 8, 8)).sites)
    for mode in ("cut", "zero"):
        cut = pruning.cut(small, plan.mask(0.5), mode)
        for site, keep in cut.mask.keep.items():
            weight = cut.model.get_submodule(site.layer).weight
            # Random weights are never zero by themselves.
            assert torch.equal(keep, weight != 0)
        save(tmp_path / mode, cut, provenance={})
        back = models.load(str(tmp_path / mode))
        assert back.mask.n_removed == cut.mask.n_removed


def test_sparser_and_sparser(sparse_folder):
    small, _ = sparse_folder
    more, _ = _sparse(small, 0.8)
    assert more.mask.n_removed == int(0.8 * more.mask.n_units)
    assert all(not (more.mask.keep[site] & ~keep).any() for site, keep in small.mask.keep.items())
    with pytest.raises(UsageError, match="has lost more weights already"):
        _sparse(small, 0.3)
    part = Mask({site: keep for site, keep in more.mask.keep.items() if site.layer == "fc1"})
    both = pruning.sparse(small, part)
    assert both.mask.keep.keys() == small.mask.keep.keys()
    assert both.mask.n_removed > small.mask.n_removed


@pytest.mark.parametrize("spec", ["sukashi:digits_cnn", "sukashi:digits_vit"])
def test_sequential_scores_each_layer_with_those_before_it_pruned(spec):
    torch.manual_seed(0)
    loaded = models.load(spec, width=8)
    before = models.digest(loaded.model)
    small, data = _sparse(loaded, 0.5, "row", "wanda", sequential=True)
    model = copy.deepcopy(loaded.model)
    once, _ = _sparse(loaded, 0.5, "row", "wanda")
    order = [name for name in hooks.calls(model, data.x) if name in {site.layer for site in small.mask.keep}]
    assert len(order) == len(small.mask.keep) > 3
    for name in order:
        with hooks.read_by(model, name) as read, torch.no_grad():
            model(data.x)
        layer = model.get_submodule(name)
        x = read[0].double()
        windows = (
            x
            if isinstance(layer, torch.nn.Linear)
            else torch.nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        )
        norms = windows.flatten(0, -2).square().sum(0).sqrt()
        (site,) = (site for site in small.mask.keep if site.layer == name)
        rows = layer.weight.detach().double().flatten(1).abs() * norms
        k = rows.shape[1] // 2
        expected = torch.ones_like(rows, dtype=torch.bool)
        expected.scatter_(1, rows.sort(dim=1, stable=True).indices[:, :k], False)
        assert torch.equal(small.mask.keep[site], expected.view(layer.weight.shape))
        layer.weight.data.mul_(expected.view(layer.weight.shape))
    assert list(small.mask.keep) == list(once.mask.keep)
    assert any(not torch.equal(small.mask.keep[site], once.mask.keep[site]) for site in once.mask.keep)
    assert models.digest(loaded.model) == before


@pytest.mark.parametrize(
    ("criterion", "scope", "words"),
    [("magnitude", "row", "magnitude looks at no image"), ("wanda", "global", "`scope='global'` compares all layers")],
)
def test_sequential_without_meaning(criterion, scope, words):
    with pytest.raises(UsageError, match=words):
        _sparse(models.load("sukashi:digits_cnn", width=8), 0.5, scope, criterion, sequential=True)


# What is not written.


def test_an_existing_folder_is_left_alone(saved, tmp_path):
    small, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="exists"):
        save(folder, small, provenance={"other": 1})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists"):
        save(tmp_path / "link", small, provenance={})


def test_provenance_that_is_no_json(saved, tmp_path):
    small, _ = saved
    with pytest.raises(ValueError, match="JSON compliant"):
        save(tmp_path / "nan", small, provenance={"ratio": float("nan")})
    assert not (tmp_path / "nan").exists()


class Full:
    """A disk that fails at its n-th operation."""

    def __init__(self, monkeypatch, n):
        self.left = n
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))
        opened = builtins.open
        monkeypatch.setattr(Path, "open", self.failing(lambda path, mode: opened(path, mode)))

    def failing(self, true):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return true(*args, **kwargs)

        return call


@pytest.mark.parametrize("n", range(1, 10))
def test_a_full_disk_leaves_nothing_behind(saved, tmp_path, monkeypatch, n):
    small, _ = saved
    place = tmp_path / "place"
    place.mkdir()
    with monkeypatch.context() as patched:
        disk = Full(patched, n)
        with pytest.raises(ResourceError, match="no space left"):
            save(place / "cut", small, provenance={})
    assert disk.left == 0
    # Only the last operation, syncing the parent after the rename, leaves the whole folder.
    assert os.listdir(place) == (["cut"] if n == 9 else [])


def test_a_place_without_rights(saved, tmp_path):
    small, folder = saved
    with pytest.raises(ResourceError, match=r"recipe\.json"):
        save(folder / "recipe.json" / "cut", small, provenance={})


# ONNX.


@pytest.mark.slow
def test_onnx(scene):
    onnxruntime = pytest.importorskip("onnxruntime")
    loaded, plan, x = scene
    small = pruning.cut(loaded, plan.mask(0.5))
    content = onnx_file(small)
    session = onnxruntime.InferenceSession(content)
    for batch in (x, x[:1], x.repeat(3, 1, 1, 1)):
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        expected = _logits(small.model, batch).numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert not [word for word in (b"stack_trace", b".py", b"site-packages", b"/src/") if word in content]


def test_onnx_without_the_extra(saved, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"sukashi\[onnx\]"):
        onnx_file(saved[0])


def test_onnx_that_gives_other_logits_is_refused(saved, monkeypatch):
    pytest.importorskip("onnxruntime")
    true = torch.onnx.export

    def wrong(model, *args, **kwargs):
        other = copy.deepcopy(model)
        other.fc2.bias.data += 1
        return true(other, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(ModelError, match="onnxruntime gives logits"):
        onnx_file(saved[0])
