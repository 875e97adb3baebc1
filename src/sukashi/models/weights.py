"""Files of weights, read as plain data and never unpickled; filling them in; hashes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Preprocess

_SHOWN = 3


# Weights.


@dataclass(frozen=True)
class File:
    """A file of weights, read once: its tensors by name, its text metadata and its hash."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str


def read(path: Path) -> File:
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
