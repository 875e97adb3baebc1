"""The slow twin of every registered method: its formula in loops, dense matrices and runs of the whole network.

`@oracle("criteria", "magnitude")` makes a function the twin of a method; test_oracles.py fails for a method without
one, and compares each with its method. A twin shares no code with what it checks, and has its defaults. What one gives:

    criterion(model, sites, data, *, generator, **options) -> Scores or Plan
    attribution(model, image, target, site, **options) -> (U, positions) of one image (C, H, W)
    measure(what it asks for by name, maps and masks as tensors, **options) -> one number an image, as a list, or
        several such by the names of their parts
    repair(cut network, dense, table, x, norms), in place
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Oracle:
    """A twin, how near its method comes to it, and the options that a method must be given to do what its twin does."""

    fn: Callable[..., Any]
    rtol: float
    atol: float
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asks(self) -> list[str]:
        """What it is given, by name."""
        parameters = inspect.signature(self.fn).parameters.values()
        return [parameter.name for parameter in parameters if parameter.default is parameter.empty]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


ORACLES: dict[tuple[str, str], Oracle] = {}


def oracle(registry: str, name: str, *, rtol: float = 1e-9, atol: float = 1e-12, **given: Any) -> Callable[..., Any]:
    """Make a function the twin of the method `name` of a registry: attributions, criteria or measures."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        assert (registry, name) not in ORACLES, f"{name} of {registry} has two oracles"
        ORACLES[registry, name] = Oracle(fn, rtol, atol, given)
        return fn

    return add


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"oracles.{_module}")
