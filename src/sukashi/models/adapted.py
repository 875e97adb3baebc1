"""A network made fit for other classes, or for images of another size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sukashi.core.errors import ModelError, SukashiError, UsageError, brief
from sukashi.core.schema import check_scale
from sukashi.core.types import Mask, Preprocess
from sukashi.models.checks import checked_logits, noise
from sukashi.models.loaded import READ, Loaded, Origin
from sukashi.models.specs import build, prepare
from sukashi.models.weights import digest, fill
from sukashi.network import surgery


def with_new_head(loaded: Loaded, n_classes: int) -> Loaded:
    """A copy with the layers that give a number a class made anew, for so many classes, from torch's global generator.

    These are the layers whose shapes follow from the class count of the architecture. Cuts and the mask of all others
    stay; the classes have no names.

    Raises ModelError for an architecture without a class count, or whose classifier is no linear layer or convolution.
    """
    layers = _classifier(loaded, n_classes)
    model = copy.deepcopy(loaded.model)
    prefix = "model." if "output" in loaded.options else ""
    for name in layers:
        parent, _, last = f"{prefix}{name}".rpartition(".")
        old = model.get_submodule(f"{prefix}{name}")
        setattr(model.get_submodule(parent), last, _renewed(old, n_classes, loaded.n_classes, name))
    checked_logits(model, noise(loaded.preprocess).to(next(model.parameters()).device), loaded.spec, whole=False)
    mask = loaded.mask
    if mask is not None:
        mask = Mask({site: keep for site, keep in mask.keep.items() if site.layer.removeprefix(prefix) not in layers})
    return replace(
        loaded,
        model=model.eval(),
        options={**loaded.options, "n_classes": n_classes},
        n_classes=n_classes,
        class_names=None,
        weights_sha256=digest(model),
        mask=mask,
        notes=(
            *loaded.notes,
            f"the classifier ({', '.join(layers)}) is new, for {n_classes} classes in place of {loaded.n_classes}: "
            "before training it knows nothing",
        ),
    )


def read_as(
    loaded: Loaded,
    *,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: str | None = None,
    by: str = "as asked",
) -> Loaded:
    """The same network for images that are read otherwise; what is None stays. `by` is who says so.

    `size` is a side, or height and width, `mean` and `std` a number a channel or one for all. `resize` is "squash",
    "crop:N" (the shorter side to N pixels, then the centre) or "crop", with N as far above the size as the architecture
    was published with (256 for torchvision's ResNets at 224), or the size itself where nobody published any.

    One of timm's that takes one size alone is laid out anew for another square, position embeddings by interpolation.
    Raises UsageError for what is no size, mean, std or rule, ModelError where the network does not take the size, or
    would leave pixels unread that do not fill a patch.
    """
    given = {name: value for name, value in zip(READ, (size, mean, std, resize), strict=True) if value is not None}
    if not given:
        return loaded
    check_scale(mean or ())
    own = loaded.preprocess
    height, width = (own.height, own.width) if size is None else sides(size)
    # Another size keeps the proportion of what is cropped.
    ratio = loaded.crop if own.shorter is None else own.shorter / min(own.height, own.width)
    shorter = own.shorter if resize is None else _shorter(resize, ratio, min(height, width))
    if resize is None and own.shorter is not None:
        shorter = round(ratio * min(height, width))
    numbers: dict[str, Any] = {
        name: tuple(map(float, values)) * (own.channels if len(values) == 1 else 1)
        for name, values in (("mean", mean), ("std", std))
        if values is not None
    }
    return replace(
        _resized(loaded, height, width),
        preprocess=replace(own, height=height, width=width, shorter=shorter, **numbers),
        read_by={**loaded.read_by, **{name: Origin(by) for name in given}},
    )


def sides(size: Sequence[int]) -> tuple[int, int]:
    """Height and width. Raises UsageError for what is no size."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise UsageError(f"size must be a side, or height and width, each at least 1, got {','.join(map(str, size))}")
    return int(size[0]), int(size[-1])


def _shorter(resize: str, ratio: float, side: int) -> int | None:
    """To what a rule resizes the shorter side, None for squash; `ratio` is that of a crop that says no number."""
    rule, colon, number = resize.partition(":")
    if rule not in ("squash", "crop") or (colon and (rule == "squash" or not number.isdecimal() or len(number) > 6)):
        raise UsageError(f"resize must be squash, crop, or crop:N with N pixels of the shorter side, got {resize!r}")
    if rule == "squash":
        return None
    return int(number) if number else round(ratio * side)


def _resized(loaded: Loaded, height: int, width: int) -> Loaded:
    """The same network, laid out anew where it does not take images of this size as it is."""
    own = loaded.preprocess
    if (height, width) == (own.height, own.width):
        return loaded
    changed = replace(loaded, preprocess=replace(own, height=height, width=width, shorter=None))
    try:
        _check(changed, own)
        return changed
    except ModelError:
        laid_out = loaded.spec.startswith("timm:") and hasattr(loaded.model, "set_input_size")
        if not laid_out or height != width:
            raise
    model = _laid_out(loaded, height)
    options = {**loaded.options, "size": height}
    changed = replace(changed, model=model, options=options, weights_sha256=digest(model))
    _check(changed, own)
    return changed


def _laid_out(loaded: Loaded, size: int) -> nn.Module:
    """The network as a saved folder will have it for this size, with its weights; those of places are stretched."""
    stretched: Any = copy.deepcopy(loaded.model)
    options = {**loaded.options, "size": size}
    try:
        with warnings.catch_warnings(action="ignore"):
            stretched.set_input_size(img_size=(size, size))
        with torch.random.fork_rng(devices=[]):
            model = prepare(build(loaded.spec, options, False)[0], options)
        for table in loaded.cuts:
            surgery.replay(model, table)
        before, after = loaded.model.state_dict(), stretched.state_dict()
        pairs = {name: (before[name], after[name]) for name in model.state_dict() if name in before}
        own = model.state_dict()
        fill(model, {name: old if old.shape == own[name].shape else new for name, (old, new) in pairs.items()}, size)
    except (AssertionError, ValueError) as error:  # of timm's, or ours
        raise ModelError(
            f"{loaded.spec} cannot be laid out for {size} x {size} pixels ({brief(error)}): leave `size` out"
        ) from error
    return prepare(model, {}).to(next(loaded.model.parameters()).device)


def _check(resized: Loaded, own: Preprocess) -> None:
    example = noise(resized.preprocess).to(next(resized.model.parameters()).device)
    remedy = f"leave `size` out, its own is {own.height} x {own.width}"
    checked_logits(resized.model, example, resized.spec, whole=True, remedy=remedy)


def _classifier(loaded: Loaded, n_classes: int) -> list[str]:
    """The layers whose shapes follow from the number of classes."""
    try:
        with torch.random.fork_rng(devices=[]):
            one, other = (_shapes(loaded, n) for n in (n_classes, n_classes + 1))
    except SukashiError as error:
        raise ModelError(
            f"{loaded.spec} cannot be built for another number of classes, so it has no classifier to renew: give it a "
            "parameter n_classes"
        ) from error
    return list(dict.fromkeys(name.rpartition(".")[0] for name in one if one[name] != other.get(name)))


def _shapes(loaded: Loaded, n_classes: int) -> dict[str, torch.Size]:
    model, _, _ = build(loaded.spec, {**loaded.options, "n_classes": n_classes}, False)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _renewed(old: nn.Module, n_classes: int, n_before: int, name: str) -> nn.Module:
    if isinstance(old, nn.Linear) and old.out_features == n_before:
        new: nn.Module = nn.Linear(old.in_features, n_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.out_channels == n_before and old.groups == 1:
        sizes = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        new = nn.Conv2d(old.in_channels, n_classes, **sizes, bias=old.bias is not None)
    else:
        raise ModelError(
            f"the classifier {name!r} is a {type(old).__name__}: only linear layers and convolutions are renewed"
        )
    return new.to(next(old.parameters()))
