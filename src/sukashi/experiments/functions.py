"""The functions of the face: keywords become settings, and settings are executed.

Where `out` is not given results go into a new folder for temporary files, which `result.out` names. How far long work
is shows on a terminal and in a notebook; `sukashi.core.progress.listening` shows it elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from sukashi import data as images
from sukashi import models
from sukashi.attributions import attributions
from sukashi.core import progress
from sukashi.core.errors import UsageError, nearest
from sukashi.core.experiment import Result
from sukashi.core.objective import CLASSIFICATION
from sukashi.core.schema import Settings, call_of, keyworded, keywords
from sukashi.core.types import Preprocess, Site
from sukashi.criteria import pruning
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.bench import Bench, Source
from sukashi.experiments.check import run as checking
from sukashi.experiments.check.run import CheckResult
from sukashi.experiments.check.settings import Check
from sukashi.experiments.compare.settings import Compare
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.concepts.settings import Concepts
from sukashi.experiments.concepts.summary import ConceptsResult
from sukashi.experiments.executor import conclude, execute, part
from sukashi.experiments.export import run as exporting
from sukashi.experiments.export.run import ExportResult
from sukashi.experiments.export.settings import Export
from sukashi.experiments.kinds import kinds
from sukashi.experiments.prune.settings import Prune
from sukashi.experiments.prune.summary import PruneResult
from sukashi.experiments.reading import Pixels, Reading
from sukashi.experiments.schedule.settings import Schedule
from sukashi.experiments.schedule.summary import ScheduleResult
from sukashi.experiments.study.file import read
from sukashi.experiments.study.summary import StudyResult
from sukashi.experiments.train.settings import Finetune, Train
from sukashi.experiments.train.summary import TrainResult
from sukashi.experiments.workspace import EXPERIMENT, Workspace
from sukashi.models import Loaded
from sukashi.network.sites import input_site
from sukashi.report import waiting, words
from sukashi.training.distributed import from_first

# A name, a saved folder, a module, or a network as `load` and `Ranking.cut` give it.
Network = str | Path | nn.Module | Loaded
# A name, a folder, tensors (images, targets), a torch Dataset or DataLoader, or {"train": such, "test": such}.
Images = Any
_Found = TypeVar("_Found")


def _spelled(function: Callable[..., _Found]) -> Callable[..., _Found]:
    """A function that names the nearest of its keywords where it is given one that it does not have."""

    @functools.wraps(function)
    def checked(*given: Any, **named: Any) -> _Found:
        known = inspect.signature(function).parameters
        for name in named:
            if name not in known:
                raise UsageError(f"sukashi.{function.__name__} has no keyword {name!r}{nearest(name, known)}")
        return function(*given, **named)

    return checked


@_spelled
def load(
    model: Network,
    *,
    weights: str | Path | None = None,
    n_classes: int | None = None,
    width: int | None = None,
    pretrained: bool = False,
    output: str | None = None,
    size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resize: str | None = None,
) -> Loaded:
    """A network, ready to run: `.model` is a module in eval mode, `.preprocess` what it expects of an image.

    `model` is a spec (`sukashi:NAME`, `timm:NAME`, `torchvision:NAME`, `package.module:callable`), a folder that one of
    our commands wrote, or a module; with a module, or an import path, `weights` may be a folder that was made from it.
    `size` (a side, or height and width), `mean` and `std` (a number a channel, or one for all) and `resize` ("squash",
    "crop" or "crop:N") say how images are read where the weights were trained otherwise than is usual.

    Raises UsageError for a spec or option that does not exist, ModelError for weights, recipes and models that break a
    rule. No input is unpickled.
    """
    given: Any = {"n_classes": n_classes, "width": width, "pretrained": pretrained, "output": output}
    read = keywords(Pixels, {"size": size, "mean": mean, "std": std, "resize": resize})
    weights = None if weights is None else Path(weights).expanduser()
    return models.load(_named(model, None), weights=weights, **given, **dict(read))


@keyworded(Reading)
def open(model: Network, data: Images, **settings: Any) -> Bench:
    """A model and data, loaded and found to fit each other, for a notebook.

    `bench.sites` is what can be cut, `bench.rank("drift")` the order in which units go, `.cut(0.5)` of that the network
    without half of them, `bench.accuracy(network)` the share of test images it gets right.

    Raises UsageError for settings that do not exist, and whatever loading raises.
    """
    source = Source.of(keywords(Reading, _given(model=model, data=data, **settings)))
    with waiting.shown():
        return source.open()


@keyworded(Reading)
def repair(
    cut: Network,
    model: Network,
    data: Images,
    repair: str = "refit",
    *,
    seed: int = 0,
    sampling: str = "random",
    **settings: Any,
) -> Loaded:
    """A network that was cut, with what the cut took given back by the repair of that name, see `sukashi list repairs`.

    `cut` is a saved folder or what `Ranking.cut` gives, `model` the network before the cut. A repair looks at
    `calibration` training images a class, drawn by `seed`, and not at their classes; it is in closed form.
    `models.save` writes what comes back.

    Raises UsageError for a repair that there is not and a network that was not cut from `model`, ModelError where the
    repair can do nothing for it.
    """
    source = Source.of(keywords(Reading, _given(model=model, data=data, **settings)))
    with waiting.shown():
        setting = source.open(units=False)
        small = cut if isinstance(cut, Loaded) else load(cut)
        return pruning.repaired(small, setting.loaded, setting.calibration(seed, sampling), repair)


def attribute(
    model: Network,
    x: Tensor,
    target: Tensor,
    attribution: str = "lrp",
    *,
    sites: Sequence[Site] | None = None,
    **options: Any,
) -> Any:
    """What each pixel of images x (B, C, H, W) had to do with the logit of their targets (B,): (B, C, H, W).

    With `sites` (of `bench.sites`) {site: (B, units, positions...)}, all in one pass. `x` is preprocessed,
    `attribution` one of `sukashi list attributions`, with its options.

    Raises UsageError for an attribution or option that there is not, ModelError where it has no rule for the model.
    """
    network = model.model if isinstance(model, Loaded) else model
    network = network if isinstance(network, nn.Module) else load(network).model
    pixels = input_site(x)
    method, objective = attributions[attribution], options.pop("objective", CLASSIFICATION)
    method.check_options(options)
    found = method(network, x, target, [pixels] if sites is None else list(sites), objective, **options)
    return found[pixels] if sites is None else found


@keyworded(Check)
def check(model: Network, data: Images, **settings: Any) -> CheckResult:
    """What would happen: sites, layers that can't be cut and why, class counts, and seconds each criterion would take.

    Seconds are extrapolated from single units at the first, middle and last site, on `calibration` images a class; what
    cannot be estimated within `limit` seconds is listed as unmeasured, a criterion that refuses the model under
    `cannot` with its reason. Nothing is written.
    """
    asked = keywords(Check, _given(model=model, data=data, **settings))
    with waiting.shown():
        return checking.check(asked)


@keyworded(Export)
def export(model: Network, *, data: Images | None = None, **settings: Any) -> ExportResult:
    """A network as one ONNX file, checked in onnxruntime, with `infer.py` beside it that needs no torch and no sukashi.

    `model` is a saved folder, cut, trained or fine-tuned, or whatever else `sukashi.load` takes; `file` is where the
    file goes, by default `onnx/model.onnx` in the folder (`model-fp16.onnx` with `fp16`). It takes any batch of
    `images` (B, C, H, W), preprocessed, and gives `logits` (B, K); its metadata say what the classes are called, how
    images are resized and normalised, and of which recipe it is. float16 is compared to float32 on the test images of
    `data`, or on random inputs.

    Raises UsageError for a file that exists and where the extra `sukashi[onnx]` is not installed, ModelError for a
    network that torch can't export, that gives other logits then, or whose numbers float16 does not hold.
    """
    given = {"model": model, **settings} | ({} if data is None else {"data": data})
    return exporting.export(keywords(Export, _given(**given)))


@keyworded(Compare)
def compare(
    model: Network,
    data: Images,
    criteria: Sequence[str],
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    command: str | None = None,
    **settings: Any,
) -> CompareResult:
    """Criteria over ratios and seeds: SAUCE with intervals, curves and passes; also written to `out` with a report.

    Each (criterion, sampling, seed) is a trial: its plan comes from `calibration` training images a class, its curve
    from physically cut networks (no rounding) on at most `test_images` test images. With `mode="zero"` units are
    silenced in a network that keeps its shape, and curves are over the share of units, not of parameters. Finished
    trials are kept; an interrupted call is resumed by giving it again, with the same result to the byte; `jobs`
    processes share the trials. A criterion that refuses the model (ModelError) stops everything, or with `skip_refused`
    is left out, with its reason under `refused`.

    Raises UsageError for settings that contradict each other and a folder of another experiment, and whatever loading,
    criteria and sampling raise.
    """
    given = {"model": model, "data": data, "criteria": criteria, "out": out, **settings}
    return cast(CompareResult, _run(Compare, given, command, jobs))


@keyworded(Audit)
def audit(
    models: Sequence[Network],
    data: Images,
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    command: str | None = None,
    **settings: Any,
) -> AuditResult:
    """What cuts did to the reasons of a network: saliency maps of the first model beside those of the others.

    `models` are specs (which share `weights`, `width` and so on) or saved folders, the reference first. A map is an
    attribution of the image's class at the pixels; an attribution that refuses a model is left out for all, with the
    reason. By default `attributions` are saliency and integrated_gradients, for transformers chefer too; `measures` are
    gini, road, aopc, rank_correlation, ssim and top_overlap, for transformers insertion and deletion too, and
    localisation and region_drop where masks say where the evidence is: in folders called masks beside the images, in
    columns, or in the folders `masks` (`sukashi list measures` tells what each computes). `sanity` lays the reference's
    maps beside those it has when its layers are drawn anew.
    `options` are those of attributions and measures by name. ROAD's curves, in the table and on the page, are at 10,
    20, ... percent whatever the options, with the noise and tolerance of aopc, or of road where there is no aopc.

    Images are `test_images` of the test split, evenly over the classes, and of those the ones that the reference and
    the model both get right (`population`: "both", "reference" or "all"). Each model sees them by its own
    preprocessing, at the same size. `seed` draws ROAD's noise, the rounding below and the bootstrap.

    Differences are paired by image: the model's value minus the reference's, their mean with a bootstrap interval, a
    paired t test, and Holm's correction over all comparisons. Maps that are constant or not finite are counted and left
    out. Maps have a floor of noise: similarities of the reference are those of its maps and the maps it has with every
    weight moved by the precision of float32. A model not shown to get more images right than guessing would is told
    by name, and left out of the verdict and the lines.

    Raises UsageError for unknown names and keywords, models of different input sizes and a folder of another audit,
    DataError where there is no image to compare on, ModelError where every attribution refuses.
    """
    return cast(AuditResult, _run(Audit, {"models": models, "data": data, "out": out, **settings}, command, jobs))


@keyworded(Prune)
def prune(
    model: Network,
    data: Images,
    criterion: str,
    ratio: float | None = None,
    *,
    out: str | Path | None = None,
    command: str | None = None,
    **settings: Any,
) -> PruneResult:
    """A model cut for real and saved to the folder `out`, with its figures beside the dense model's.

    Removes round(ratio * units) units in the order of `criterion`, less what rounding each site to a multiple of
    `round_to` gives back. With `mode="zero"` the network keeps its shape and the units are silent: logits are those of
    the cut network, size and speed those of the dense one, and nothing is rounded. `sukashi.load(out)` rebuilds the
    model; with `onnx` the folder holds `onnx/model.onnx` too, checked in onnxruntime (see `sukashi.export`).

    In place of `ratio` one target: `target_flops`, `target_params` and `target_latency` are the fraction of the dense
    network's that is left at most, `target_size` is that of the weights' file ("5MB"), and `max_drop` how much accuracy
    may be lost. The first four remove as little as meets them, the last as much as is shown to (`targets` says how);
    `.target` says what was reached.

    Layers to `exclude` keep all their units, as does the whole site that they make units of. With a `scope` (see
    `sparsity.mask_of`) single weights are set to zero instead, those of convolutions and linear layers but `exclude`;
    with `sequential` layer by layer (see `pruning.weight_mask`). The mask is saved too, and the
    network is as large and as slow as before.

    Raises UsageError for settings that contradict each other and a folder of another experiment, and whatever loading,
    criteria and exports raise.
    """
    given = {"model": model, "data": data, "criterion": criterion, "ratio": ratio, "out": out, **settings}
    return cast(PruneResult, _run(Prune, given, command))


@keyworded(Train)
def train(
    model: Network, data: Images, *, out: str | Path | None = None, command: str | None = None, **settings: Any
) -> TrainResult | None:
    """A network trained from random weights (drawn by `seed`) or from those given, saved to the folder `out`.

    The test split is measured once, at the end, on `test_images` of it. `sukashi.load(out)` rebuilds the network. An
    interrupted call is resumed by giving it again; given once more it returns what was found. Under torchrun all
    processes call it, and all but the first get None.

    Raises UsageError for settings that contradict each other and a folder of another run, DataError for too few images,
    ModelError where the loss is not finite (the last checkpoint is kept), ResourceError where nothing can be written.
    """
    return cast(TrainResult | None, _run(Train, {"model": model, "data": data, "out": out, **settings}, command))


@keyworded(Finetune)
def finetune(
    model: Network, data: Images, *, out: str | Path | None = None, command: str | None = None, **settings: Any
) -> TrainResult | None:
    """A network trained on from weights or a saved folder, whose cuts and mask stay, saved to the folder `out`.

    `model` is a folder that `prune`, `train`, `finetune` or `schedule` wrote, or a name with `weights` or `pretrained`.
    Resuming is as in `sukashi.train`, and so are the settings but for `lr`, which is a tenth where it is not given.

    Raises UsageError for a model without weights, and what `sukashi.train` raises.
    """
    return cast(TrainResult | None, _run(Finetune, {"model": model, "data": data, "out": out, **settings}, command))


@keyworded(Concepts)
def concepts(
    model: Network,
    data: Images,
    layer: str,
    of: str,
    *,
    out: str | Path | None = None,
    command: str | None = None,
    **settings: Any,
) -> ConceptsResult:
    """What a layer says for a class, taken apart into `subspaces` (DRSA), and what each responds to in test images.

    `layer` is a block or an activation by name, `of` the class by name. `prune(ablate="OUT:NUMBER")` takes a subspace
    out. Given once more it returns what was found.

    Raises UsageError for a class or number of subspaces that does not fit, ModelError for a layer that there is not and
    a network that LRP has no rules for, DataError for too few images.
    """
    given = {"model": model, "data": data, "layer": layer, "of": of, "out": out, **settings}
    return cast(ConceptsResult, _run(Concepts, given, command))


@keyworded(Schedule)
def schedule(
    model: Network,
    data: Images,
    how: str,
    criteria: Sequence[str],
    ratios: Sequence[float],
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    command: str | None = None,
    **settings: Any,
) -> ScheduleResult | None:
    """Networks pruned and trained to every ratio of a list, by criteria and seeds, saved in `out` with a page.

    `how` is "oneshot" (each ratio from the dense network: prune, fine-tune), "iterative" (each from the one before) or
    "lottery" (each from the one before, rewound to the weights before training, or after `rewind` epochs, and trained
    anew). Ratios ascend, and are fractions removed of the dense network's units or, with a `scope` ("global", "layer",
    "row" or N:M), of its weights; layers to `exclude` are left alone. `options` holds options by criterion.

    Settings of training hold for the dense network, where none was given, and for every level; where levels are
    fine-tuned (oneshot, iterative) it is with a tenth of the learning rate that is usual, unless `lr` is given. With
    `enforce_mask=False` the weights a mask removes are zero at the start of a level only. Seeds count from 0, and are
    added to the setting `seed`.

    Levels that are there are kept and a training that was interrupted goes on: the same call ends in the same networks.
    Each is a saved folder, as in `out/magnitude/0/0.50` (criterion, seed, ratio); `sukashi.load` rebuilds it. Under
    torchrun all processes but the first get None.

    Raises UsageError for settings that contradict each other and a folder of another experiment, and whatever loading,
    criteria and training raise.
    """
    named = {"model": model, "data": data, "how": how, "criteria": criteria, "ratios": ratios, "out": out}
    return cast(ScheduleResult | None, _run(Schedule, {**named, **settings}, command, jobs))


@_spelled
def study(
    file: str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    jobs: int = 1,
    command: str | None = None,
) -> StudyResult | ScheduleResult | None:
    """The experiments of a study file, see `experiments.study.file`, with one page in its `out`.

    `out`, `data`, `device` and `workers` replace the file's. Finished trials are kept: an interrupted study goes on
    when it is run again. A file with a `schedule` is one experiment, whose result is returned.

    Raises UsageError for a file that breaks a rule, and whatever its experiments raise; a model that cannot be loaded,
    or does not fit the data, is refused before the first experiment.
    """
    settings = read(file, out=out, data=data, device=device, workers=workers)
    said = command or f"sukashi.study({str(file)!r})"
    with waiting.shown():
        return cast(StudyResult | ScheduleResult | None, execute(settings, command=said, jobs=jobs))


def results(folder: str | Path, **options: Any) -> Result:
    """What the experiment in a folder found, of whatever kind; its page and results.json are written again.

    `options`: `margin`, of a comparison's lossless points.

    Raises UsageError where the folder holds no experiment, too little of it is finished or its kind has no such option,
    DataError where a file is broken.
    """
    space = Workspace(folder)
    inside = sorted(str(path.parent) for path in space.folder.glob(f"*/{EXPERIMENT}"))
    if inside and not (space.folder / EXPERIMENT).exists():
        raise UsageError(
            f"{folder} is no experiment but holds {words.several(len(inside), 'experiment')}: "
            f"give {' or '.join(inside)}"
        )
    kind = space.about["kind"]
    _, *known = inspect.signature(part(kind, "summary").summary).parameters
    for name in options:
        if name not in known:
            remedy = nearest(name, known) if known else ": leave it out"
            raise UsageError(f"{folder} holds the results of {kind}, which have no option {name!r}{remedy}")
    return conclude(space, **options)


def __getattr__(name: str) -> Any:
    """The function of a kind of experiment that has none above: all of its settings are keywords."""
    if name not in kinds():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = kinds()[name]

    def alone(*, out: str | Path | None = None, command: str | None = None, **settings: Any) -> Any:
        return _run(kind, {"out": out, **settings}, command)

    def shared(*, out: str | Path | None = None, jobs: int = 1, command: str | None = None, **settings: Any) -> Any:
        return _run(kind, {"out": out, **settings}, command, jobs)

    named = shared if kind.shared else alone
    named.__name__ = named.__qualname__ = name
    named.__doc__ = kind.__doc__
    named = keyworded(kind)(named)

    @functools.wraps(named)
    def function(*unnamed: Any, **given: Any) -> Any:
        if unnamed:
            must = [f"{field}=..." for field, info in kind.model_fields.items() if info.is_required()]
            usage = f"sukashi.{name}({', '.join(must or ['NAME=...'])})"
            raise UsageError(f"sukashi.{name} takes every argument by its name: {usage}; see help(sukashi.{name})")
        return named(**given)

    return function


def _run(kind: type[Settings], given: dict[str, Any], command: str | None, jobs: int = 1) -> Result | None:
    if "jobs" in given:
        raise UsageError(f"sukashi.{kind.kind} takes no jobs, its work is not shared by processes: leave jobs out")
    given = _given(**given)
    command = command or call_of(kind, given)
    if given.get("out") is None:
        given["out"] = from_first(tempfile.mkdtemp(prefix="sukashi-") if progress.first() else None)
    settings = keywords(kind, given, known=("command", "jobs"))
    with waiting.shown():
        return execute(settings, command=command, jobs=jobs)


def _given(**given: Any) -> dict[str, Any]:
    """Keywords in which networks and images in memory have become names."""
    data, tensors = given.get("data", ""), None
    if not isinstance(data, str | Path):
        given["data"] = images.hold(data)
        tensors = images.load(given["data"]).preprocess
    if "model" in given:
        given["model"] = _named(given["model"], tensors)
    if isinstance(given.get("models"), list | tuple):
        given["models"] = [_named(model, tensors) for model in given["models"]]
    return given


def _named(model: Any, tensors: Preprocess | None) -> Any:
    """The spec of a network; `tensors` is how the data are taken, where their images are tensors."""
    if isinstance(model, nn.Module | Loaded):
        return models.hold(model, tensors)
    return os.path.expanduser(model) if isinstance(model, str | Path) else model
