"""Measuring an audit: networks on the same images, their maps by each attribution, every number of every image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sukashi.attributions import attributions as explainers
from sukashi.attributions.maps import Channels, saliency_map
from sukashi.core import progress
from sukashi.core.bracketed import plain
from sukashi.core.code import code_of
from sukashi.core.errors import ModelError
from sukashi.core.experiment import Trial
from sukashi.core.types import Batch, Maps, pass_size
from sukashi.experiments.audit.networks import Network
from sukashi.experiments.audit.saliency import places
from sukashi.experiments.audit.saliency.summary import moved
from sukashi.experiments.audit.saliency.values import OF_CURVES, ORDERS, OUTCOMES, Array, Cell
from sukashi.experiments.workspace import Desk
from sukashi.measures import measures as registry
from sukashi.measures.inputs import Inputs, measured
from sukashi.network import perturbed, sites
from sukashi.network.layers import AttentionCore

BATCH = 64  # images at once: ROAD at 224 pixels takes less than 2 GB for them
USUAL = 3  # images of a gallery that were not chosen for their maps

# How the channels of an attribution become a map, where that isn't their sum. Suwal et al. 2025 (appendix B) measure
# absolute values of slopes and integrated gradients; relevance (LRP, Chefer) keeps its sign and what it sums to.
CHANNELS: dict[str, Channels] = {
    "saliency": "sum_abs",
    "smoothgrad": "sum_abs",
    "internal_influence": "sum_abs",
    "integrated_gradients": "sum_abs",
}
# What an audit has where nobody says which, and what it has of transformers too.
BASICS, OF_TRANSFORMERS = ("saliency", "integrated_gradients"), ("chefer",)
MEASURES = ("gini", "road", "aopc", "rank_correlation", "ssim", "top_overlap")
MEASURES_OF_TRANSFORMERS = ("insertion", "deletion")


# What has a part in a figure beside its methods, by the names that a change of its code is told by.
MAPS, ROUNDING, RANDOMISATION = "maps", "rounding", "randomisation"
PARTS: dict[str, Callable[..., Any]] = {
    MAPS: saliency_map,
    ROUNDING: perturbed.rounded,
    RANDOMISATION: perturbed.randomised,
}


def channels(name: str) -> Channels:
    return CHANNELS.get(plain(name), "sum")


def explaining(
    networks: Sequence[Network], asked: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], dict[str, str]]:
    """The attributions that every network takes, and why the others are left out."""
    names = list(asked or [*BASICS, *(OF_TRANSFORMERS if all(map(_attends, networks)) else ())])
    refused: dict[str, str] = {}
    for name in names:
        for network in networks:
            try:
                maps_of(network, network.batch[:2], name, options.get(name, {}))
            except ModelError as error:
                refused[name] = f"{network.label}: {error}"
                break
    if len(refused) == len(names):
        raise ModelError("; ".join(f"{name} refuses {reason}" for name, reason in refused.items()))
    return [name for name in names if name not in refused], refused


def _attends(network: Network) -> bool:
    return any(isinstance(module, AttentionCore) for module in network.loaded.model.modules())


def usual(networks: Sequence[Network]) -> list[str]:
    """The measures of maps that an audit has where nobody says which."""
    return [*MEASURES, *(MEASURES_OF_TRANSFORMERS if all(map(_attends, networks)) else ())]


def maps_of(network: Network, batch: Batch, name: str, options: Mapping[str, Any]) -> Tensor:
    """(B, H, W) of what an attribution says of each image's class, on the network's device."""
    pixels = sites.input_site(batch.x)
    device = network.setting.device
    found = explainers[name](
        network.loaded.model, batch.x.to(device), batch.target.to(device), [pixels], batch.objective, **dict(options)
    )[pixels]
    return saliency_map(found, channels(name))


def _with(network: Network, model: nn.Module) -> Network:
    return replace(network, setting=replace(network.setting, loaded=replace(network.loaded, model=model)))


def parts(network: Network, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows, as many at a time as are explained and measured at once."""
    size = min(BATCH, pass_size(network.batch.x))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def usual_rows(of_models: Sequence[NDArray[np.int64]], rows: NDArray[np.int64], target: NDArray[np.int64]) -> list[int]:
    """USUAL images that all models of which sentences speak are audited on, or else any of `rows`: the first of each
    class, then the second."""
    shared = set(rows.tolist()).intersection(*(of.tolist() for of in of_models)) or set(rows.tolist())
    seen: dict[int, int] = {}
    order = []
    for row in sorted(shared):
        number = int(target[row])
        seen[number] = seen.get(number, 0) + 1
        order.append((seen[number], number, row))
    return [row for _, _, row in sorted(order)[:USUAL]]


def _codes(measures: Sequence[str]) -> dict[str, str]:
    return {name: registry[name].code for name in measures}


# --- cells


class Auditor:
    """Measures maps, network by network and attribution by attribution, or reads what was measured before."""

    def __init__(
        self,
        networks: Sequence[Network],
        measures: Sequence[str],
        truth: Mapping[str, Tensor],
        options: Mapping[str, Any],
        seed: int,
        sanity: bool,
    ) -> None:
        self.networks, self.truth, self.options, self.seed, self.sanity = networks, truth, options, seed, sanity
        self.regional = [name for name in measures if places.is_regional(name)]
        self.measures = [name for name in measures if name not in self.regional]
        self.similar = [name for name in self.measures if "reference_maps" in registry[name].inputs]
        self._kept: dict[str, Tensor] = {}
        self.reference = networks[0]
        # Of all images: which of them are audited may differ from model to model.
        self.rows = np.unique(np.concatenate([network.rows for network in networks]))

    def try_out(self, name: str) -> None:
        """Measure two images, so that a measure that can't have such maps says so before the work."""
        rows = self.rows[:2]
        maps = self._maps(self.reference, name, rows)
        self._measure(self.reference, rows, maps, maps)
        self._regions_of(self.reference, rows)

    def trials(self, names: Sequence[str], answers: Trial) -> list[Trial]:
        """A trial for the regions of each network, then one for each cell, attribution by attribution; after those of
        an attribution that of its sanity and its gallery."""
        found = [
            Trial(self._about_regions(network), partial(self._run_regions, network), label=f"regions, {network.label}")
            for network in self.networks
            if self.regional
        ]
        for name in names:
            cells = {network.label: self._about(network, name) for network in self.networks}
            of_name = [
                Trial(cells[network.label], partial(self._run, network, name), label=f"{name}, {network.label}")
                for network in self.networks
            ]
            keys = {network.label: trial.key for network, trial in zip(self.networks, of_name, strict=True)}
            found += of_name
            if self.sanity:
                about = self._about_sanity(name)
                found.append(Trial(about, partial(self._run_sanity, name), label=f"{name}, randomised"))
            found.append(
                Trial(
                    {"gallery": name, "answers": answers.key, "cells": keys},
                    partial(self._gallery, name),
                    needs=(answers.key, *dict.fromkeys(keys.values())),
                    label=f"{name}, gallery",
                )
            )
        return found

    def rows_of(self, network: Network) -> NDArray[np.int64]:
        """The images of a network's cells: the reference's are all that any network is audited on."""
        return self.rows if network is self.reference else network.rows

    def _about(self, network: Network, name: str) -> dict[str, Any]:
        """All that decides a cell."""
        return {
            "network": network.identity,
            "reference": "itself, rounded" if network is self.reference else self.reference.identity,
            "attribution": [name, channels(name), explainers[name].deciding(self.options.get(name, {}))],
            "measures": {name: registry[name].deciding(self.options.get(name, {})) for name in self.measures},
            "code": self._code(
                name, self.measures, *([ROUNDING] if network is self.reference and self.similar else [])
            ),
            **self._about_images(network),
        }

    def _code(self, name: str, measures: Sequence[str], *more: str) -> dict[str, str]:
        """Hashes of what makes the maps of an attribution, measures them, and what these are laid beside."""
        making = {part: code_of(PARTS[part]) for part in (MAPS, *more)}
        return making | {name: explainers[name].code, **_codes(measures)}

    def _about_images(self, network: Network) -> dict[str, Any]:
        images = {
            "data": self.reference.setting.data.sha256,
            "images": [network.batch.image_id[row] for row in self.rows_of(network)],
            "seed": self.seed,
        }
        return images | ({"masks": places.digest(self.truth)} if self.truth else {})

    def _about_regions(self, network: Network) -> dict[str, Any]:
        asked = {name: registry[name].deciding(self.options.get(name, {})) for name in self.regional}
        code = _codes(self.regional)
        return {"regions": asked, "network": network.identity, "code": code, **self._about_images(network)}

    def _run_regions(self, network: Network, desk: Desk) -> None:
        """What a network loses with regions of the images: a cell without maps."""
        rows = self.rows_of(network)
        found: dict[str, list[Tensor]] = {}
        with progress.task("images", len(rows)) as shown:
            for part in parts(network, rows):
                for column, values in self._regions_of(network, part).items():
                    found.setdefault(column, []).append(values.cpu())
                shown.advance(len(part), note=f"regions, {network.label}")
        columns = {column: torch.cat(values).numpy() for column, values in found.items()}
        desk.save("cell", self._ids(network, rows) | {"silent": np.zeros(len(rows), dtype=bool)} | columns)
        desk.finish(self._facts(self.regional))

    def _regions_of(self, network: Network, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        found = measured(self.regional, self._inputs(network, rows), self._options(self.regional))
        return {column: each.values.double() for column, each in found.items()}

    def _about_sanity(self, name: str) -> dict[str, Any]:
        about = self._about(self.reference, name)
        of = about.pop("attribution")
        measures = {measure: about["measures"][measure] for measure in self.similar}
        code = self._code(name, self.similar, RANDOMISATION)
        return {**about, "reference": "itself, randomised", "sanity": of, "measures": measures, "code": code}

    def _run_sanity(self, name: str, desk: Desk) -> None:
        """How like the reference's maps are those it has when layers are drawn anew, from the logits downward."""
        found: dict[str, Any] = {}
        stages: list[dict[str, Any]] = []
        dense, example = self.reference.loaded.model, self.reference.setting.example
        for n_layers, label, model in perturbed.randomised(dense, example, self.seed):
            other = _with(self.reference, model)
            values: dict[str, list[Tensor]] = {}
            for part in parts(self.reference, self.rows):
                maps = self._of_reference(name)[np.searchsorted(self.rows, part)]
                maps = maps.to(self.reference.setting.device)
                inputs = self._inputs(self.reference, part, self._maps(other, name, part), maps)
                for column, each in measured(self.similar, inputs, self._options(self.similar)).items():
                    values.setdefault(column, []).append(each.values.double().cpu())
            found |= {f"{len(stages)} {column}": torch.cat(each).numpy() for column, each in values.items()}
            stages.append({"layers": n_layers, "down_to": label})
        desk.save("sanity", found)
        desk.finish({"attribution": name, "stages": stages})

    def _ids(self, network: Network, rows: NDArray[np.int64]) -> dict[str, Any]:
        return {"image_ids": np.array([network.batch.image_id[row] for row in rows], dtype=np.str_)}

    def _options(self, measures: Sequence[str]) -> dict[str, Any]:
        return {name: self.options.get(name, {}) for name in measures}

    def _run(self, network: Network, name: str, desk: Desk) -> None:
        with progress.task("images", len(self.rows_of(network))) as shown:
            desk.save("cell", self._cell(network, name, shown))
        desk.finish(self._facts(self.measures))

    def _facts(self, measures: Sequence[str]) -> dict[str, Any]:
        """What a summary has to know of measures, which may be nobody's but the caller's."""
        return {"better": {name: registry[name].facts["better"] for name in measures}, "similarities": self.similar}

    @cached_property
    def _rounded(self) -> Network:
        return _with(self.reference, perturbed.rounded(self.reference.loaded.model, self.seed))

    def _of_reference(self, name: str) -> Tensor:
        """Maps of all rows, (N, H, W) on the CPU: made once for an attribution, for all cells that need them."""
        if name not in self._kept:
            found = [self._maps(self.reference, name, part).cpu() for part in parts(self.reference, self.rows)]
            self._kept = {name: torch.cat(found)}
        return self._kept[name]

    def _maps(self, network: Network, name: str, rows: NDArray[np.int64]) -> Tensor:
        return maps_of(network, network.batch[torch.from_numpy(rows)], name, self.options.get(name, {}))

    def _cell(self, network: Network, name: str, shown: progress.Task) -> dict[str, Any]:
        """The columns of a cell by name."""
        of_reference, rows = self._of_reference(name), self.rows_of(network)
        values: dict[str, list[Tensor]] = {}
        for part in parts(network, rows):
            known = of_reference[np.searchsorted(self.rows, part)].to(network.setting.device)
            maps, beside = known, known
            if network is not self.reference:
                maps = self._maps(network, name, part)
            elif self.similar:
                beside = self._maps(self._rounded, name, part)
            for column, found in self._measure(network, part, maps, beside).items():
                values.setdefault(column, []).append(found.cpu())
            shown.advance(len(part), note=f"{name}, {network.label}")
        return self._ids(network, rows) | {column: torch.cat(parts).numpy() for column, parts in values.items()}

    def _measure(self, network: Network, rows: NDArray[np.int64], maps: Tensor, beside: Tensor) -> dict[str, Tensor]:
        """Columns (B, ...) of a cell: `silent`, one for each measure, and one for each curve of ROAD."""
        inputs = self._inputs(network, rows, maps, beside)
        flat = maps.flatten(1)
        silent = ~flat.isfinite().all(1) | (flat == flat[:, :1]).all(1)
        found = measured(self.measures, inputs, self._options(self.measures))
        values = {column: each.values.double().masked_fill(silent, torch.nan) for column, each in found.items()}
        return {"silent": silent, **self._curves(inputs), **values}

    def _inputs(self, network: Network, rows: NDArray[np.int64], *both: Tensor) -> Inputs:
        """What measures may ask for of some images: with two maps of each those of the network and of the reference."""
        device = network.setting.device
        part = network.batch[torch.from_numpy(rows)].to(device)
        truth = {concept: Maps(mask[rows].to(device), part.image_id) for concept, mask in self.truth.items()}
        maps = {name: Maps(m, part.image_id) for name, m in zip(("maps", "reference_maps"), both, strict=False)}
        generator = torch.Generator().manual_seed(self.seed)
        return Inputs({"model": network.loaded.model, "batch": part, "masks": truth, "generator": generator, **maps})

    def _curves(self, inputs: Inputs) -> dict[str, Tensor]:
        """ROAD's curves, those that aopc is made of where it is measured."""
        name = next((name for name in OF_CURVES if name in self.measures), None)
        if name is None:
            return {}
        curves = inputs.get("removal_curves", self.options.get(name, {}))
        orders = OF_CURVES["road" if "road" in self.measures else name]
        removed = {order: curves.at(order, ORDERS[order]) for order in orders}
        return {f"{order} {outcome}": removed[order].of(outcome) for order in orders for outcome in OUTCOMES}

    def _gallery(self, name: str, desk: Desk) -> None:
        """Some images as they come, one a class, then those whose maps moved most: pixels, and the maps of all."""
        labels, answers = [n.label for n in self.networks], [n.answers for n in self.networks]
        cells = {(name, label): Cell.read(desk.needed(key)) for label, key in desk.trial.about["cells"].items()}
        pairs = moved(answers, cells, [name])
        usual = usual_rows([one.rows for one in answers if one.spoken_of], self.rows, answers[0].target)
        target = answers[0].target
        place = {image_id: row for row, image_id in enumerate(answers[0].image_ids)}
        chosen = [(row, "") for row in usual] + [(place[pair["image_id"]], pair["model"]) for pair in pairs]
        at = np.array([row for row, _ in chosen])
        maps = [self._maps(network, name, at).cpu().numpy() for network in self.networks]
        desk.save("gallery", {"pixels": np.stack([_pixels(self.reference, row) for row in at]), "maps": np.stack(maps)})
        pictures = [
            {
                "title": answers[0].class_names[int(target[row])],
                "wrong": [one.label for one in answers if not one.right[row]],
                "marked": marked,
            }
            for row, marked in chosen
        ]
        desk.finish({"attribution": name, "labels": labels, "pictures": pictures})


def _pixels(network: Network, row: int) -> Array:
    """(H, W, C) of an image in [0, 1], as a network sees it."""
    preprocess = network.loaded.preprocess
    planes = network.batch.x[row].double() * torch.tensor(preprocess.std)[:, None, None].double()
    shown = (planes + torch.tensor(preprocess.mean)[:, None, None].double()).clamp(0, 1)
    return shown.permute(1, 2, 0).numpy()
