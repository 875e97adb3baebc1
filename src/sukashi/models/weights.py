"""Weights filled in, what their file says of them, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Preprocess
from sukashi.models.fitting import check_fits, check_kind, check_plain
from sukashi.models.formats import File


def stated_classes(file: File) -> int | None:
    """How many classes the metadata speaks of, or None."""
    stated = file.metadata.get("classes")
    if stated is None:
        return None
    if not stated.isdecimal() or int(stated) < 1:
        raise ModelError(f"the header of {file.path} gives classes={stated!r}: it must be a number of classes")
    return int(stated)


def stated_preprocess(file: File, preprocess: Preprocess) -> Preprocess:
    """The preprocessing with the mean and std that the metadata speaks of."""
    stated = {key: file.metadata[key] for key in ("mean", "std") if key in file.metadata}
    numbers: dict[str, Any] = {}
    for key, text in stated.items():
        with contextlib.suppress(ValueError):
            numbers[key] = tuple(float(part) for part in text.split(","))
        if key not in numbers:
            raise ModelError(f"the header of {file.path} gives {key}={text!r}: it must be numbers with commas between")
    try:
        return replace(preprocess, **numbers)
    except UsageError as error:
        raise ModelError(f"the header of {file.path} says what cannot be: {error}") from error


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
