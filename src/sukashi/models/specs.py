"""Architectures by name or import path, as they are built before any weights."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError, brief, nearest
from sukashi.core.imported import imported, is_import, nearest_import
from sukashi.core.types import Preprocess
from sukashi.models.architectures import OWN
from sukashi.models.checks import candidates, copied, named_outputs
from sukashi.models.loaded import held
from sukashi.models.recipe import RECIPE
from sukashi.models.weights import fill
from sukashi.network.layers import explicit_attention

# What masked = cut was tested on, beside everything in OWN.
TESTED = (
    *(f"torchvision:{name}" for name in ("resnet18", "resnet50", "vgg16", "vgg16_bn", "mobilenet_v2", "densenet121")),
    *("torchvision:efficientnet_b0", "torchvision:vit_b_16"),
    *(f"timm:{name}" for name in ("deit3_small_patch16_224", "deit3_base_patch16_224", "vit_tiny_patch16_224")),
)

_MAX_PARAMETERS = 2**28  # of our own models: 1 GiB
_FIXED_WIDTH = ("cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56")


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
        found = dict(named_outputs(given))
        if self.output not in found:
            raise ModelError(f"the model has no output {self.output!r}: choose one of {candidates(found)}")
        return cast(Tensor, found[self.output])


def names() -> list[str]:
    """Our own models and those tested for surgery; any other timm or torchvision classifier may be tried."""
    return [*(f"sukashi:{name}" for name in OWN), *TESTED]


# Architectures.

Built = tuple[nn.Module, Preprocess | None, tuple[str, ...] | None]
Builder = Callable[[str, Mapping[str, Any], bool], Built]


def build(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    """Model, preprocessing as it was published (None where somebody's code does not say) and class names (or None) of
    a spec, with the architecture's own weights.
    """
    source, colon, name = spec.partition(":")
    if not colon or not name:
        raise _unknown(spec)
    if "width" in options and source in ("timm", "torchvision"):
        raise UsageError(f"{spec} has no option width: only models of our own and import paths may")
    if "size" in options and source != "timm":
        raise UsageError(f"{spec} has no option size: only models of timm are laid out for one")
    try:
        return _SOURCES.get(source, _imported)(spec, options, pretrained)
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ModelError(f"{spec} could not be built{_told(options)} ({brief(error)}): check the options") from error


def _told(options: Mapping[str, Any]) -> str:
    return f" with {dict(options)}" if options else ""


def _own(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    name = spec.partition(":")[2]
    if name not in OWN:
        raise UsageError(f"unknown model {spec!r}{nearest(spec, [f'sukashi:{own}' for own in OWN])}")
    if pretrained:
        raise UsageError(f"{spec} has no pretrained weights on a hub: give a file of weights instead")
    build, n_classes, width, channels, size = OWN[name]
    if options.get("width", width) != width and name in _FIXED_WIDTH:
        raise UsageError(f"the width of {spec} is {width}, got {options['width']}: leave it out")
    asked = options.get("n_classes", n_classes), options.get("width", width)
    _check_size(spec, build, *asked)
    model = build(*asked)
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else ((0.0,), (1.0,))
    return model, Preprocess(size, size, channels, mean, std), None


def _check_size(spec: str, build: Callable[[int, int], nn.Module], n_classes: int, width: int) -> None:
    """Refuse a network that would fill the memory, before it does."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        n_parameters = sum(parameter.numel() for parameter in build(n_classes, width).parameters())
    if n_parameters > _MAX_PARAMETERS:
        raise UsageError(
            f"{spec} of width {width} for {n_classes} classes has {n_parameters:,} parameters, at most "
            f"{_MAX_PARAMETERS:,} are built: give a smaller width"
        )


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
        sized = {"img_size": options["size"]} if "size" in options else {}
        model = timm.create_model(name, num_classes=options.get("n_classes"), **sized)
    config = resolve_data_config(model=model)
    channels, *sides = config["input_size"]
    height, width = [options["size"]] * 2 if "size" in options else sides
    # As timm's own transform: the shorter side is floor(size / crop_pct).
    cropped = config["crop_mode"] != "squash"
    shorter = math.floor(min(height, width) / config["crop_pct"]) if cropped else None
    return model, Preprocess(height, width, channels, tuple(config["mean"]), tuple(config["std"]), shorter), None


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
        fill(model, state, spec)
    else:
        model = torchvision.models.get_model(name, num_classes=options.get("n_classes", 1000))
    view = weights.transforms()
    size = view.crop_size[0]
    preprocess = Preprocess(size, size, 3, tuple(view.mean), tuple(view.std), view.resize_size[0])
    return model, preprocess, tuple(weights.meta["categories"]) if pretrained else None


def _imported(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    name = spec.partition(":")[2]
    if not is_import(spec):
        raise _unknown(spec)
    if pretrained:
        raise UsageError(f"{spec} has no pretrained weights on a hub: give a file of weights, or load them in {name}")
    build = imported(spec)
    given = _arguments(spec, build, options)
    try:
        model = build(**given)
    except Exception as error:  # whatever a user's function raises
        raise ModelError(f"{spec} could not be built{_told(options)} ({brief(error)}): check it") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned a {type(model).__name__}: it must return a torch.nn.Module")
    preprocess = getattr(model, "preprocess", None)
    # The caller may still hold the model, and train it.
    return copied(model, spec), preprocess if isinstance(preprocess, Preprocess) else None, None


def _arguments(spec: str, build: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody's function is called with: its class count goes by n_classes or, as in torchvision, num_classes.

    Raises ModelError for an option that it does not take, and where it must be told its class count.
    """
    given = {key: options[key] for key in ("n_classes", "width") if key in options}
    try:
        taken = inspect.signature(build).parameters
    except (TypeError, ValueError):  # no function, or one that does not say
        return given
    count = next((name for name in ("n_classes", "num_classes") if name in taken), None)
    if count is not None and taken[count].default is inspect.Parameter.empty and "n_classes" not in given:
        raise ModelError(f"{spec} must be told its class count, {count}: give `n_classes=N`")
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    named = {(count or key) if key == "n_classes" else key: value for key, value in given.items()}
    for key, name in zip(given, named, strict=True):
        if name not in taken and not any_name:
            wanted = "n_classes or num_classes" if key == "n_classes" else key
            raise ModelError(
                f"{spec} takes ({', '.join(taken)}) and no {wanted}: leave `{key}` out, or give it such a parameter"
            )
    return named


def _from_memory(spec: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    model, preprocess, _ = held(spec)
    if pretrained or options.keys() & {"n_classes", "width"}:
        raise UsageError(f"{spec} is a network that was given whole: leave `pretrained`, `n_classes` and `width` out")
    return copy.deepcopy(model), preprocess, None


_SOURCES: dict[str, Builder] = {
    "sukashi": _own,
    "timm": _timm,
    "torchvision": _torchvision,
    "memory": _from_memory,
}


def _unknown(spec: str) -> UsageError:
    if (near := nearest_import(spec)) is not None:
        return UsageError(f"unknown model {spec!r}: did you mean {near}?")
    if ":" not in spec and os.path.isfile(spec):
        if (Path(spec).parent / RECIPE).exists():
            return UsageError(f"{spec} is a file of a saved folder: give the folder, {Path(spec).parent}")
        return UsageError(
            f"{spec} is a file of weights and not a model: name its architecture and give the file with `weights`, or "
            f"to an audit as NAME={spec} (with NAME as in {names()[0]})"
        )
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
            f"pretrained weights of {spec} cannot be had here ({brief(error)}): give a file of weights instead"
        ) from error


def prepare(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model in eval mode and fp32, with explicit attention and its one output."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"weight {name!r} holds NaN or Inf: such a network computes nothing, give other weights")
    model = model.float().eval()
    explicit_attention(model)
    return Output(model, options["output"]).eval() if "output" in options else model
