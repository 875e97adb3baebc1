"""The tensors of a file as those of a network: which of its sets, by which names, and what follows from others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sukashi.core.errors import ModelError, UsageError, nearest
from sukashi.models.formats import File, Tensors
from sukashi.network.layers import fused_names

_SHOWN = 3
_REMEDY = "check its name, classes, width and image size"
_WRAPPERS = {"module", "_orig_mod"}  # what DataParallel and torch.compile put into names
_COUNTS = ("n_averaged", "total_ops", "total_params")  # what AveragedModel and thop leave in a network
_PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
# What is left in a file in place of {layer}.{name} where it is computed, and what makes it a weight again.
_COMPUTED = {
    "{layer}.{name}_g": "torch.nn.utils.remove_weight_norm(layer)",
    "{layer}.{name}_u": "torch.nn.utils.remove_spectral_norm(layer)",
    "{layer}.parametrizations.{name}.original": _PARAMETRIZED,
    "{layer}.parametrizations.{name}.original0": _PARAMETRIZED,
}


@dataclass(frozen=True)
class Fit:
    """Tensors by a network's own names.

    `keeps` says of a weight that was saved under a mask of torch's pruning what stays of it, `notes` what was done.
    """

    tensors: Tensors
    keeps: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fit(model: nn.Module, file: File, key: str | None = None) -> Fit:
    """The set of a file that fits a network, but perhaps for the number of classes; `key` says which, if several do.

    Raises ModelError where none or several fit, and for tensors that are no plain numbers; UsageError for a key that
    the file does not have.
    """
    own = model.state_dict()
    found = dict(_candidates(model, own, file))
    if key is not None and key not in found:
        raise UsageError(f"{file.path} has no weights {key!r}{nearest(key, list(found))}")
    if key is not None:
        return found[key]
    fitting = [name for name, one in found.items() if fits(own, one.tensors)]
    if len(fitting) > 1:
        raise ModelError(
            f"{file.path} holds {len(fitting)} sets of weights that fit, {', '.join(map(repr, fitting))}, and an "
            f"average is not the weights it is of: choose one, as with `weights_key={fitting[-1]!r}`"
        )
    if fitting:
        return found[fitting[0]]
    likest = min(found.values(), key=lambda one: sum(map(len, faults(own, one.tensors).values())))
    check_fits(own, likest.tensors, file.path, "give the folder of all its parts" if file.is_shard else _REMEDY)
    return likest


def fits(own: Tensors, tensors: Tensors) -> bool:
    """Whether tensors are a network's own, but perhaps for the number of classes."""
    return not any(faults(own, tensors).values()) or (own.keys() == tensors.keys() and n_rows(own, tensors) is not None)


def n_rows(own: Tensors, tensors: Tensors) -> int | None:
    """How many rows those tensors have that differ from a network's own, where all differ by rows alone, and alike.

    That is the number of classes: in a classifier nothing but the rows follows from it. None where nothing differs.
    """
    pairs = [(own[name].shape, tensors[name].shape) for name in own if name in tensors]
    changed = [(mine, given) for mine, given in pairs if mine != given]
    if not changed or any(len(mine) != len(given) or not mine or mine[1:] != given[1:] for mine, given in changed):
        return None
    rows = {(mine[0], given[0]) for mine, given in changed}
    return int(changed[0][1][0]) if len(rows) == 1 else None


def faults(own: Tensors, tensors: Tensors) -> dict[str, list[str]]:
    """How tensors differ from a network's own: {"missing", "unexpected", "of another shape": names}."""
    return {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }


def check_fits(own: Tensors, tensors: Tensors, where: object, remedy: str = _REMEDY) -> None:
    """Refuse tensors that are not exactly a network's own, so that nothing keeps its random start unnoticed."""
    counts = "; ".join(
        f"{len(found)} {fault}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for fault, found in faults(own, tensors).items()
        if found
    )
    if counts:
        raise ModelError(f"the weights of {where} do not fit the model ({counts}): {remedy}")


def side_of(model: nn.Module, file: File) -> int | None:
    """The side of the images of a vision transformer, by its position embedding in a file, if the model's differs."""
    own: Any = getattr(model, "pos_embed", None)
    patches: Any = getattr(model, "patch_embed", None)
    if own is None or not hasattr(patches, "grid_size"):
        return None
    n_others = own.shape[1] - math.prod(patches.grid_size)  # the class token and its like
    for tensors in file.sets.values():
        for name, tensor in tensors.items():
            if name.endswith("pos_embed") and tensor.dim() == 3 and tensor.shape[1] != own.shape[1] > n_others:
                side = math.isqrt(max(0, tensor.shape[1] - n_others))
                return side * int(patches.patch_size[0]) if side * side == tensor.shape[1] - n_others else None
    return None


# Plain numbers.


def check_kind(name: str, tensor: Tensor, own: Tensor, where: object) -> None:
    """Refuse a tensor of another kind than a network's own: codes or yes and no in place of weights."""
    if own.is_floating_point():
        right, remedy = tensor.is_floating_point(), "codes are no weights, give those that they were made of"
    else:
        right = not tensor.is_complex() and torch.equal(tensor.to(own.dtype).to(tensor.dtype), tensor)
        remedy = "give numbers of that type"
    if not right:
        given, wanted = (str(one.dtype).removeprefix("torch.") for one in (tensor, own))
        raise ModelError(f"{name!r} in {where} is of type {given}, its place in the model is for {wanted}: {remedy}")


def check_plain(name: str, tensor: Tensor, where: object) -> None:
    """Refuse a tensor that does not hold its numbers one by one."""
    faults = {
        "has a shape and no values (device meta): save the model after its weights are loaded": tensor.is_meta,
        "is several of different shapes: save each alone": tensor.is_nested,
        "is quantised: save it after .dequantize()": tensor.is_quantized,
        "is sparse: save it after .to_dense()": tensor.layout != torch.strided,
    }
    for fault, present in faults.items():
        if present:
            raise ModelError(f"{name!r} in {where} {fault}")


# Names.


def _candidates(model: nn.Module, own: Tensors, file: File) -> Iterator[tuple[str, Fit]]:
    """The sets of a file by the network's own names: an entry, or where it holds several networks each of these."""
    for entry, tensors in file.sets.items():
        for name, tensor in tensors.items():
            check_plain(name, tensor, file.path)
        given = _multiplied(_without_counts(Fit(tensors), own), own)
        prefixes = _prefixes(_bare(own), _bare(given.tensors))
        for prefix in prefixes:
            name = entry if len(prefixes) == 1 else f"{entry}.{prefix}".strip(".")
            yield name, _completed(model, own, _renamed(given, own, prefix), file)


def _without_counts(given: Fit, own: Tensors) -> Fit:
    counts = [name for name in given.tensors if name not in own and name.endswith(_COUNTS)]
    if not counts:
        return given
    tensors = {name: tensor for name, tensor in given.tensors.items() if name not in counts}
    return replace(given, tensors=tensors, notes=(f"counts among the weights were left out, as {counts[0]}",))


def _multiplied(given: Fit, own: Tensors) -> Fit:
    """The same with the product where torch's pruning left a weight and its mask apart."""
    tensors = dict(given.tensors)
    masked = [name.removesuffix("_mask") for name in tensors if name.endswith("_mask") and name not in own]
    masked = [name for name in masked if f"{name}_orig" in tensors]
    keeps = {name: tensors.pop(f"{name}_mask") for name in masked}
    for name, keep in keeps.items():
        tensors[name] = tensors.pop(f"{name}_orig") * keep
    if not keeps:
        return given
    told = f"weights saved under masks of torch's pruning are zero where these are, as {masked[0]}"
    return Fit(tensors, {name: keep != 0 for name, keep in keeps.items()}, (*given.notes, told))


def _bare(names: Collection[str]) -> dict[str, str]:
    """Names without what wrappers put into them, and what they are with it; as they are where two would be one."""
    found = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _prefixes(own: Collection[str], given: Collection[str]) -> list[str]:
    """What stands before a network's names in a file: nothing, "model.", or where it holds several that of each."""
    first, last = next(iter(own), ""), next(reversed([*own]), "")
    ends = [(name, end) for name in given for end in (first, last) if f".{name}".endswith(f".{end}")]
    covered = {
        prefix: sum(prefix + name in given for name in own)
        for prefix in dict.fromkeys(name.removesuffix(end) for name, end in ends)
    }
    most = max(covered.values(), default=0)
    return [prefix for prefix, n in covered.items() if n == most] or [""]


def _renamed(given: Fit, own: Tensors, prefix: str) -> Fit:
    mine = _bare(own)
    inside = {name: old for name, old in _bare(given.tensors).items() if name.startswith(prefix)}
    new = {old: mine.get(name.removeprefix(prefix), name.removeprefix(prefix)) for name, old in inside.items()}
    notes = list(given.notes)
    other = next((old for old, name in new.items() if old != name), None)
    if other is not None:
        notes.append(f"weights go by other names in the file, as {other} for {new[other]}")
    outside = [name for name in given.tensors if name not in new]
    if outside:
        notes.append(f"what is not of this network was left out of its weights, as {outside[0]}")
    return Fit(
        {name: given.tensors[old] for old, name in new.items()},
        {new[old]: keep for old, keep in given.keeps.items() if old in new},
        tuple(notes),
    )


def _completed(model: nn.Module, own: Tensors, given: Fit, file: File) -> Fit:
    """The same with what follows from the rest: tied weights that were stored once, and counts of batches."""
    tensors, notes = fused_names(model, given.tensors), given.notes
    for names in _tied(own):
        there = [name for name in names if name in tensors]
        if any(not torch.equal(tensors[name], tensors[there[0]]) for name in there[1:]):
            raise ModelError(f"{' and '.join(there[:2])} are one tensor in the model and differ in {file.path}")
        tensors |= {name: tensors[there[0]] for name in names if there}
    missing = [name for name in own if name not in tensors]
    counts = [name for name in missing if name.endswith("num_batches_tracked")]
    if counts:
        tensors |= {name: own[name] for name in counts}
        notes += (f"the weights have no counts of batches, as {counts[0]}: those start at 0",)
    for name in missing:
        _check_not_computed(name, tensors, file)
    return replace(given, tensors=tensors, notes=notes)


def _tied(own: Tensors) -> Iterator[list[str]]:
    """Names of tensors that are one."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in own.items():
        if tensor.numel():
            found.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    yield from (names for names in found.values() if len(names) > 1)


def _check_not_computed(missing: str, tensors: Tensors, file: File) -> None:
    layer, _, name = missing.rpartition(".")
    for form, remedy in _COMPUTED.items():
        if form.format(layer=layer, name=name).lstrip(".") in tensors:
            raise ModelError(
                f"{file.path} holds not {missing!r} but what it is computed from: call {remedy} before the state_dict "
                "is saved"
            )
