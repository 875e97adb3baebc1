"""What is asked of units, checked, and a trial for each network: its units at each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sukashi.core import progress
from sukashi.core.code import codes_of
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Trial
from sukashi.decompositions.vectors import units
from sukashi.experiments.audit.looking import Looking
from sukashi.experiments.audit.networks import Network, per_class
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.measures.neurons import layout, looked_at
from sukashi.network import hooks
from sukashi.network.blocks import inner

SETTINGS = ("layers", "top")
TOP = 50  # units of each class, and no more than a quarter of the reference's layer, where `top` leaves it open
CHOOSING = 32  # training images of each class at most, by which means and the units that matter most are found
PARTS: tuple[Callable[..., Any], ...] = (looked_at, layout, units, hooks.means, inner)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if settings.layers is not None and (not settings.layers or len({*settings.layers}) != len(settings.layers)):
        raise UsageError(f"layers must be different names, at least one, got {settings.layers}")


def code(settings: Audit) -> dict[str, str]:
    return codes_of(PARTS)


class Subject(Looking):
    """Units of some layers of the networks of an audit, those that matter most for each class."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        first = networks[0]
        self.networks, self.seed = networks, settings.seed
        self.layers = settings.layers or inner(first.loaded.model, first.some)
        self.sites = {
            one.label: [units(one.loaded.model, layer, one.some) for layer in self.layers] for one in networks
        }
        self.top = [settings.top or max(1, min(TOP, site.n_units // 4)) for site in self.sites[first.label]]
        for label, of in self.sites.items():
            for layer, site, top in zip(self.layers, of, self.top, strict=True):
                if top > site.n_units:
                    raise UsageError(
                        f"`top` must be at most the {site.n_units} units of {layer!r} in {label}, got {top}"
                        f"{'' if settings.top else ', a quarter of those of the reference: give `top`'}"
                    )
        self.layouts = {
            one.label: [layout(one.loaded.model, site, one.some) for site in self.sites[one.label]] for one in networks
        }
        self.choosing = per_class(first, CHOOSING)
        self.code = code(settings)
        self.identity = {"layers": self.layers}
        self.notes = [
            f"{label}: which tokens are patches can't be told ({of[0].unknown}), so all are taken alike"
            for label, of in self.layouts.items()
            if of[0].unknown
        ]
        self.facts = {"layers": self.layers, "top": self.top, "choosing": self.choosing}

    def trials(self, answers: Trial) -> list[Trial]:
        return [
            Trial(self._about(one), partial(self._run, one), label=f"neurons, {one.label}") for one in self.networks
        ]

    def _about(self, one: Network) -> dict[str, Any]:
        return {
            "neurons": self.facts,
            "seed": self.seed,
            **one.about,
            "code": self.code,
        }

    def _run(self, one: Network, desk: Desk) -> None:
        """Keeps of each layer what the units that matter most for each class answer to, and what hangs on them."""
        model, sites, n_classes = one.loaded.model, self.sites[one.label], len(one.answers.class_names)
        chosen, batch = one.training(self.choosing, self.seed), one.batch.to(one.setting.device)
        kept: dict[str, Any] = {}
        with progress.task("layers", len(sites)) as shown:
            means = hooks.means(model, sites, (part.x for part in chosen.in_passes()))
            for i, (site, n) in enumerate(zip(sites, self.top, strict=True)):
                lies = self.layouts[one.label][i]
                found = looked_at(model, site, means[site], chosen, batch, lies, n_classes, n)
                kept |= {f"{i} {name}": of.cpu().numpy() for name, of in found.items()}
                shown.advance(note=self.layers[i])
        desk.save("neurons", kept)
        desk.finish({"units": [site.n_units for site in sites]})
