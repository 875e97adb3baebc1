"""Files of weights as tools write them: told apart by what is in them, read as plain data and never unpickled."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sukashi.core import bounded
from sukashi.core.errors import ModelError

Tensors = Mapping[str, Tensor]

# What a folder of weights holds, as model hubs have them; the first that is there counts.
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Beginnings of files that are often given by mistake.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run git lfs pull",
    b"\x89hdf": "an HDF5 file, as Keras writes: save the weights with torch or safetensors",
    b"<!doctype": "a web page: fetch the file again",
    b"<html": "a web page: fetch the file again",
}
_DEEPEST = 3  # a set of weights is under an entry of an entry at most
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


@dataclass(frozen=True)
class File:
    """A file of weights, read once.

    `sets` are the tensors in it by name: those under each entry that holds any, "" where the file holds them itself.
    `metadata` is the text of a safetensors header, `sha256` the hash of the file; of a file in parts that of all parts.
    """

    path: Path
    sets: Mapping[str, Tensors]
    metadata: Mapping[str, str]
    sha256: str

    @property
    def tensors(self) -> Tensors:
        """Those of a file that holds one set alone. Raises ModelError for any other."""
        if set(self.sets) != {""}:
            raise ModelError(f"{self.path} must hold tensors alone, and has {', '.join(self.sets)}: fetch it again")
        return self.sets[""]

    def sha256_of(self, entry: str | None) -> str:
        """The hash of the file, and of the name where it was asked for one of its sets."""
        return self.sha256 if entry is None else hashlib.sha256(f"{self.sha256} {entry}".encode()).hexdigest()

    @property
    def is_shard(self) -> bool:
        """Whether its name says that it is a part of several."""
        return _SHARD.search(self.path.name) is not None


def holds_weights(path: Path) -> bool:
    """Whether a folder holds weights as model hubs have them."""
    return any((path / name).is_file() for name in _IN_FOLDERS)


def read(path: Path) -> File:
    """A file of weights: safetensors, what torch.save wrote, the index of such in parts, or a folder with one of these.

    Raises ModelError for anything else; nothing in it is run.
    """
    if path.is_dir():
        path = path / next((name for name in _IN_FOLDERS if (path / name).is_file()), _IN_FOLDERS[1])
    data = _content(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if _is_safetensors(data, path):
        return _safetensors(data, path, sha256)
    if data.startswith((b"PK\x03\x04", b"\x80")):
        return File(path, _unpickled(data, path), {}, sha256)
    if data.lstrip()[:1] == b"{":
        return _sharded(path, data)
    for start, what in _OTHERS.items():
        if data[: len(start)].lower() == start:
            raise ModelError(f"weights {path} are {what}")
    raise ModelError(f"weights {path} must be a file of safetensors or of torch.save, and this is neither")


def _is_safetensors(data: bytes, path: Path) -> bool:
    """Whether a file begins as one of safetensors does: eight bytes with the length of the header, then JSON."""
    whole = data[8:9] == b"{" and 8 + int.from_bytes(data[:8], "little") <= len(data)
    return whole or (path.suffix.lower() == ".safetensors" and not data.startswith((b"PK\x03\x04", *_OTHERS)))


def _safetensors(data: bytes, path: Path, sha256: str) -> File:
    try:
        # Its parser holds the header against the bytes that follow: every tensor inside, none overlapping, no gap.
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:
        raise ModelError(f"{path} is no intact safetensors file ({error}): fetch or save it again") from error
    header = bounded.from_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # Its own order is another in every process.
    return File(path, {"": dict(sorted(tensors.items()))}, header.get("__metadata__", {}), sha256)


def _content(path: Path) -> bytes:
    try:
        return bounded.read(path)
    except OSError as error:
        raise ModelError(f"cannot read weights {path} ({error.strerror}): check the path") from error


def _unpickled(data: bytes, path: Path) -> Mapping[str, Tensors]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that wants to run code, or no pickle at all
        raise ModelError(f"{path} was refused, and nothing in it was run: {_reason(data, path, error)}") from error
    sets = dict(_sets(found))
    if not sets:
        raise ModelError(
            f"{path} must hold a state_dict, tensors by name, alone or under an entry as 'state_dict' or 'model', and "
            "holds none: save model.state_dict()"
        )
    return sets


def _reason(data: bytes, path: Path, error: Exception) -> str:
    """Why torch does not load a file, and what to do."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return f"it is a TorchScript archive; save torch.jit.load('{path.name}').state_dict()"
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # of torch's older format, or damaged
        found = re.findall(r"GLOBAL (\S+) was not", str(error))
    if not found:
        return "it is damaged, or torch.save did not write it; fetch or save it again"
    return (
        f"it holds more than tensors, {', '.join(sorted(found)[:3])}; if you trust it, save its tensors alone: "
        f"torch.save(torch.load('{path.name}', weights_only=False)['state_dict'], 'weights.pt'), or of a whole module "
        "its .state_dict()"
    )


def _sets(found: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Sets of weights in what torch.save wrote, by the entry each lies under."""
    # An optimiser's state is no network's.
    if not isinstance(found, Mapping) or "param_groups" in found:
        return
    tensors = {key: part for key, part in found.items() if isinstance(key, str) and isinstance(part, Tensor)}
    if tensors:
        yield name, tensors
    for key, part in found.items():
        if isinstance(key, str) and depth < _DEEPEST:
            yield from _sets(part, f"{name}.{key}" if name else key, depth + 1)


def _sharded(path: Path, data: bytes) -> File:
    """Weights in several files, which the index beside them names."""
    try:
        shards = sorted(set(bounded.from_json(data)["weight_map"].values()))
        fine = bool(shards) and all(name == Path(name).name and name not in (".", "..") for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise ModelError(f"{path} is no index of weights: give a .safetensors file, or the index with its parts beside")
    parts = [_part(path.parent / name) for name in shards]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    whole = hashlib.sha256(data + "".join(part.sha256 for part in parts).encode())
    return File(path, {"": tensors}, {}, whole.hexdigest())


def _part(path: Path) -> File:
    if path.name.endswith(".json"):
        raise ModelError(f"{path} is an index, and no part of one: fetch the weights again")
    return read(path)
