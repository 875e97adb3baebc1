"""Models from a name, an import path or a saved folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sukashi.core.errors import ModelError, SukashiError, UsageError
from sukashi.core.schema import check_scale
from sukashi.core.types import Mask, Preprocess, Site
from sukashi.models.adapted import read_as, sides
from sukashi.models.checks import checked_logits, noise, probe
from sukashi.models.fitting import Fit, fit, n_rows, side_of
from sukashi.models.formats import File, holds_weights, read
from sukashi.models.loaded import LIBRARIES, MEMORY, READ, Loaded, Origin, check_name, given_loaded
from sukashi.models.recipe import RECIPE, WEIGHTS
from sukashi.models.saved import check_mask, open_folder
from sukashi.models.specs import build, prepare
from sukashi.models.weights import digest, fill, stated_classes, stated_names, stated_reading, stated_training


def load(
    spec: str,
    *,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    n_classes: int | None = None,
    width: int | None = None,
    pretrained: bool = False,
    output: str | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: str | None = None,
) -> Loaded:
    """The model that `spec` names, checked on two passes over noise.

    `spec` is `sukashi:NAME`, `timm:NAME`, `torchvision:NAME`, `package.module:callable` (called without arguments, or
    with `n_classes`, which may be called num_classes, and `width` where given; what it reads is in an attribute
    `preprocess` of the model it returns, or else in `size`, `mean` and `std`), or a folder
    written by `pruned.save`. `weights` is a file of safetensors or of torch.save, the index of such a file in parts, a
    folder with one of these, or a saved folder of the same spec (the only way to open one whose spec is an import path:
    a recipe must not choose what code runs), for which its file of weights stands too. Names that tools have
    lengthened, entries beside the weights and the like are seen through; `notes` of what comes out say so.
    `weights_key` names the entry, where several fit. The class count of the weights is that of the model. Without
    weights and `pretrained` the weights are random, drawn from torch's global generator. `output` selects a key or
    position where the model returns several tensors.

    How images are read is what `size`, `mean`, `std` and `resize` say (see `read_as`), else the weights' own header or
    recipe, else what is usual for the architecture: `read_by` of what comes out says who. A safetensors header may hold
    `size`, `mean`, `std` (commas between numbers), `resize`, `classes` (their number) and `class_names` (a JSON list).

    Raises UsageError for a spec or option that does not exist, ModelError for weights, recipes and models that break a
    rule. No input is unpickled.
    """
    asked = {"size": size, "mean": mean, "std": std, "resize": resize}
    home = None if weights is None else _home(Path(weights))
    return read_as(
        _loaded(spec, home, weights_key, n_classes, width, pretrained, output, _given(**asked)),
        **{name: value for name, value in asked.items() if value is not None},  # type: ignore[arg-type]
    )


def _loaded(
    spec: str,
    weights: Path | None,
    weights_key: str | None,
    n_classes: int | None,
    width: int | None,
    pretrained: bool,
    output: str | None,
    asked: Mapping[str, Any],
) -> Loaded:
    """The network with images read as its weights say, or else as is usual for the architecture; what was `asked` of
    this stands in where nobody says.
    """
    check_name(spec)
    given = _given(weights_key=weights_key, n_classes=n_classes, width=width, pretrained=pretrained, output=output)
    whole = _whole(spec, weights, given)
    if whole is not None:
        return whole
    _check_asked(weights, given)
    file = None if weights is None else read(weights)
    stated = None if file is None else stated_classes(file)
    if n_classes is not None and stated is not None and n_classes != stated:
        raise ModelError(f"{weights} was trained for {stated} classes, `n_classes` is {n_classes}: leave it out")
    options: dict[str, Any] = _given(n_classes=n_classes, width=width, output=output)
    ours = spec.partition(":")[0] in LIBRARIES
    if stated is not None and ours:
        options["n_classes"] = stated
    found, class_names = Fit({}), None
    if file is None:
        model, preprocess, class_names = build(spec, options, pretrained)
    else:
        model, preprocess, found = _filled(spec, options, file, weights_key)
    model, own = prepare(model, options), preprocess is not None
    if preprocess is None:
        preprocess = _stated(spec, model, {**({} if file is None else stated_reading(file)), **asked})
    check_scale(preprocess.mean)
    logits = checked_logits(model, noise(preprocess), spec, whole=not ours)
    known = stated if stated is not None else n_classes
    if known is not None and logits.shape[1] != known:
        raise ModelError(
            f"{spec} gives {logits.shape[1]} classes, {known} were expected: check `n_classes` and `weights`"
        )
    if ours:
        options["n_classes"] = logits.shape[1]
    side = min(preprocess.height, preprocess.width)
    trained_on = None if file is None else stated_training(file)
    if file is None and not pretrained and (ours or _is_drawn(spec, options, model)):
        trained_on = ()
    loaded = Loaded(
        model=model,
        spec=spec,
        options=options,
        preprocess=replace(preprocess, shorter=None) if ours and not pretrained else preprocess,
        n_classes=logits.shape[1],
        class_names=class_names if file is None else stated_names(file, logits.shape[1]),
        weights_sha256=digest(model) if file is None else file.sha256_of(weights_key),
        mask=_mask(model, found),
        notes=tuple(f"{weights}: {note}" for note in found.notes),
        read_by=dict.fromkeys(READ, _origin(spec, pretrained) if own else Origin("where nobody says")),
        trained_on=trained_on,
        crop=(preprocess.shorter or side) / side,
    )
    return loaded if file is None else _as_stated(loaded, file)


def _stated(spec: str, model: nn.Module, said: Mapping[str, Any]) -> Preprocess:
    """What stands in where somebody's code does not say what it reads: the size as it was said, and as many channels
    as there are numbers, or where one is for all as the first convolution reads. `read_as` puts in mean and deviation.

    Raises ModelError where one of them was not said.
    """
    missing = [f"`{name}`" for name in ("size", "mean", "std") if name not in said]
    if missing:
        given = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise ModelError(
            f"{spec} does not say what it reads: give {given}{' too' * (len(missing) < 3)}, or in its code an "
            "attribute: from sukashi import Preprocess; model.preprocess = Preprocess(32, 32, 3, (0.5, 0.5, 0.5), "
            "(0.25, 0.25, 0.25)), which are height, width, channels, mean, deviation"
        )
    height, width = sides(said["size"])
    n_channels = max(len(said["mean"]), len(said["std"]))
    if n_channels == 1:
        n_channels = next((of.in_channels for of in model.modules() if isinstance(of, nn.Conv2d)), 1)
    return Preprocess(height, width, n_channels, (0.0,) * n_channels, (1.0,) * n_channels)


def _is_drawn(spec: str, options: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether what somebody's code gives has random weights, all others where it is called again."""
    if spec.startswith(MEMORY):
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = prepare(build(spec, options, False)[0], options).state_dict()
    own = {name: tensor for name, tensor in model.named_parameters() if tensor.dim() > 1}
    return bool(own) and not any(tensor.equal(again[name]) for name, tensor in own.items() if name in again)


def _origin(spec: str, pretrained: bool) -> Origin:
    """Who says how images are read, where weights do not."""
    source, _, name = spec.partition(":")
    if pretrained:
        return Origin("as its weights were published")
    if source not in LIBRARIES:
        return Origin("its own preprocess")
    return Origin(f"{source}'s defaults for {name}", assumed=True)


def _as_stated(loaded: Loaded, file: File) -> Loaded:
    """The network with images read as the header of its weights says."""
    if "size" in loaded.options:
        loaded = replace(loaded, read_by={**loaded.read_by, "size": Origin("the size that its weights were made for")})
    try:
        return read_as(loaded, **stated_reading(file), by=f"the header of {file.path.name}")
    except UsageError as error:
        raise ModelError(f"the header of {file.path} says what cannot be: {error}") from error


def _filled(
    spec: str, options: dict[str, Any], file: File, key: str | None
) -> tuple[nn.Module, Preprocess | None, Fit]:
    """A model with the weights of a file, which also decide its class count and image size: both go into `options`."""
    notes: list[str] = []
    model, preprocess, _ = build(spec, options, False)
    side = side_of(model, file) if spec.startswith("timm:") else None
    if side is not None:
        options["size"] = side
        notes.append(f"the weights are for images of {side} x {side} pixels")
        model, preprocess, _ = build(spec, options, False)
    found = fit(model, file, key)
    rows = n_rows(model.state_dict(), found.tensors)
    if rows is not None:
        _check_rows(rows, options.get("n_classes"), file.path)
        with contextlib.suppress(SukashiError):  # not all that people write has a parameter n_classes
            model, preprocess, _ = build(spec, {**options, "n_classes": rows}, False)
            options["n_classes"] = rows
    fill(model, found.tensors, file.path)
    return model, preprocess, replace(found, notes=(*notes, *found.notes))


def _check_asked(weights: str | Path | None, given: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or mean nothing."""
    if weights is not None and "pretrained" in given:
        raise UsageError(f"both pretrained weights and {weights} were asked for: choose one")
    if weights is None and "weights_key" in given:
        raise UsageError(
            f"there are no weights to take {given['weights_key']!r} from: give a file, or no `weights_key`"
        )
    for name in ("n_classes", "width"):
        if given.get(name, 1) < 1:
            raise UsageError(f"`{name}` must be at least 1, got {given[name]}")


def _check_rows(rows: int, asked: int | None, path: Path) -> None:
    if asked is not None and asked != rows:
        raise ModelError(
            f"the weights of {path} are for {rows} classes, {asked} were asked for: leave the number out, or train "
            "them on with a new classifier (`new_head=True`)"
        )


def _mask(model: nn.Module, found: Fit) -> Mask | None:
    """What stays of the weights that were saved under a mask, where those are weights of layers."""
    layers = dict(model.named_modules())
    keeps = {name.removesuffix(".weight"): keep for name, keep in found.keeps.items() if name.endswith(".weight")}
    fitting = {layer: keep for layer, keep in keeps.items() if isinstance(layers.get(layer), nn.Conv2d | nn.Linear)}
    sites = {Site(layer, "weight", keep.numel(), 0): keep for layer, keep in fitting.items()}
    return Mask(sites) if sites else None


def _whole(spec: str, weights: Path | None, own: Mapping[str, Any]) -> Loaded | None:
    """A network that is whole already, in memory or in a saved folder; or None. Of its `own` options no others."""
    given = given_loaded(spec)
    if given is not None:
        if own or (weights is not None and not _is_folder(weights)):
            wrong = next(iter(own), "weights")
            raise UsageError(f"{spec} is a network that was given whole: leave `{wrong}` out")
        if weights is None:
            return _copied(given)
        spec = given.spec
    if Path(spec).is_dir():
        folder, own = Path(spec), own if weights is None else {**own, "weights": weights}
    elif weights is not None and _is_folder(weights):
        folder = weights
    else:
        return None
    loaded = open_folder(folder, None if Path(spec).is_dir() else spec)
    for name, value in own.items():
        if loaded.options.get(name) != value:
            raise UsageError(f"{folder} is a saved folder and brings its own: leave `{name}` out")
    return loaded


def _home(weights: Path) -> Path:
    """The saved folder that a file of weights is a part of, whose recipe knows more of them; or the weights alone."""
    return weights.parent if weights.name == WEIGHTS and (weights.parent / RECIPE).exists() else weights


def _is_folder(weights: Path) -> bool:
    """Whether weights are a saved folder, and none as model hubs have them."""
    return weights.is_dir() and ((weights / RECIPE).exists() or not holds_weights(weights))


def _copied(given: Loaded) -> Loaded:
    """A network in memory, whole and checked like that of a saved folder."""
    model = prepare(copy.deepcopy(given.model), {})
    if given.mask is not None:
        check_mask(model, given.mask, f"this {type(model).__name__}: give it without its mask")
    found = replace(given, model=model, weights_sha256=digest(model))
    probe(found, noise(found.preprocess).to(next(model.parameters()).device))
    return found


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False}
