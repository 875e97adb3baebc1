"""Networks that are objects already: held by this process under a name that says what they are."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sukashi.core.errors import ModelError, SukashiError
from sukashi.core.types import Mask, Preprocess
from sukashi.models.checks import copied, named_outputs, noise
from sukashi.models.loaded import HELD, MEMORY, Held, Loaded
from sukashi.models.specs import build, prepare
from sukashi.models.weights import tensor_digests
from sukashi.network import canonical, hooks, surgery

# Of the largest output, between two passes of one network.
_SAME = 1e-5
# What every module has and what decides nothing in eval mode; hooks are numbered anew in each process.
_KEEPING = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def hold(given: nn.Module | Loaded, preprocess: Preprocess | None = None) -> str:
    """The spec by which `load` finds a network again in this process: memory:CLASS-HASH.

    The hash is over weights, structure, preprocessing and whatever a `Loaded` says, so the same network has the same
    name in another process. A module's own attribute `preprocess` comes before the one given here. A copy is kept: what
    is done to the network later is not seen. Spec, options and cuts of a `Loaded` stay where they give its structure;
    otherwise the network in memory is what a saved cut is built from again.

    Raises ModelError for a network that does not say what it reads, or that computes something else than the network
    already held under its name.
    """
    loaded = given if isinstance(given, Loaded) else None
    model = given.model if isinstance(given, Loaded) else given
    preprocess = getattr(model, "preprocess", preprocess) if loaded is None else loaded.preprocess
    if not isinstance(preprocess, Preprocess):
        raise ModelError(
            f"a {type(model).__name__} does not say what it reads: give it an attribute preprocess = "
            "sukashi.Preprocess(...), or give data whose images are tensors"
        )
    kept = copied(model, f"this {type(model).__name__}")
    said: list[Any] = [tensor_digests(model.state_dict()), structure(model), repr(preprocess)]
    rebuilt = loaded is not None and _rebuilt(loaded)
    if loaded is not None:
        made = [loaded.spec, dict(loaded.options), repr(loaded.cuts)] if rebuilt else []
        said.append([loaded.class_names, loaded.n_classes, _masked(loaded.mask), made])
    name = f"{type(model).__name__}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
    if name in HELD and not _alike(HELD[name].model, model, preprocess):
        raise ModelError(
            f"two networks are {name} by their weights, attributes and code, and still compute different things: "
            "give what differs as an attribute of the module, a number or a text"
        )
    if loaded is not None:
        own: dict[str, Any] = {} if rebuilt else {"spec": f"{MEMORY}{name}", "options": {}, "cuts": ()}
        loaded = dataclasses.replace(loaded, model=kept, **own)
    HELD[name] = Held(kept, preprocess, loaded)
    return f"{MEMORY}{name}"


def _rebuilt(loaded: Loaded) -> bool:
    """Whether spec, options and cuts give a network of the same structure, as a saved folder will take for granted."""
    options = dict(loaded.options)
    try:
        with torch.random.fork_rng(devices=[]):
            model = prepare(build(loaded.spec, options, False)[0], options)
        for table in loaded.cuts:
            surgery.replay(model, table)
        return structure(prepare(model, {})) == structure(loaded.model)
    except SukashiError:
        return False


def structure(model: nn.Module) -> list[Any]:
    """What decides a network's function beside its weights, as JSON that is the same in every process.

    The graph where torch.fx can trace it, else the code of its classes; modules with their attributes and hooks.
    """
    root = canonical.share(model).eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            graph: Any = str(_Whole().trace(root))
    except Exception:  # whatever tracing somebody's code raises
        classes = {cls: None for module in root.modules() for cls in type(module).__mro__ if _foreign(cls)}
        graph = [_told(dict(vars(cls)), {}, set(), code_only=True) for cls in classes]
    weights = {id(tensor) for tensor in root.state_dict(keep_vars=True).values()}
    return [graph, _told(root, {}, weights)]


class _Whole(canonical.Tracer):
    """Sees the forward of every module that is not torch's own."""

    is_leaf_module = fx.Tracer.is_leaf_module


def _foreign(cls: type) -> bool:
    return cls is not object and not cls.__module__.startswith("torch.")


def _told(value: Any, seen: dict[int, tuple[int, Any]], weights: set[int], *, code_only: bool = False) -> Any:
    """A value as JSON: numbers, texts, tensors, code and what holds them whole, any other object by its class.

    `weights` are tensors that somebody else tells the values of. `code_only` takes functions of a class alone.
    """
    tell = functools.partial(_told, seen=seen, weights=weights)
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype() | torch.device():
            return repr(value)
        case type():
            return f"{value.__module__}.{value.__qualname__}"
        case tuple():
            return ["tuple", *map(tell, value)]
        case set() | frozenset():
            return ["set", *sorted(json.dumps(tell(part)) for part in value)]
        case CodeType():
            return [value.co_code.hex(), value.co_names, [tell(part) for part in value.co_consts]]
        case MethodType():
            return [tell(value.__func__), tell(value.__self__)]
    # Only what has an identity of its own: equal constants may or may not be one object.
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = (len(seen), value)
    kind = tell(type(value))
    match value:
        case Tensor() if id(value) in weights:
            return [kind, str(value.dtype), list(value.shape)]
        case Tensor():
            return [kind, tensor_digests({"": value})]
        case np.ndarray():
            return [kind, str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
        case nn.Module():
            own = {name: part for name, part in sorted(vars(value).items()) if name not in _KEEPING}
            return [
                kind,
                [[name, tell(part)] for name, part in own.items()],
                [tell(hook) for hook in hooks.registered(value)],
            ]
        case Mapping():
            parts = value.items()
            if code_only:
                parts = {name: part for name, part in value.items() if isinstance(part, FunctionType)}.items()
            return [kind, [[tell(name), tell(part)] for name, part in parts]]
        case list():
            return [kind, *map(tell, value)]
        case functools.partial():
            return [kind, tell(value.func), tell(value.args), tell(value.keywords)]
        case FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [tell(value.__code__), tell(value.__defaults__), tell(value.__kwdefaults__), *map(tell, cells)]
    if dataclasses.is_dataclass(value):
        return [kind, [[field.name, tell(getattr(value, field.name))] for field in dataclasses.fields(value)]]
    return [kind, getattr(value, "__qualname__", "")]


def _masked(mask: Mask | None) -> Any:
    if mask is None:
        return None
    return sorted([site.layer, repr(site), tensor_digests({"": keep})] for site, keep in mask.keep.items())


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module, preprocess: Preprocess) -> bool:
    """Whether two networks give the same for noise; where one fails, `load` says why."""
    example = noise(preprocess)
    try:
        first, second = (_outputs(copy.deepcopy(model).cpu().float().eval(), example) for model in (one, other))
    except Exception:  # whatever a network raises
        return True
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=_SAME * float(a.abs().max()), equal_nan=True))
        for a, b in zip(first, second, strict=True)
    )


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    found = model(example)
    parts = [found] if isinstance(found, Tensor) else [part for _, part in named_outputs(found)]
    return [part.double() for part in parts if isinstance(part, Tensor)]
