"""Models from a name, an import path or a saved folder; weights and recipes are read as plain data, never unpickled."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import timm
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from sukashi import hooks, sparsity, surgery
from sukashi.architectures import OWN
from sukashi.errors import ModelError, SukashiError, UsageError
from sukashi.layers import explicit_attention, fused_names
from sukashi.registry import nearest
from sukashi.surgery import Table
from sukashi.types import Mask, Preprocess

# What masked = cut was tested on, beside everything in OWN.
TESTED = (
    *(f"torchvision:{name}" for name in ("resnet18", "resnet50", "vgg16", "vgg16_bn", "mobilenet_v2", "densenet121")),
    *("torchvision:efficientnet_b0", "torchvision:vit_b_16"),
    *(f"timm:{name}" for name in ("deit3_small_patch16_224", "deit3_base_patch16_224", "vit_tiny_patch16_224")),
)
RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
MASKS = "masks.safetensors"

_FIXED_WIDTH = ("cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56")
_SHOWN = 3
# Of fp32 logits; a batch of one may take another kernel, an image that sees its neighbours is off by far more.
_ALONE = 1e-3


@dataclass(frozen=True)
class Loaded:
    """A network ready to be looked at, and what rebuilds it.

    `model` is in eval mode, in fp32, with explicit attention, and nobody else's. `spec` and `options` rebuild its
    architecture, `cuts` what was then removed or silenced, cut after cut, `mask` which of the weights that are left are
    zero and stay so (None: nobody said). `class_names` is None where they are not known; `weights_sha256` is the hash
    of the weights file, or of the tensors where there was none.
    """

    model: nn.Module
    spec: str
    options: Mapping[str, Any]
    preprocess: Preprocess
    n_classes: int
    class_names: tuple[str, ...] | None
    weights_sha256: str
    cuts: tuple[Table, ...] = ()
    mask: Mask | None = None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class InputRecipe(_Strict):
    """`types.Preprocess`, written down."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ArchitectureRecipe(_Strict):
    """The spec, and the options of `load` that shape the architecture."""

    spec: str
    n_classes: int | None = None
    width: int | None = None
    output: str | None = None


class MaskRecipe(_Strict):
    """`Loaded.mask`, written down: the hash of masks.safetensors, and the shape of each masked layer's weight."""

    sha256: str
    shapes: dict[str, tuple[int, ...]]


class Recipe(_Strict):
    """`recipe.json` of a saved folder: how to rebuild the model, and where it came from.

    `weights_sha256` is the hash of model.safetensors, `tensors` that of each tensor in it; `mask` is there for a model
    that has one; `provenance` and `figures` are for readers.
    """

    format: Literal[1]
    model: ArchitectureRecipe
    preprocess: InputRecipe
    n_classes: int
    class_names: tuple[str, ...] | None
    cuts: tuple[Table, ...]
    weights_sha256: str
    tensors: dict[str, str]
    provenance: dict[str, Any]
    figures: dict[str, Any]
    mask: MaskRecipe | None = None


class Output(nn.Module):
    """One tensor of a model that returns several: `output` is a key, or a position written as a number."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        given = self.model(x)
        if isinstance(given, Tensor):
            raise ModelError(f"the model gives one tensor, there is no output {self.output!r} to select: leave it out")
        found = dict(_named(given))
        if self.output not in found:
            raise ModelError(f"the model has no output {self.output!r}: choose one of {_candidates(found)}")
        return cast(Tensor, found[self.output])


def names() -> list[str]:
    """Our own models and those tested for surgery; any other timm or torchvision classifier may be tried."""
    return [*(f"sukashi:{name}" for name in OWN), *TESTED]


def load(
    spec: str,
    *,
    weights: str | Path | None = None,
    n_classes: int | None = None,
    width: int | None = None,
    pretrained: bool = False,
    output: str | None = None,
) -> Loaded:
    """The model that `spec` names, checked on two passes over noise.

    `spec` is `sukashi:NAME`, `timm:NAME`, `torchvision:NAME`, `package.module:callable` (called without arguments, or
    with `n_classes` and `width` where given; the model it returns must have an attribute `preprocess`), or a folder
    written by `pruned.save`. `weights` is a safetensors file, a `.pt` or `.pth` file of tensors, or a saved folder of
    the same spec (the only way to open one whose spec is an import path: a recipe must not choose what code runs).
    Without weights and `pretrained` the weights are random, drawn from torch's global generator. The metadata `mean`,
    `std` (commas between numbers) and `classes` of a safetensors header replace the architecture's own.
    `output` selects a key or position where the model returns several tensors.

    Raises UsageError for a spec or option that does not exist, ModelError for weights, recipes and models that break a
    rule. No input is unpickled.
    """
    _check_name(spec)
    folder = spec if Path(spec).is_dir() else weights
    if folder is not None and Path(folder).is_dir():
        own = _given(n_classes=n_classes, width=width, pretrained=pretrained, output=output)
        if own or (folder is spec and weights is not None):
            wrong = next(iter(own), "weights").removeprefix("n_")
            raise UsageError(f"{folder} is a saved folder and brings its own {wrong}: leave --{wrong} out")
        return _open(Path(folder), None if folder is spec else spec)
    if weights is not None and pretrained:
        raise UsageError(f"both pretrained weights and {weights} were asked for: choose one")
    for name, value in (("n_classes", n_classes), ("width", width)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")

    file = None if weights is None else _read(Path(weights))
    stated = None if file is None else _stated_classes(file)
    if n_classes is not None and stated is not None and n_classes != stated:
        raise ModelError(f"{weights} was trained for {stated} classes, n_classes is {n_classes}: leave it out")
    options: dict[str, Any] = _given(n_classes=n_classes, width=width, output=output)
    ours = spec.partition(":")[0] in _SOURCES
    if stated is not None and ours:
        options["n_classes"] = stated
    model, preprocess, class_names = _build(spec, options, pretrained)
    if file is not None:
        preprocess = _stated_preprocess(file, preprocess)
        _fill(model, fused_names(model, file.tensors), file.path)
    model = _prepare(model, options)
    logits = _logits(model, _noise(preprocess), spec, whole=not ours)
    known = stated if stated is not None else n_classes
    if known is not None and logits.shape[1] != known:
        raise ModelError(f"{spec} gives {logits.shape[1]} classes, {known} were expected: check n_classes and weights")
    if ours:
        options["n_classes"] = logits.shape[1]
    return Loaded(
        model=model,
        spec=spec,
        options=options,
        preprocess=preprocess,
        n_classes=logits.shape[1],
        class_names=class_names,
        weights_sha256=digest(model) if file is None else file.sha256,
    )


def takes_classes(spec: str) -> bool:
    """Whether the class count of a spec's architecture is an option: not that of a saved folder or an import path."""
    _check_name(spec)
    return spec.partition(":")[0] in _SOURCES


def _check_name(spec: object) -> None:
    if not isinstance(spec, str):
        raise UsageError(
            f"model must be a name, got a {type(spec).__name__}: give package.module:callable, a function without "
            "arguments that returns it, so that a saved cut can be built again"
        )


def probe(loaded: Loaded, example: Tensor) -> Tensor:
    """Logits (B, K) of an example (B, C, H, W), once it is certain that they mean something.

    Raises ModelError where the model does not run on the example, does not give one finite (B, K) tensor with
    K = n_classes, gives other logits in a second pass, changes its buffers, or lets images of a batch change each
    other's logits; and for an import path, whose size its author wrote, where it cuts the example into patches that
    leave pixels over. Weights, buffers and train mode are as found afterwards.
    """
    logits = _logits(loaded.model, example, loaded.spec, whole=not takes_classes(loaded.spec))
    if logits.shape[1] != loaded.n_classes:
        raise ModelError(f"{loaded.spec} gives {logits.shape[1]} classes, {loaded.n_classes} were expected")
    return logits


def resized(loaded: Loaded, size: int | None) -> Loaded:
    """The same network for square images of this side, or None its own.

    Raises ModelError where it takes none such, or would leave pixels unread that do not fill a patch.
    """
    own = loaded.preprocess
    if size is None or size == own.height == own.width:
        return loaded
    changed = replace(loaded, preprocess=replace(own, height=size, width=size))
    example = _noise(changed.preprocess).to(next(loaded.model.parameters()).device)
    remedy = f"leave --size out, its own is {own.height} x {own.width}"
    _logits(loaded.model, example, loaded.spec, whole=True, remedy=remedy)
    return changed


# Architectures.

Built = tuple[nn.Module, Preprocess, tuple[str, ...] | None]
Builder = Callable[[str, Mapping[str, Any], bool], Built]


def _build(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    """Model, preprocessing and class names (or None) of a spec, with the architecture's own weights."""
    source, colon, name = spec.partition(":")
    if not colon or not name:
        raise _unknown(spec)
    if "width" in options and source in ("timm", "torchvision"):
        raise UsageError(f"{spec} has no option width: only models of our own and import paths may")
    try:
        return _SOURCES.get(source, _imported)(spec, options, pretrained)
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{spec} could not be built with {dict(options)} ({_brief(error)}): check the options"
        ) from error


def _own(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    name = spec.partition(":")[2]
    if name not in OWN:
        raise UsageError(f"unknown model {spec!r}{nearest(spec, [f'sukashi:{own}' for own in OWN])}")
    if pretrained:
        raise UsageError(f"{spec} has no pretrained weights on a hub: give a file of weights instead")
    build, n_classes, width, channels, size = OWN[name]
    if options.get("width", width) != width and name in _FIXED_WIDTH:
        raise UsageError(f"the width of {spec} is {width}, got {options['width']}: leave it out")
    model = build(options.get("n_classes", n_classes), options.get("width", width))
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else ((0.0,), (1.0,))
    return model, Preprocess(size, size, channels, mean, std), None


def _timm(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    name = spec.partition(":")[2]
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        raise UsageError(f"unknown model {spec!r}{_closest(spec, [f'timm:{known}' for known in timm.list_models()])}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise UsageError(f"unknown weights {tag!r} of timm:{bare}{nearest(tag, tags or ['none'])}")
    model = _fetched(spec, lambda: timm.create_model(name, pretrained=True)) if pretrained else None
    if model is None:
        model = timm.create_model(name, num_classes=options.get("n_classes"))
    config = resolve_data_config(model=model)
    channels, height, width = config["input_size"]
    return model, Preprocess(height, width, channels, tuple(config["mean"]), tuple(config["std"])), None


def _torchvision(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    name = spec.partition(":")[2]
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise UsageError(f"unknown model {spec!r}{_closest(spec, [f'torchvision:{other}' for other in known])}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if pretrained:
        # The builders' own download would unpickle.
        fetch = lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True)  # noqa: E731
        state = _fetched(spec, fetch)
        model = torchvision.models.get_model(name, num_classes=len(weights.meta["categories"]))
        _fill(model, state, spec)
    else:
        model = torchvision.models.get_model(name, num_classes=options.get("n_classes", 1000))
    view = weights.transforms()
    size = view.crop_size[0]
    preprocess = Preprocess(size, size, 3, tuple(view.mean), tuple(view.std))
    return model, preprocess, tuple(weights.meta["categories"]) if pretrained else None


def _imported(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    module, _, name = spec.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) or not name.isidentifier():
        raise _unknown(spec)
    if pretrained:
        raise UsageError(f"{spec} has no pretrained weights on a hub: give a file of weights, or load them in {name}")
    try:
        build = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises
        raise UsageError(f"cannot import {spec} ({_brief(error)}): check the name and PYTHONPATH") from error
    try:
        model = build(**{key: options[key] for key in ("n_classes", "width") if key in options})
    except Exception as error:  # whatever a user's function raises
        raise ModelError(f"{spec} could not be built with {dict(options)} ({_brief(error)}): check it") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned a {type(model).__name__}: it must return a torch.nn.Module")
    preprocess = getattr(model, "preprocess", None)
    if not isinstance(preprocess, Preprocess):
        raise ModelError(f"{spec} does not say what it reads: give its model an attribute preprocess = Preprocess(...)")
    # The caller may still hold the model, and train it.
    return copy.deepcopy(model), preprocess, None


_SOURCES: dict[str, Builder] = {"sukashi": _own, "timm": _timm, "torchvision": _torchvision}


def _unknown(spec: str) -> UsageError:
    if os.sep in spec and ":" not in spec:
        return UsageError(f"no such folder {spec!r}: give a saved model's, with {RECIPE} in it, or a model's name")
    return UsageError(f"unknown model {spec!r}, and no such folder{nearest(spec, names())}; or package.module:callable")


def _closest(name: str, known: list[str]) -> str:
    """The hint of `nearest`, over the few names that come near instead of a thousand."""
    return nearest(name, difflib.get_close_matches(name, known, n=5, cutoff=0.3) or names())


def _fetched(spec: str, fetch: Any) -> Any:
    try:
        return fetch()
    except Exception as error:  # whatever a hub, a proxy or a missing network raises
        raise ModelError(
            f"pretrained weights of {spec} cannot be had here ({_brief(error)}): give a file of weights instead"
        ) from error


def _prepare(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model in eval mode and fp32, with explicit attention and its one output."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"weight {name!r} holds NaN or Inf: such a network computes nothing, give other weights")
    model = model.float().eval()
    explicit_attention(model)
    return Output(model, options["output"]).eval() if "output" in options else model


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, False)}


# Weights.


@dataclass(frozen=True)
class File:
    """A file of weights, read once: its tensors by name, its text metadata and its hash."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str


def _read(path: Path) -> File:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read weights {path} ({error.strerror}): check the path") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if path.suffix == ".safetensors":
        try:
            # Its parser holds the header against the bytes that follow: every tensor inside, none overlapping, no gap.
            tensors = safetensors.torch.load(data)
        except (SafetensorError, KeyError) as error:
            raise ModelError(f"{path} is no intact safetensors file ({error}): fetch or save it again") from error
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return File(path, tensors, header.get("__metadata__", {}), sha256)
    if path.suffix in (".pt", ".pth"):
        return File(path, _unpickled_safely(data, path), {}, sha256)
    raise ModelError(f"weights {path} must be a .safetensors, .pt or .pth file, got {path.suffix!r}")


def _unpickled_safely(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that wants to run code, or no pickle at all
        raise ModelError(
            f"{path} was refused: it is damaged or holds more than tensors, and nothing in it was run; "
            "save the state_dict as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(
            f"{path} must hold a state_dict, also under 'state_dict' or 'model', got {type(found).__name__}"
        )
    return dict(found)


def _stated_classes(file: File) -> int | None:
    """How many classes the metadata speaks of, or None."""
    stated = file.metadata.get("classes")
    if stated is None:
        return None
    if not stated.isdecimal() or int(stated) < 1:
        raise ModelError(f"the header of {file.path} gives classes={stated!r}: it must be a number of classes")
    return int(stated)


def _stated_preprocess(file: File, preprocess: Preprocess) -> Preprocess:
    """The preprocessing with the mean and std that the metadata speaks of."""
    stated = {key: file.metadata[key] for key in ("mean", "std") if key in file.metadata}
    numbers: dict[str, Any] = {}
    for key, text in stated.items():
        with contextlib.suppress(ValueError):
            numbers[key] = tuple(float(part) for part in text.split(","))
        good = key in numbers and len(numbers[key]) == preprocess.channels and all(map(math.isfinite, numbers[key]))
        if not good or (key == "std" and min(numbers[key]) <= 0):
            raise ModelError(
                f"the header of {file.path} gives {key}={text!r}: it must be {preprocess.channels} numbers with "
                "commas between, a std above 0"
            )
    return replace(preprocess, **numbers)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Copy tensors into the model; none but exactly its own, so that nothing keeps its random start unnoticed."""
    own = model.state_dict()
    faults = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        counts = "; ".join(
            f"{len(found)} {fault}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
            for fault, found in faults.items()
            if found
        )
        raise ModelError(f"the weights of {where} do not fit the model ({counts}): check its name, classes and width")
    model.load_state_dict(dict(tensors))


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: SHA-256 of type, shape and bytes}, sorted by name."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        text = f"{plain.dtype} {tuple(plain.shape)} ".encode()
        found[name] = hashlib.sha256(text + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, whatever file they came from."""
    return hashlib.sha256(json.dumps(tensor_digests(model.state_dict())).encode()).hexdigest()


# Saved folders.


def _open(folder: Path, spec: str | None) -> Loaded:
    """The model of a saved folder, rebuilt from its recipe; `spec` is what the caller takes it for."""
    recipe = read_recipe(folder / RECIPE)
    options = recipe.model.model_dump(exclude_none=True)
    made = options.pop("spec")
    if spec is not None and spec != made:
        raise ModelError(f"{folder} holds a {made}, not a {spec}: give the spec it was made from")
    if spec is None and made.partition(":")[0] not in _SOURCES:
        raise ModelError(
            f"{folder} needs the code of {made}, and a recipe must not choose what code runs: "
            f"load {made} with the folder as its weights"
        )
    file = _read(folder / WEIGHTS)
    if file.sha256 != recipe.weights_sha256:
        found = tensor_digests(file.tensors)
        wrong = [name for name in sorted({*found, *recipe.tensors}) if found.get(name) != recipe.tensors.get(name)]
        raise ModelError(
            f"{file.path} has the SHA-256 {file.sha256[:16]}, its recipe says {recipe.weights_sha256[:16]}; first "
            f"tensor at fault: {wrong[0] if wrong else 'none, only the header differs'}: restore the folder"
        )
    model = _prepare(_build(made, options, False)[0], options)
    for table in recipe.cuts:
        surgery.replay(model, table)
    _fill(model, file.tensors, file.path)
    mask = None if recipe.mask is None else _mask(folder / MASKS, recipe.mask, model)
    loaded = Loaded(
        model=_prepare(model, {}),
        spec=made,
        options=options,
        preprocess=Preprocess(**recipe.preprocess.model_dump()),
        n_classes=recipe.n_classes,
        class_names=recipe.class_names,
        weights_sha256=file.sha256,
        cuts=recipe.cuts,
        mask=mask,
    )
    probe(loaded, _noise(loaded.preprocess))
    return loaded


def _mask(path: Path, recipe: MaskRecipe, model: nn.Module) -> Mask:
    """The mask of a saved folder, which fits the model and whose removed weights are zero in it."""
    file = _read(path)
    if file.sha256 != recipe.sha256:
        raise ModelError(
            f"{path} has the SHA-256 {file.sha256[:16]}, its recipe says {recipe.sha256[:16]}: restore the folder"
        )
    mask = sparsity.unpack(file.tensors, recipe.shapes)
    sparsity.check_fits(model, mask)
    for site, keep in mask.keep.items():
        n_alive = int((sparsity.weight_of(model, site)[~keep] != 0).sum())
        if n_alive:
            raise ModelError(
                f"{n_alive} weights of layer {site.layer!r} that {path.name} removes are not zero in {WEIGHTS}: "
                "restore the folder"
            )
    return mask


def read_recipe(path: Path) -> Recipe:
    """The `recipe.json` of a saved folder, checked. Raises ModelError for what is none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}): a saved model is a folder with this file") from error
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            parts: dict[str, type[BaseModel]] = {
                "model": ArchitectureRecipe,
                "preprocess": InputRecipe,
                "mask": MaskRecipe,
            }
            known = parts.get(str(first["loc"][0]), Recipe).model_fields
            raise ModelError(f"{path} has an unknown key {where!r}{nearest(str(first['loc'][-1]), known)}") from error
        raise ModelError(f"{path} is no recipe: {where or 'all of it'}: {first['msg']}") from error


# Checks.


def _noise(preprocess: Preprocess) -> Tensor:
    shape = (2, preprocess.channels, preprocess.height, preprocess.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(
    model: nn.Module, example: Tensor, spec: str, *, whole: bool, remedy: str = "check size and width"
) -> Tensor:
    """Logits (B, K) of the example, after the checks that `probe` speaks of (all but that of K).

    `whole` refuses patches that leave pixels over. A library's architecture may do so at the size it was made for:
    SigLIP so400m reads 384 x 384 pixels in patches of 14 x 14.
    """
    modes = [module.training for module in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    try:
        with hooks.visited(model, _patches(model, example, spec) if whole else {}):
            first = model(example)
        second, alone = model(example), model(example[:1])
    except SukashiError:
        raise
    except Exception as error:
        channels, height, width = example.shape[1:]
        raise ModelError(
            f"{spec} does not run on images of {height} x {width} pixels in {channels} channel"
            f"{'s' if channels > 1 else ''} ({_brief(error)}): {remedy}"
        ) from error
    finally:
        changed = [name for name, buffer in model.named_buffers() if not _same(buffer, before[name])]
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    if not isinstance(first, Tensor):
        found = dict(_named(first))
        raise ModelError(f"{spec} gives a {type(first).__name__}, not logits: select an output: {_candidates(found)}")
    if first.dim() != 2 or len(first) != len(example):
        raise ModelError(f"{spec} gives {tuple(first.shape)} for {len(example)} images: it must give (images, classes)")
    if not first.isfinite().all():
        raise ModelError(f"{spec} gives NaN or Inf: check its weights and the preprocessing")
    if changed:
        raise ModelError(f"{spec} changes its buffer {changed[0]!r} in eval mode: it must compute the same every time")
    if not torch.equal(first, second):
        raise ModelError(f"{spec} gives other logits in a second pass: it must compute the same every time")
    if (first[:1] - alone).abs().max() > _ALONE * first.abs().max():
        raise ModelError(f"{spec} gives an image other logits in other company: images must not depend on each other")
    return first


def _patches(model: nn.Module, example: Tensor, spec: str) -> dict[str, Callable[[Tensor], None]]:
    """For each convolution that may cut images into patches a look at what it reads, which refuses a rest.

    Such a convolution steps as far as it reaches: pixels that do not fill a patch are never read. One that reaches
    further than it steps has read them, or ends in padding, as everybody expects.
    """

    def look(patch: tuple[int, ...], x: Tensor) -> None:
        side = x.shape[2:]
        if x.shape != example.shape or all(n % p == 0 for n, p in zip(side, patch, strict=True)):
            return
        fits = ([p * whole(n / p) for n, p in zip(side, patch, strict=True)] for whole in (math.floor, math.ceil))
        said = " and ".join(f"{height} x {width}" for height, width in fits if min(height, width) > 0)
        raise ModelError(
            f"{spec} cuts images into patches of {patch[0]} x {patch[1]} pixels, of which {side[0]} x {side[1]} is no "
            f"multiple, so that pixels would never be read: the nearest multiples are {said}"
        )

    return {
        name: partial(look, module.kernel_size)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride != (1, 1) == module.dilation
        and module.padding in ((0, 0), "valid")
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _named(found: Any) -> Iterator[tuple[str, Any]]:
    """Outputs of a model with the names by which they are selected."""
    match found:
        case Mapping():
            yield from ((str(key), value) for key, value in found.items())
        case tuple() | list():
            yield from ((str(position), value) for position, value in enumerate(found))


def _candidates(found: Mapping[str, Any]) -> str:
    shown = [f"{name!r} {tuple(value.shape)}" for name, value in found.items() if isinstance(value, Tensor)]
    return ", ".join(shown) or "there is none that is a tensor"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
