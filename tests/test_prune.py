"""Networks cut for real or made sparse: loaded again they are what was planned, and figures are measured."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sukashi
from sukashi import data as datasets
from sukashi import models
from sukashi.cli.main import app
from sukashi.core.errors import ModelError, UsageError
from sukashi.criteria import plans, pruning
from sukashi.criteria.plans import plan_of
from sukashi.experiments.kinds import spelled
from sukashi.experiments.prune.summary import PruneResult
from sukashi.experiments.workspace import Workspace
from sukashi.measures import accuracy
from sukashi.network import hooks
from sukashi.report.networks import timed

SPEC = "sukashi:digits_cnn"
CUT = {"calibration": 8, "test_images": 50, "width": 8}
ELSEWHERE = """
import sys, torch, sukashi
folder, images, logits = sys.argv[1:]
loaded = sukashi.load(folder)
with torch.no_grad():
    torch.save(loaded.model(torch.load(images, weights_only=True)), logits)
"""


def prune(criterion, ratio, out, weights, **settings):
    return sukashi.prune(SPEC, "digits", criterion, ratio, out=out, weights=weights, **{**CUT, **settings})


def plan(out, sites):
    """What was kept of the order in which units went."""
    return plan_of(Workspace(out).records()[0].arrays("plan"), sites)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def right(model, test):
    with torch.no_grad():
        return (model(test.x).argmax(1) == test.target).double()


def test_images(preprocess, n):
    return datasets.load("digits").test.limit(n).whole(preprocess)


test_images.__test__ = False


@pytest.mark.slow
def test_a_cut_model_loaded_in_a_new_process_is_the_masked_model(small, cnn_weights, tmp_path):
    case, out = small["cnn"], tmp_path / "cut"
    result = prune("drift", 0.5, out, cnn_weights, round_to=4, calibration=4, test_images=2000)
    torch.save(case.data.x, tmp_path / "images.pt")
    arguments = [str(out), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, timeout=100)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)

    mask = plans.round_mask(plan(out, case.sites), 0.5, 4)
    test = test_images(case.loaded.preprocess, 2000)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected, masked = case.model(case.data.x), right(case.model, test)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert 0.2 < result.units_removed == mask.n_removed / 32 < 0.5
    assert result.ratio_asked == 0.5
    assert result.weights_removed is None
    n_cut = sum(p.numel() for p in models.load(str(out)).model.parameters())
    assert (result.dense["parameters"], result.pruned["parameters"]) == (3506, n_cut)
    assert result.parameters_removed == pytest.approx(1 - n_cut / 3506)
    assert n_cut < 3506
    assert result.n_images == len(test)
    assert result.pruned["accuracy"] == pytest.approx(masked.mean().item())
    assert result.dense["accuracy"] == pytest.approx(right(case.model, test).mean().item())
    for row in result.classes["rows"]:
        own = test.target == int(row["name"])
        assert row["n"] == int(own.sum())
        assert row["pruned"]["sensitivity"]["mean"] == pytest.approx(masked[own].mean().item())
    assert len(result.classes["rows"]) == 10
    counts = np.array(result.classes["confusion"]["pruned"])
    assert counts.sum() == len(test)
    assert np.diag(counts).sum() == masked.sum()
    change = result.classes["accuracy_change"]
    assert change["low"] <= result.pruned["accuracy"] - result.dense["accuracy"] <= change["high"]
    with torch.no_grad():
        odds = models.load(str(out)).model(test.x).softmax(1)
    surer = float((odds.amax(1) - (odds.argmax(1) == test.target).float()).mean())
    assert result.classes["overconfidence"]["pruned"]["mean"] == pytest.approx(surer, abs=1e-5)
    assert result.pruned["bytes"] == (out / "model.safetensors").stat().st_size
    assert Path(result.report).is_file()
    assert [*result.latency] == ["1", "32"], "what a device sees at a time, and what keeps a machine busy"
    assert all(of["low"] <= of["factor"] <= of["high"] for of in result.latency.values())


def test_what_lies_in_the_folder(cnn_weights, tmp_path):
    out = tmp_path / "cut"
    result = prune("magnitude", 0.5, out, cnn_weights)
    assert set(contents(out)) == {
        *("experiment.json", "trial.json", "log.jsonl", ".lock", "results.json", "results.parquet", "report.html"),
        *("model.safetensors", "recipe.json", "plan.npz", "answers.npz", "figures/layers.png", "figures/layers.svg"),
        *(
            f"tables/{name}.{form}"
            for name in ("all-classes", "classes", "confusion-dense", "confusion-pruned", "costs", "layers", "settings")
            for form in ("csv", "tex")
        ),
    }
    (record,) = Workspace(out).records()
    assert record.folder == out
    assert set(record.kept["artefacts"]) == {"model.safetensors", "recipe.json", "plan.npz", "answers.npz"}
    provenance = json.loads((out / "recipe.json").read_text())["provenance"]
    found = {"ratio": 0.5, "target": None, "layers": result.layers}
    assert provenance == {**record.about, **found, "units_removed": result.units_removed}


def test_a_finished_cut_is_told_again_and_another_is_refused(cnn_weights, tmp_path, monkeypatch):
    out = tmp_path / "cut"
    result = prune("magnitude", 0.5, out, cnn_weights)
    assert not result.finished
    before = contents(out)
    with pytest.raises(UsageError, match=r"another trial: ratio_asked was 0\.5, now 0\.4; choose another `out`"):
        prune("magnitude", 0.4, out, cnn_weights)
    assert contents(out) == before
    monkeypatch.setattr(pruning, "cut", None)
    again = prune("magnitude", 0.5, out, cnn_weights)
    assert again.finished
    assert again == result.model_copy(update={"finished": True})
    after = contents(out)
    assert [name for name in before if after[name] != before[name]] == ["log.jsonl"]
    assert sukashi.results(out).to_json() == result.to_json()
    told = json.loads(before["results.json"])
    assert told == {name: value for name, value in result.to_json().items() if name not in PruneResult.of_call}


def test_a_zeroed_model_loads_as_a_dense_one_with_silent_units(small, cnn_weights, tmp_path):
    case, out = small["cnn"], tmp_path / "zeroed"
    result = prune("taylor", 0.4, out, cnn_weights, mode="zero")
    back = models.load(str(out))
    mask = plan(out, case.sites).mask(0.4)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected = case.model(case.data.x)
    with torch.no_grad():
        found = back.model(case.data.x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [p.shape for p in back.model.parameters()] == [p.shape for p in case.model.parameters()]
    assert result.units_removed == mask.n_removed / 32 == 13 / 32, "nothing is rounded"
    assert (result.pruned["parameters"], result.parameters_removed) == (3506, 0)
    assert "Units were zeroed" in re.sub("<[^>]*>", "", (out / "report.html").read_text())


def test_a_sparse_model_has_the_figures_of_its_zeros(small, cnn_weights, tmp_path):
    case, out = small["cnn"], tmp_path / "sparse"
    scope = {"scope": "row", "exclude": ["conv1"], "sequential": True}
    result = prune("wanda", 0.5, out, cnn_weights, **scope)
    told = result.to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    back = models.load(str(out))
    kept = {name: layer for name, layer in case.model.named_modules() if hasattr(layer, "weight") and name != "conv1"}
    n_removed = n_weights = 0
    for row in result.layers:
        before, after = kept[row["layer"]].weight, back.model.get_submodule(row["layer"]).weight
        rows = before.flatten(1)
        assert row == {
            "layer": row["layer"],
            "shape": list(before.shape),
            "weights": before.numel(),
            "removed": len(rows) * (rows.shape[1] // 2),
        }
        assert ((after == 0).flatten(1).sum(1) == rows.shape[1] // 2).all()
        assert torch.equal(after, before * (after != 0))
        n_removed, n_weights = n_removed + row["removed"], n_weights + row["weights"]
    assert torch.equal(back.model.conv1.weight, case.model.conv1.weight)
    assert [site.layer for site in back.mask.keep] == [row["layer"] for row in result.layers]
    assert result.weights_removed == result.pruned["zeros_in_masked_layers"] == n_removed / n_weights
    assert (result.units_removed, result.scope, result.mode) == (None, "row", "sparse")
    assert result.pruned["zeros_in_all"] == n_removed / 3506
    assert (result.dense["zeros_in_all"], result.dense["zeros_in_masked_layers"]) == (0, 0)
    assert [result.pruned[name] for name in ("parameters", "bytes", "flops")] == [
        result.dense[name] for name in ("parameters", "bytes", "flops")
    ]
    assert result.parameters_removed == 0
    test = test_images(back.preprocess, 50)
    assert result.pruned["accuracy"] == pytest.approx(right(back.model, test).mean().item())
    assert "Masked zeros are not compression" in (out / "report.html").read_text()
    assert "Masked zeros are not compression" in result.text()
    assert "fc1 " in result.text()
    read = {"calibration": 8, "test_images": 50}
    more = {"scope": "layer", "exclude": ["conv1"], "out": tmp_path / "more"}
    again = sukashi.prune(str(out), "digits", "magnitude", 0.7, **more, **read)
    assert again.pruned["zeros_in_masked_layers"] == pytest.approx(0.7, abs=0.01)
    assert again.dense["zeros_in_all"] == result.pruned["zeros_in_all"]


def test_what_is_printed_and_the_table(cnn_weights, tmp_path):
    result = prune("magnitude", 0.5, tmp_path / "cut", cnn_weights)
    clock = {"32": timed([{"dense_ms": [2.0] * 6, "cut_ms": [3.0] * 6}])}
    result = result.model_copy(update={"latency": clock})
    text = result.text()
    for noun, values in {
        "accuracy on 50 test images": (
            f"{100 * result.dense['accuracy']:.1f}%",
            f"{100 * result.pruned['accuracy']:.1f}%",
        ),
        "latency, ms (median), of 32 images": ("2.00", "3.00"),
        "  × dense, median of pairs of passes": ("1.50", "(1.50", "to", "1.50)"),
        "units removed": (f"{100 * result.units_removed:.1f}%", "(8", "of", "32)"),
        "parameters removed": (f"{100 * result.parameters_removed:.1f}%",),
    }.items():
        (line,) = (line for line in text.splitlines() if line.startswith(noun + " "))
        assert line.removeprefix(noun).split() == list(values)
    assert "weights removed" not in text
    assert (
        "warning: pruned, 32 images at once: the cut network takes 1.50 (1.50 to 1.50) times as long as the dense one"
        in text
    )
    assert f"Accuracy on 50 test images goes from {100 * result.dense['accuracy']:.1f}% to" in text
    told = f"`sukashi.finetune(model='{result.out}', data='digits', test_images=50, out='{result.out}-tuned')`"
    said = [f"Saved: {result.out}", f"Fine-tune what is left: {told}", "", f"Report: {result.report}"]
    assert text.endswith("\n".join(said))
    zeroed = result.model_copy(update={"mode": "zero"})
    assert "times as long" not in zeroed.text(), "a clock's noise is no finding"
    table = result.table()
    assert [row["network"] for row in table] == ["dense", "pruned"]
    assert table[1]["accuracy"] == result.pruned["accuracy"]
    assert table[0].keys() == table[1].keys()


@pytest.mark.slow
def test_the_last_words_are_what_trains_the_network_on(cnn_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = prune("magnitude", 0.5, "my cut", cnn_weights, skip_bad=True, max_pixels=100)
    eval(f"{result.tuning[:-1]}, epochs=1)")
    tuned = sukashi.results("my cut-tuned")
    assert (tuned.n_images, tuned.accuracy_before) == (50, result.pruned["accuracy"]), "on the same images"
    shutil.rmtree("my cut-tuned")
    (line,) = [line for line in spelled(result.text()).splitlines() if line.startswith("Fine-tune")]
    command = line.partition("`")[2].rstrip("`")
    assert command.startswith("sukashi finetune 'my cut' --data digits --skip-bad --max-pixels 100 --test-images 50 ")
    assert app([*shlex.split(command)[1:], "--epochs", "1"], standalone_mode=False) in (None, 0)
    assert sukashi.results("my cut-tuned").accuracy == tuned.accuracy


@pytest.mark.slow
def test_onnx_agrees_with_the_masked_model_and_may_come_later(small, cnn_weights, tmp_path):
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'sukashi[onnx]'")
    import onnxruntime

    case, out = small["cnn"], tmp_path / "cut"
    without = prune("magnitude", 0.5, out, cnn_weights)
    assert without.onnx is None
    before = contents(out)
    result = prune("magnitude", 0.5, out, cnn_weights, onnx=True)
    assert (result.onnx, result.infer, result.finished) == ("onnx/model.onnx", "onnx/infer.py", False)
    assert result.onnx_bytes == (out / result.onnx).stat().st_size
    assert without.onnx_latency == {}
    assert [*result.onnx_latency] == [*result.latency] == ["1", "32"]
    assert "latency, ms (median), the ONNX file, of 1 image " in result.text()
    assert len(Workspace(out).logged("latency")) == 4, "timed beside the ONNX file anew, and not a third time"
    assert (out / "onnx" / "infer.py").read_bytes() == models.infer_script(case.loaded.preprocess)
    line = f"python {out}/onnx/infer.py {out}/onnx/model.onnx IMAGE ..."
    assert line in result.text()
    assert line.replace(f"{out}/", "") in (out / "report.html").read_text()
    for name in ("model.safetensors", "recipe.json", "trial.json", "plan.npz"):
        assert (out / name).read_bytes() == before[name], "the network that was there is kept"
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": case.data.x.numpy()})
    mask = plans.round_mask(plan(out, case.sites), 0.5)
    with torch.no_grad(), hooks.ablated(case.model, mask):
        expected = case.model(case.data.x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    first, second = Workspace(out).records()
    assert second.kept["needs"] == [first.key]
    assert second.has("model.onnx")
    assert prune("magnitude", 0.5, out, cnn_weights).finished


def test_onnx_of_a_sparse_model(cnn_weights, tmp_path):
    pytest.importorskip("onnxruntime")
    sparse = {"scope": "2:4", "exclude": ["conv1"], "onnx": True}
    result = prune("magnitude", 0.5, tmp_path / "o", cnn_weights, **sparse)
    assert (tmp_path / "o" / result.onnx).exists()


def test_an_export_that_fails_leaves_the_network(cnn_weights, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def refuse(*args, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match=r"torch cannot export sukashi:digits_cnn to ONNX \(\w+: no such operator\)"):
        prune("magnitude", 0.5, tmp_path / "o", cnn_weights, onnx=True)
    assert models.load(str(tmp_path / "o")).cuts
    assert not list(tmp_path.glob("o/onnx/*"))
    assert sukashi.results(tmp_path / "o").onnx is None
    (tmp_path / "o" / "onnx").mkdir(exist_ok=True)
    (tmp_path / "o" / "onnx" / "model.onnx").write_text("of an export by itself")
    with pytest.raises(ModelError, match=r"o is finished, `sukashi.results\('.*o'\)` tells of it, and the same"):
        prune("magnitude", 0.5, tmp_path / "o", cnn_weights, onnx=True)
    assert (tmp_path / "o" / "onnx" / "model.onnx").read_text() == "of an export by itself"


def test_a_layer_without_weights_is_said(cnn_weights, tmp_path):
    result = prune("random", 0.999, tmp_path / "o", cnn_weights, scope="global")
    assert any("has no weight left" in said for said in result.warnings)
    assert any(line.startswith("warning: layer ") for line in result.text().splitlines())


def test_a_layer_that_is_excluded_keeps_its_units(cnn_weights, tmp_path):
    result = prune("random", 0.5, tmp_path / "out", cnn_weights, exclude=["conv1"], round_to=1)
    model = sukashi.load(tmp_path / "out").model
    assert model.conv1.out_channels == sukashi.load(SPEC, weights=cnn_weights, width=8).model.conv1.out_channels == 8
    assert model.fc1.out_features < 32
    assert result.units_removed == pytest.approx(0.5, abs=0.01)  # of the units of the other layers


def test_rounding_that_gives_much_back_is_said(cnn_weights, tmp_path):
    result = prune("random", 0.5, tmp_path / "o", cnn_weights)
    assert any("50.0% were asked for: widths are rounded up to multiples of 8" in said for said in result.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "zero", "round_to": 8}, "`round_to` is for widths, and `mode='zero'` changes none, got 8"),
        ({"exclude": ["conv9"]}, "no site has a layer 'conv9' to exclude: did you mean"),
        ({"exclude": ["fc2"]}, "nothing of layer 'fc2' would be cut"),
        ({"exclude": ["conv1", "conv2", "conv3", "fc1"]}, "no site is left: exclude fewer layers"),
        ({"sequential": True}, "`sequential` is for single weights: give a `scope` too"),
        ({"scope": "row", "mode": "zero"}, "`mode='zero'` is for units, and `scope='row'` removes single weights"),
        ({"scope": "row", "round_to": 4}, "`round_to` is for units, and `scope='row'` removes single weights"),
        ({"scope": "row", "sequential": True}, "magnitude looks at no image"),
        ({"scope": "colum"}, "scope"),
        ({"scope": "2:4", "ratio": 0.4}, "2:4"),
        ({"scope": "row", "exclude": ["conv9"]}, "no convolution or linear layer 'conv9' to exclude"),
        ({"criterion": "wanda"}, "wanda scores sites of kind weight"),
        ({"criterion": "drift", "scope": "row"}, "drift scores sites of kind"),
        ({"options": {"alpha": 0.1}}, "magnitude has no option 'alpha'"),
        ({"sampling": "randm"}, "unknown sampling 'randm': did you mean 'random'"),
        ({"round_to": 0}, "`round_to` must be at least 1, got 0"),
        ({"ratio": 1}, r"ratio must be in \[0, 1\), got 1"),
    ],
    ids=str,
)
def test_a_cut_without_meaning_is_refused_before_anything_is_written(cnn_weights, tmp_path, change, message):
    given = {"criterion": "magnitude", "ratio": 0.5, "out": tmp_path / "out", "weights": cnn_weights, **CUT, **change}
    with pytest.raises((UsageError, ModelError), match=message):
        sukashi.prune(SPEC, "digits", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_breaks_on_the_test_images_leaves_nothing(cnn_weights, tmp_path, monkeypatch):
    def broken(model, batch):
        raise ModelError("the network gives NaN or Inf on test images")

    monkeypatch.setattr(accuracy, "outputs", broken)
    with pytest.raises(ModelError, match="NaN or Inf"):
        prune("magnitude", 0.5, tmp_path / "out", cnn_weights)
    assert not (tmp_path / "out").exists()


def test_a_network_that_may_be_guessing_is_told_what_was_assumed_of_it(cnn_weights, tmp_path):
    right = prune("magnitude", 0.5, tmp_path / "right", cnn_weights)
    assert not [said for said in right.warnings if "one answer for all" in said]
    tensors = load_file(cnn_weights)
    last = max((name for name in tensors if tensors[name].ndim == 2), key=list(tensors).index)
    save_file({**tensors, last: tensors[last].roll(1, 0)}, tmp_path / "shifted.safetensors")
    wrong = prune("magnitude", 0.5, tmp_path / "wrong", tmp_path / "shifted.safetensors")
    [said] = [said for said in wrong.warnings if "one answer for all" in said]
    assert (
        "images read as 8 x 8, mean 0, std 1, whole images resized, aspect ratio not kept (sukashi's defaults" in said
    )
    assert "numbered as 0, 1, 2, 3, ..." in said


def test_a_cut_that_leaves_a_guess_says_which_layers_are_worn_and_what_may_keep_more(small, cnn_weights, tmp_path):
    given = {"weights": cnn_weights, "data": "digits", "width": 8, "calibration": 4, "test_images": 200, "round_to": 1}
    found = sukashi.prune("sukashi:digits_cnn", criterion="random", ratio=0.9, out=tmp_path / "a", **given)
    (told,) = (warning for warning in found.warnings if "after the cut" in warning)
    least = [of["layer"] for of in found.layers if of["kept"] == 1]
    assert least
    assert all(name in told for name in least)
    remedies = f"`criterion='drift'`, `repair='refit'`, `exclude={least!r}` or a smaller cut may keep more"
    assert told.endswith(f"no more than must stay. {remedies}")
    kept = sukashi.prune("sukashi:digits_cnn", criterion="drift", ratio=0.1, out=tmp_path / "b", **given)
    assert not [warning for warning in kept.warnings if "after the cut" in warning]


def test_several_criteria_and_percentages_are_told_what_is_meant():
    given = {"model": "m", "data": "d", "out": "o"}
    with pytest.raises(UsageError, match=r"`criterion` is one, got 'drift,taylor': .* `sukashi.compare`, which takes"):
        sukashi.prune(**given, criterion="drift,taylor", ratio=0.5)
    with pytest.raises(UsageError, match=r"`target_flops` must be in \(0, 1\), got 50.0; 50% is 0.5$"):
        sukashi.prune(**given, criterion="drift[share=0.2,steps=3]", target_flops=50.0)
    with pytest.raises(UsageError, match=r"or with a scope of weights; 30% is 0.3$"):
        sukashi.prune(**given, criterion="drift", ratio=30)
