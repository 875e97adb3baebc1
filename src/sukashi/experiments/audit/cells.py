"""What an audit measures: networks on the same images, maps by each attribution, every number of every image."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sukashi import models
from sukashi.attributions import attributions as explainers
from sukashi.attributions.maps import Channels, saliency_map
from sukashi.core import files, progress, stats
from sukashi.core.errors import DataError, ModelError, UsageError, writing
from sukashi.core.types import Batch, Maps, Preprocess, pass_size
from sukashi.experiments.audit.page import Picture
from sukashi.experiments.bench import Opening, Setting, Source
from sukashi.measures import accuracy, faithfulness
from sukashi.measures import measures as registry
from sukashi.measures.inputs import Inputs, measured
from sukashi.models import Loaded
from sukashi.network import sites
from sukashi.network.layers import AttentionCore

Array = NDArray[np.float64]

POPULATIONS = {
    "both": "the reference and the model get right",
    "reference": "the reference gets right",
    "all": "there are",
}
# Below so many images nothing is said of a model: with 20 pairs a t test at 5 % finds four times in five a mean of .66
# standard deviations of the differences (Cohen 1988), and smaller ones less often.
FEW = 20
BATCH = 64  # images at once: ROAD at 224 pixels takes less than 2 GB for them
USUAL = 3  # images of a gallery that were not chosen for their maps

# How the channels of an attribution become a map, where that isn't their sum. Suwal et al. 2025 (appendix B) measure
# absolute values of slopes and integrated gradients; relevance (LRP, Chefer) keeps its sign and what it sums to.
CHANNELS: dict[str, Channels] = {
    "saliency": "sum_abs",
    "internal_influence": "sum_abs",
    "integrated_gradients": "sum_abs",
}
# ROAD's curves that are kept, and the measures made of them by what they have.
ORDERS: dict[faithfulness.Order, tuple[int, ...]] = {
    "morf": faithfulness.AOPC_PERCENTAGES["mean"],
    "lerf": faithfulness.PERCENTAGES,
}
OF_CURVES: dict[str, tuple[faithfulness.Order, ...]] = {"aopc": ("morf",), "road": ("morf", "lerf")}
OUTCOMES: tuple[faithfulness.Outcome, ...] = ("accuracy", "probability")
CURVES = tuple(f"{order} {outcome}" for order in ORDERS for outcome in OUTCOMES)
BASICS = ("gini", "road", "aopc", "rank_correlation", "ssim", "top_overlap")
OF_TRANSFORMERS = ("insertion", "deletion")


@dataclass(frozen=True)
class Network:
    """A model of the audit: its column's name, the series and ratio it was pruned in and to (or None), what is right.

    `right` (N,) says which of the test images it gets right, `rows` are those on which it is audited, `trained` whether
    it was trained after it was cut, as its recipe tells.
    """

    label: str
    setting: Setting
    batch: Batch
    right: NDArray[np.bool_]
    rows: NDArray[np.int64]
    series: str | None
    ratio: float | None
    trained: bool

    @property
    def loaded(self) -> Loaded:
        return self.setting.loaded

    @property
    def guesses(self) -> bool:
        """Whether it is not shown to get more test images right than one in as many as there are classes."""
        chance = self.batch.objective.chance(self.loaded.n_classes)
        return bool(stats.share(int(self.right.sum()), len(self.right)).low <= chance)

    @property
    def few(self) -> bool:
        """Whether the images it is audited on are too few to say anything of it."""
        return len(self.rows) < FEW

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides its answers."""
        loaded = self.loaded
        return {
            "spec": loaded.spec,
            "options": dict(loaded.options),
            "preprocess": asdict(loaded.preprocess),
            "weights": models.digest(loaded.model),
        }


@dataclass(frozen=True)
class Cell:
    """What was measured of one network and attribution: for each measure a value of each image (B,), NaN for none.

    Measures of similarity are of its maps and the reference's; in the reference's own cell, of its maps and those that
    it has when `rounded` otherwise.

    `silent` (B,) marks maps that are constant or not finite, `curves` are ROAD's: {"morf accuracy": (B, P)}.
    """

    image_ids: tuple[str, ...]
    silent: NDArray[np.bool_]
    values: dict[str, Array]
    curves: dict[str, Array]


Cells = dict[tuple[str, str], Cell]  # by attribution and label


def opened(specs: Sequence[str], data: str, population: str, reading: Opening) -> list[Network]:
    """The models on the same test images, and on which of them each is audited."""
    own = {name: value for name, value in reading.items() if name in _ARCHITECTURE}
    given = [name for name, value in own.items() if value]
    folders = [Path(spec).is_dir() for spec in specs]
    if given and all(folders):
        raise UsageError(f"saved folders bring their own {given[0]}, and all models are such: leave it out")
    without: Any = {name: value for name, value in reading.items() if name not in own}
    source = Source(specs[0], data, **(without if folders[0] else reading))
    images = source.read()
    split = images.test.limit(source.test_images)
    batches: dict[Preprocess, Batch] = {}
    found: list[Network] = []
    with progress.task("models", len(specs)) as shown:
        for spec, label, folder in zip(specs, labels(specs), folders, strict=True):
            setting = Source(spec, data, **(without if folder else reading)).beside(images)
            preprocess = setting.loaded.preprocess
            size, first = size_of(preprocess), size_of(found[0].loaded.preprocess if found else preprocess)
            if size != first:
                raise UsageError(
                    f"{label} reads images of {size[0]} x {size[1]} pixels and {found[0].label} of {first[0]} x "
                    f"{first[1]}: maps of different sizes can't be compared, audit them apart"
                )
            if preprocess not in batches:
                batches[preprocess] = split.whole(preprocess, source.workers)
            batch = batches[preprocess]
            right = accuracy.evaluate(setting.loaded.model, batch)[0].astype(bool)
            of_reference = found[0].right if found else right
            kept = {"both": of_reference & right, "reference": of_reference, "all": np.ones_like(right)}[population]
            if not kept.any():
                whose = label if found or population != "both" else "any other model"
                raise DataError(
                    f"there is no test image to audit {whose} on, of {len(right)}, that "
                    f"{POPULATIONS[population]}: give more --test-images or another --population"
                )
            level = _level(spec) if folder else (None, None, False)
            found.append(Network(label, setting, batch, right, np.flatnonzero(kept), *level))
            shown.advance(note=label)
    return found


_ARCHITECTURE = ("weights", "width", "n_classes", "pretrained", "output")


def size_of(preprocess: Preprocess) -> tuple[int, int]:
    return preprocess.height, preprocess.width


def labels(specs: Sequence[str]) -> list[str]:
    """A short name for each model: of a folder what its path has and not all have, of a spec what follows its colon.

    A name without a letter, as that of a ratio, gets the folder it lies in.
    """
    paths = {spec: Path(spec).resolve().parts for spec in specs if Path(spec).is_dir()}
    shared = set.intersection(*map(set, paths.values())) if paths else set()
    found: list[str] = []
    for spec in specs:
        parts = [part for part in paths.get(spec, ()) if part not in shared]
        name = "/".join(parts) or (paths[spec][-1] if spec in paths else spec.rpartition(":")[2])
        if spec in paths and not any(map(str.isalpha, name)):
            name = f"{paths[spec][-2]}/{paths[spec][-1]}"
        same = sum(known.partition(" (")[0] == name for known in found)
        found.append(f"{name} ({same + 1})" if same else name)
    return found


def _level(folder: str) -> tuple[str | None, float | None, bool]:
    """By what a saved model was pruned and how far, where its recipe says so; and whether it was trained then."""
    recipe = models.read_recipe(Path(folder) / models.RECIPE)
    told, trained = recipe.provenance, "history" in recipe.figures
    series, ratio = told.get("contender", told.get("criterion")), told.get("ratio_asked", told.get("ratio"))
    if not isinstance(series, str) or not isinstance(ratio, int | float):
        return None, None, trained
    return (f"{series}, seed {told['seed']}" if told.get("seed") else series), float(ratio), trained


def channels(name: str) -> Channels:
    return CHANNELS.get(name, "sum")


def explaining(
    networks: Sequence[Network], asked: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], dict[str, str]]:
    """The attributions that every network takes, and why the others are left out."""
    basics = ["saliency", "integrated_gradients"]
    names = list(asked or ([*basics, "chefer"] if all(map(_attends, networks)) else basics))
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


def measuring(networks: Sequence[Network], asked: Sequence[str] | None) -> list[str]:
    located = networks[0].setting.data.has_ground_truth
    if asked is not None:
        if "localisation" in asked and not located:
            networks[0].setting.data.ground_truth(())  # says why not
        return list(asked)
    names = [*BASICS, *(OF_TRANSFORMERS if all(map(_attends, networks)) else ())]
    return [*names, "localisation"] if located else names


def maps_of(network: Network, batch: Batch, name: str, options: Mapping[str, Any]) -> Tensor:
    """(B, H, W) of what an attribution says of each image's class, on the network's device."""
    pixels = sites.input_site(batch.x)
    device = network.setting.device
    found = explainers[name](
        network.loaded.model, batch.x.to(device), batch.target.to(device), [pixels], batch.objective, **dict(options)
    )[pixels]
    return saliency_map(found, channels(name))


def rounded(network: Network, seed: int) -> Network:
    """The network as other rounding could have left it: every weight w is w (1 + e) or w (1 - e), drawn by `seed`.

    e is the precision of the weights, 2^-23 in float32. By as much numbers move in any layer where sums are taken in
    another order, by another device, batch or kernel. Weights of 0 stay: what was cut stays cut.
    """
    model = copy.deepcopy(network.loaded.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            sign = torch.randn(weight.shape, generator=generator).sign().to(weight)
            weight.mul_(1 + torch.finfo(weight.dtype).eps * sign)
    return replace(network, setting=replace(network.setting, loaded=replace(network.loaded, model=model)))


def parts(network: Network, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows, as many at a time as are explained and measured at once."""
    size = min(BATCH, pass_size(network.batch.x))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# --- cells


class Auditor:
    """Measures maps, network by network and attribution by attribution, or reads what was measured before."""

    def __init__(
        self, networks: Sequence[Network], measures: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> None:
        self.networks, self.measures, self.options, self.seed = networks, measures, options, seed
        self.reference = networks[0]
        self.compares = any("reference_maps" in registry[name].inputs for name in measures)
        # Of all images: which of them are audited may differ from model to model.
        self.rows = np.unique(np.concatenate([network.rows for network in networks]))
        self.truth: dict[str, Tensor] = {}
        if "localisation" in measures:
            ids = self.reference.batch.image_id
            size = size_of(self.reference.loaded.preprocess)
            self.truth = masks(self.reference.setting, ids, size)

    def try_out(self, name: str) -> None:
        """Measure two images, so that a measure that can't have such maps says so before the work."""
        rows = self.rows[:2]
        maps = self._maps(self.reference, name, rows)
        self._measure(self.reference, rows, maps, maps)

    def run(self, names: Sequence[str], folder: Path) -> Cells:
        """Every cell, each kept as soon as it is there."""
        with writing(folder):
            folder.mkdir(exist_ok=True)
        audited = [(n, self.rows if n is self.reference else n.rows) for n in self.networks]
        found: Cells = {}
        with progress.task("images", len(names) * sum(len(rows) for _, rows in audited)) as shown:
            for name in names:
                of_reference: Tensor | None = None
                for network, rows in audited:
                    path = folder / f"{self._key(network, name, rows)}.npz"
                    if path.exists():
                        shown.advance(len(rows), note=f"{name}, {network.label}")
                    else:
                        if of_reference is None:
                            of_reference = self._of_reference(name)
                        files.write(path, self._cell(network, name, rows, of_reference, shown))
                    found[name, network.label] = _cell_of(path)
        return found

    def _key(self, network: Network, name: str, rows: NDArray[np.int64]) -> str:
        """A hash of all that decides a cell."""
        told = {
            "network": network.identity,
            "reference": "itself, rounded" if network is self.reference else self.reference.identity,
            "attribution": [name, channels(name), self.options.get(name, {})],
            "measures": {measure: self.options.get(measure, {}) for measure in self.measures},
            "data": self.reference.setting.data.sha256,
            "images": [network.batch.image_id[row] for row in rows],
            "seed": self.seed,
        }
        return hashlib.sha256(files.canonical(told)).hexdigest()[:16]

    @cached_property
    def _rounded(self) -> Network:
        return rounded(self.reference, self.seed)

    def _of_reference(self, name: str) -> Tensor:
        """Maps of all rows, (N, H, W) on the CPU: made once for an attribution, for all cells that need them."""
        return torch.cat([self._maps(self.reference, name, part).cpu() for part in parts(self.reference, self.rows)])

    def _maps(self, network: Network, name: str, rows: NDArray[np.int64]) -> Tensor:
        return maps_of(network, network.batch[torch.from_numpy(rows)], name, self.options.get(name, {}))

    def _cell(
        self, network: Network, name: str, rows: NDArray[np.int64], of_reference: Tensor, shown: progress.Task
    ) -> bytes:
        values: dict[str, list[Tensor]] = {}
        for part in parts(network, rows):
            known = of_reference[np.searchsorted(self.rows, part)].to(network.setting.device)
            maps, beside = known, known
            if network is not self.reference:
                maps = self._maps(network, name, part)
            elif self.compares:
                beside = self._maps(self._rounded, name, part)
            for column, found in self._measure(network, part, maps, beside).items():
                values.setdefault(column, []).append(found.cpu())
            shown.advance(len(part), note=f"{name}, {network.label}")
        ids = np.array([network.batch.image_id[row] for row in rows], dtype=np.str_)
        return files.packed(image_ids=ids, **{column: torch.cat(parts).numpy() for column, parts in values.items()})

    def _measure(self, network: Network, rows: NDArray[np.int64], maps: Tensor, beside: Tensor) -> dict[str, Tensor]:
        """Columns (B, ...) of a cell: `silent`, one for each measure, and one for each curve of ROAD."""
        part = network.batch[torch.from_numpy(rows)].to(maps.device)
        truth = {concept: Maps(mask[rows].to(maps.device), part.image_id) for concept, mask in self.truth.items()}
        inputs = Inputs(
            {
                "model": network.loaded.model,
                "batch": part,
                "maps": Maps(maps, part.image_id),
                "reference_maps": Maps(beside, part.image_id),
                "masks": truth,
                "generator": torch.Generator().manual_seed(self.seed),
            }
        )
        flat = maps.flatten(1)
        silent = ~flat.isfinite().all(1) | (flat == flat[:, :1]).all(1)
        found = measured(self.measures, inputs, {name: self.options.get(name, {}) for name in self.measures})
        values = {column: each.values.double().masked_fill(silent, torch.nan) for column, each in found.items()}
        return {"silent": silent, **self._curves(inputs), **values}

    def _curves(self, inputs: Inputs) -> dict[str, Tensor]:
        """ROAD's curves, those that aopc is made of where it is measured."""
        name = next((name for name in OF_CURVES if name in self.measures), None)
        if name is None:
            return {}
        curves = inputs.get("removal_curves", self.options.get(name, {}))
        orders = OF_CURVES["road" if "road" in self.measures else name]
        removed = {order: curves.at(order, ORDERS[order]) for order in orders}
        return {f"{order} {outcome}": removed[order].of(outcome) for order in orders for outcome in OUTCOMES}

    def gallery(self, names: Sequence[str], moved: Sequence[Mapping[str, Any]]) -> dict[str, list[Picture]]:
        """For each attribution some images as they come, one a class, then those whose maps moved most."""
        seen = set.intersection(*(set(n.rows.tolist()) for n in self.networks)) or set(self.rows.tolist())
        target = self.reference.batch.target
        first = {int(target[row]): row for row in sorted(seen, reverse=True)}
        usual = [row for _, row in sorted(first.items())][:USUAL]
        place = {image_id: row for row, image_id in enumerate(self.reference.batch.image_id)}
        found = {}
        for name in names:
            pairs = [(place[pair["image_id"]], pair["model"]) for pair in moved if pair["attribution"] == name]
            rows = [(row, "") for row in usual] + pairs
            at = np.array([row for row, _ in rows])
            maps = {n.label: self._maps(n, name, at).cpu().numpy() for n in self.networks}
            found[name] = [
                Picture(
                    pixels=_pixels(self.reference, row),
                    title=self.reference.setting.data.class_names[int(target[row])],
                    maps={label: of_all[i] for label, of_all in maps.items()},
                    wrong=tuple(n.label for n in self.networks if not n.right[row]),
                    marked=marked,
                )
                for i, (row, marked) in enumerate(rows)
            ]
        return found


def masks(setting: Setting, image_ids: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
    """Where the evidence is, (B, H, W) bool for each concept, at the size the models see."""
    return {
        concept: F.interpolate(mask[:, None].float(), size, mode="nearest-exact")[:, 0].bool()
        for concept, mask in setting.data.ground_truth(image_ids).items()
    }


def _pixels(network: Network, row: int) -> Array:
    """(H, W, C) of an image in [0, 1], as a network sees it."""
    preprocess = network.loaded.preprocess
    planes = network.batch.x[row].double() * torch.tensor(preprocess.std)[:, None, None].double()
    shown = (planes + torch.tensor(preprocess.mean)[:, None, None].double()).clamp(0, 1)
    return shown.permute(1, 2, 0).numpy()


def _cell_of(path: Path) -> Cell:
    with files.unpacked(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    ids, silent = tuple(kept.pop("image_ids").tolist()), kept.pop("silent")
    curves = {name: kept.pop(name) for name in list(kept) if name in CURVES}
    return Cell(ids, silent, kept, curves)


_TEXT, _NUMBER = pa.string(), pa.float64()
_VALUES = pa.schema({"model": _TEXT, "attribution": _TEXT, "measure": _TEXT, "image_id": _TEXT, "value": _NUMBER})
_CURVES = pa.schema(
    {"model": _TEXT, "attribution": _TEXT, "order": _TEXT, "percentage": _NUMBER, "image_id": _TEXT}
    | {"correct": _NUMBER, "probability": _NUMBER}
)


def values_table(cells: Cells) -> bytes:
    """values.parquet: a row for each image and measure of a cell."""
    parts = [
        pa.table([*_repeated(label, name, measure, n=len(values)), cell.image_ids, values], schema=_VALUES)
        for (name, label), cell in cells.items()
        for measure, values in cell.values.items()
    ]
    return _parquet(parts, _VALUES)


def curves_table(cells: Cells) -> bytes:
    """curves.parquet: a row for each image and percentage of a curve."""
    parts = []
    for (name, label), cell in cells.items():
        for order, percentages in ORDERS.items():
            if f"{order} accuracy" in cell.curves:
                n = len(cell.image_ids) * len(percentages)
                columns = _repeated(label, name, order, n=n)
                columns.append(np.tile(np.array(percentages, dtype=np.float64), len(cell.image_ids)))
                columns.append(np.repeat(cell.image_ids, len(percentages)).tolist())
                columns += [cell.curves[f"{order} {outcome}"].ravel() for outcome in OUTCOMES]
                parts.append(pa.table(columns, schema=_CURVES))
    return _parquet(parts, _CURVES)


def _repeated(*texts: str, n: int) -> list[Any]:
    return [pa.array([text] * n, pa.string()) for text in texts]


def _parquet(parts: Sequence[Any], schema: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.concat_tables([schema.empty_table(), *parts]), content)
    return content.getvalue()
