"""What is asked of saliency maps, checked, and the trials that measure them."""

from __future__ import annotations

from collections.abc import Sequence

from sukashi.attributions import attributions as explainers
from sukashi.core.bracketed import plain
from sukashi.core.code import code_of
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Trial
from sukashi.experiments.audit.looking import Looking
from sukashi.experiments.audit.networks import Network
from sukashi.experiments.audit.saliency import places
from sukashi.experiments.audit.saliency.cells import (
    BASICS,
    MEASURES,
    MEASURES_OF_TRANSFORMERS,
    OF_TRANSFORMERS,
    PARTS,
    Auditor,
    explaining,
    usual,
)
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.methods import codes
from sukashi.measures import measures as registry

SETTINGS = ("attributions", "measures", "population", "sanity", "masks", "options")


class Subject(Looking):
    """Saliency maps of the networks of an audit: `facts` and `areas` are kept with their answers."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        names, refused = explaining(networks, settings.attributions, settings.options)
        truth, said = places.truth(networks[0], settings)
        measures = places.chosen(settings.measures, usual(networks), truth)
        for name in settings.options:
            if name not in (*names, *refused, *measures):
                raise UsageError(f"options were given for {name!r}, which is not part of this audit: leave them out")
        self.names = names
        self.auditor = Auditor(networks, measures, truth, settings.options, settings.seed, settings.sanity)
        if settings.sanity and not self.auditor.similar:
            raise UsageError("sanity lays maps beside maps: add rank_correlation to `measures`, or leave `sanity` out")
        self.auditor.try_out(names[0])
        self.areas = {concept: share.numpy() for concept, share in places.shares(truth).items()}
        self.notes = [said] if said else []
        self.facts = {"attributions": names, "refused": refused, "seed": settings.seed}
        self.identity = {
            "attributions": {name: explainers[name].deciding(settings.options.get(name, {})) for name in names},
            "measures": {name: registry[name].deciding(settings.options.get(name, {})) for name in measures},
            "options": {},  # with their methods
            **({"masks": places.digest(truth)} if truth else {}),
        }

    def trials(self, answers: Trial) -> list[Trial]:
        return self.auditor.trials(self.names, answers)


def code(settings: Audit) -> dict[str, str]:
    """{name: a hash of its code} of the attributions and measures, those that networks may have where nobody says which
    too, and of what else has a part in a figure.
    """
    usual = settings.model_copy(
        update={
            "attributions": settings.attributions or [*BASICS, *OF_TRANSFORMERS],
            "measures": settings.measures or [*MEASURES, *MEASURES_OF_TRANSFORMERS, *places.BY_DEFAULT],
        }
    )
    return codes(usual) | {name: code_of(part) for name, part in PARTS.items()}


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    for name in settings.attributions or ():
        explainers[name]
    for name in settings.measures or ():
        if plain(name) != name:
            method = plain(name)
            options = f"`options={{{method!r}: {{'NAME': VALUE}}}}`"
            raise UsageError(f"an audit has a measure once, got {name!r}: give {method}, and {options}")
        if not registry[name].inputs & {"maps", "masks"}:
            known = [method.name for method in registry if method.inputs & {"maps", "masks"}]
            raise UsageError(f"{name} measures no saliency maps and no regions: choose from {', '.join(known)}")
    for name, chosen in settings.options.items():
        (explainers if plain(name) in explainers else registry)[name].check_options(chosen)
