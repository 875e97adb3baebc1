"""Weights filled in, what their file says of them, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.core.bounded import from_json
from sukashi.core.errors import ModelError
from sukashi.models.fitting import check_fits, check_kind, check_plain
from sukashi.models.formats import File
from sukashi.models.loaded import Trained


def stated_classes(file: File) -> int | None:
    """How many classes the metadata speaks of, or None."""
    stated = file.metadata.get("classes")
    if stated is None:
        return None
    if not stated.isdecimal() or int(stated) < 1:
        raise ModelError(f"the header of {file.path} gives classes={stated!r}: it must be a number of classes")
    return int(stated)


def stated_reading(file: File) -> dict[str, Any]:
    """What the metadata says of how images are read: size, mean, std and resize, as `read_as` takes them."""
    found: dict[str, Any] = {}
    for key, number in (("size", int), ("mean", float), ("std", float)):
        text = file.metadata.get(key)
        if text is None:
            continue
        with contextlib.suppress(ValueError):
            found[key] = [number(part) for part in text.split(",")]
        if key not in found:
            what = "one or two whole numbers" if key == "size" else "numbers"
            raise ModelError(f"the header of {file.path} gives {key}={text!r}: it must be {what} with commas between")
    return found | ({"resize": file.metadata["resize"]} if "resize" in file.metadata else {})


def stated_training(file: File) -> tuple[Trained, ...] | None:
    """What the metadata says that the weights were trained on, or None."""
    if "trained_on" not in file.metadata:
        return None
    try:
        return tuple(Trained(str(splits), float(part)) for splits, part in from_json(file.metadata["trained_on"]))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the header of {file.path} gives trained_on={file.metadata['trained_on'][:100]!r}: it must be a JSON list "
            "of pairs, a hash of data and the fraction held out for validation"
        ) from error


def stated_names(file: File, n_classes: int) -> tuple[str, ...] | None:
    """What the metadata calls the classes, a JSON list of so many names, or None."""
    text = file.metadata.get("class_names")
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        names = from_json(text)
        if isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == n_classes:
            return tuple(names)
    raise ModelError(
        f"the header of {file.path} gives class_names={text[:100]!r}: it must be a JSON list of {n_classes} names, in "
        "the order of the outputs"
    )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Copy tensors into the model; none but exactly its own, so that nothing keeps its random start unnoticed."""
    own = model.state_dict()
    check_fits(own, tensors, where)
    for name, tensor in tensors.items():
        check_plain(name, tensor, where)
        check_kind(name, tensor, own[name], where)
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
