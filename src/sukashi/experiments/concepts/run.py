"""Subspaces of a layer found in training images, and what each responds to in the test images: one trial."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sukashi.attributions import attributions
from sukashi.core import progress
from sukashi.core.code import code_of
from sukashi.core.errors import DataError, ModelError, UsageError, nearest
from sukashi.core.experiment import Prepared, Trial
from sukashi.core.objective import Objective
from sukashi.core.types import Batch, Site
from sukashi.data import Split
from sukashi.decompositions.contrast import contrast, highest
from sukashi.decompositions.drsa import dimensions, drsa
from sukashi.decompositions.maps import relevance_maps
from sukashi.decompositions.subspaces import Subspaces, units
from sukashi.decompositions.vectors import features, shape_of, vectors
from sukashi.experiments.bench import Bench, Source, hardware
from sukashi.experiments.concepts.settings import Concepts, numbered
from sukashi.experiments.concepts.summary import opened
from sukashi.experiments.workspace import Desk, Workspace
from sukashi.measures import accuracy
from sukashi.measures.imputation import impute
from sukashi.network import hooks

Array = NDArray[Any]
SUBSPACES, DIMENSIONS, POSITIONS, TRIALS, IMPUTED = 4, 2, 20, 3, 0.1  # where settings leave them open
METHODS: dict[str, Callable[..., Any]] = {"drsa": drsa, "contrast": contrast, "units": units}
SHOWN = 6  # images of each subspace
MOST_READ = 20  # times the images that are wanted, whose masks are read to find those that show a concept
LARGEST = 160  # side of an image that is kept to be shown
MOST_BEFORE = 5  # tokens before those of the image: a class token and DINOv2's four registers


def prepare(settings: Concepts) -> Prepared:
    """Raises UsageError for a class or concept that there is not and subspaces that do not fit the layer's features,
    ModelError for a layer that there is not or a network without rules, DataError for too few images.
    """
    bench = Source.of(settings, calibration=1).open(units=False)
    number = _class(bench, settings.of)
    site = features(bench.loaded.model, settings.layer, bench.example)
    n, d = _blocks(settings, site)
    # What has no rule, and what can't be laid over an image, is refused before work starts.
    one = bench.data.train.subset([0]).whole(bench.loaded.preprocess, 0).to(bench.device)
    eye = torch.eye(site.n_units)
    plain = Subspaces(site.layer, site.axis, eye, eye, n, d, eye[0])
    _relevance(bench, replace(one, objective=_objective(bench, settings)), site, plain, number, settings)
    training, missing = _training(bench, settings, number)
    shape = shape_of(bench.loaded.model, site, one.x)
    n_vectors = len(training) * min(math.prod(shape[2:]), settings.positions or POSITIONS)
    if settings.method == "drsa" and n_vectors < site.n_units:
        raise DataError(
            f"{len(training)} training images of class {settings.of!r} give {n_vectors} vectors for the {site.n_units} "
            "features: give more `images` or `positions`, or an earlier layer"
        )
    part = _part(bench, settings)
    masks = _masks(bench, settings)
    known = {f"test/{name}": mask for name, mask in masks.items()}
    if missing is not None:
        known["training"] = missing
    about: dict[str, Any] = {}
    if known:
        about["masks"] = {name: hashlib.sha256(mask.numpy().tobytes()).hexdigest() for name, mask in known.items()}
    if part is not None:
        about["where"] = {**part.subspaces.identity, "number": part.number}
    parts: dict[str, Callable[..., Any]] = {settings.method: METHODS[settings.method], "vectors": vectors}
    parts["maps"] = relevance_maps
    if settings.method == "contrast":
        parts["impute"] = impute
    code = {name: code_of(of) for name, of in parts.items()} | {"lrp": attributions["lrp"].code}
    about = bench.identity(settings, code=code, **about)
    work = partial(_find, _Asked(bench, settings, number, site, training, missing, part, masks))
    trial = Trial(about, work, place=".", label=settings.layer)
    return Prepared(about, [trial], log={"hardware": hardware(bench.device)})


@dataclass(frozen=True)
class _Part:
    """A subspace that was found before: what images show where it is most relevant is contrasted."""

    subspaces: Subspaces
    number: int


@dataclass(frozen=True)
class _Asked:
    """What is taken apart, by which training images, and what test images are held against.

    `number` is that of the class, `missing` (B, H, W) where training images show the concept, and `masks` are of the
    test images.
    """

    bench: Bench
    settings: Concepts
    number: int
    site: Site
    training: Split
    missing: Tensor | None
    part: _Part | None
    masks: dict[str, Tensor]


def _part(bench: Bench, settings: Concepts) -> _Part | None:
    """Raises UsageError for a folder that holds no subspaces of this network or found them for another class, one that
    there is not, and so small a share of the pixels that none is imputed."""
    if settings.where is None:
        return None
    folder, numbers = numbered("where", settings.where)
    found = opened(folder, bench.about_model)
    theirs = Workspace(folder).identity["of"]
    if theirs != settings.of:
        raise UsageError(
            f"the subspaces in {folder} are of class {theirs!r}, not {settings.of!r}: give `of={theirs!r}`"
        )
    share, (height, width) = settings.imputed or IMPUTED, bench.example.shape[2:]
    if not 1 <= round(share * height * width) < height * width:
        raise UsageError(f"`imputed` must be at least one of {height} x {width} pixels and not all, got {share}")
    if len(numbers) > 1 or numbers[0] >= found.n_subspaces:
        raise UsageError(
            f"`where` is one of subspaces 0 to {found.n_subspaces - 1} in {folder}, got {', '.join(map(str, numbers))}"
        )
    return _Part(found, numbers[0])


def _blocks(settings: Concepts, site: Site) -> tuple[int, int]:
    """How many subspaces there are, and of how many dimensions each."""
    if settings.method == "contrast":
        d = settings.dimensions or DIMENSIONS
        if d >= site.n_units:
            raise UsageError(f"`dimensions` must be below the {site.n_units} features of {settings.layer!r}, got {d}")
        return 1, d
    if settings.method == "units":
        chosen = settings.units or range(settings.subspaces or SUBSPACES)
        if max(chosen) >= site.n_units:
            raise UsageError(f"layer {settings.layer!r} has features 0 to {site.n_units - 1}, got {max(chosen)}")
        return len(chosen), 1
    n = settings.subspaces or SUBSPACES
    return n, dimensions(site.n_units, n)


def _objective(bench: Bench, settings: Concepts) -> Objective:
    return replace(bench.data.test.objective, explains=settings.explains)


def _class(bench: Bench, name: str) -> int:
    names = bench.data.class_names
    if name not in names:
        raise UsageError(f"the data has no class {name!r}{nearest(name, names)}")
    return names.index(name)


def _training(bench: Bench, settings: Concepts, number: int) -> tuple[Split, Tensor | None]:
    """The training images that subspaces are found in, drawn by their ids: those of the class, or of a contrast by
    masks those that show the concept, and where (B, H, W).
    """
    train = bench.data.train
    rank = train.rank_in_class("concepts", settings.seed)
    if settings.concept is None:
        found, missing = train.subset((train.targets.numpy() == number) & (rank < settings.images)), None
        what = f"of class {settings.of!r}"
    else:
        # By rank within a class and then by class: every class has its turn before one has two.
        some = train.subset(np.lexsort((train.targets.numpy(), rank))[: MOST_READ * settings.images])
        everywhere = _shown(bench, settings, some)
        shown = everywhere.flatten(1)
        rows = (shown.any(1) & ~shown.all(1)).nonzero()[: settings.images, 0]
        found, missing = some.subset(rows), everywhere[rows]
        what = f"that show {settings.concept!r}"
    if len(found) < 2:
        raise DataError(f"there are {len(found)} training images {what}: two at least are needed")
    return found, missing


def _shown(bench: Bench, settings: Concepts, split: Split) -> Tensor:
    """(B, H, W) bool, where the concept is in some images. Raises UsageError for one that no mask is of."""
    masks = bench.data.ground_truth(split.image_ids, bench.loaded.preprocess)
    concept = settings.concept or ""
    if concept not in masks:
        raise UsageError(f"no masks show a concept {concept!r}{nearest(concept, masks)}: there are {', '.join(masks)}")
    return masks[concept]


def _masks(bench: Bench, settings: Concepts) -> dict[str, Tensor]:
    """Where what has masks is in the test images, (B, H, W), of what at least two show and two do not."""
    if not bench.data.has_ground_truth:
        return {}
    test = bench.data.test.limit(settings.test_images)
    masks = bench.data.ground_truth(test.image_ids, bench.loaded.preprocess)
    shows = {name: int(mask.flatten(1).any(1).sum()) for name, mask in masks.items()}
    found = {name: mask for name, mask in masks.items() if 2 <= shows[name] <= len(test) - 2}
    if settings.masks and not found:
        raise DataError(
            "no mask is of some test images and not of others, so that nothing can be told by it: masks must have the "
            "images' names, and be empty or missing where there is nothing"
        )
    return found


def _find(asked: _Asked, desk: Desk) -> None:
    bench, settings, number, site = asked.bench, asked.settings, asked.number, asked.site
    model, objective = bench.loaded.model, _objective(bench, settings)
    images = replace(_read(bench, asked.training), objective=objective)
    n, d = _blocks(settings, site)
    history: list[list[float]] = []
    shown: list[int] | None = None
    if settings.method == "contrast":
        missing = asked.missing if asked.part is None else _most_relevant(asked, asked.part, images)
        assert missing is not None
        some = missing.flatten(1).any(1)
        if some.sum() < 2:
            raise DataError(f"subspace {settings.where} is relevant for {settings.of!r} in {int(some.sum())} images")
        images, missing = images[some.nonzero()[:, 0]], missing[some]
        subspaces = contrast(model, images.x, impute(images.x, missing.to(bench.device)), site, d)
    else:
        generator = torch.Generator().manual_seed(settings.seed)
        n_positions = settings.positions or POSITIONS
        a, c = vectors(model, images, site, positions=n_positions, generator=generator, rule=settings.rule)
        if settings.method == "units":
            shown = settings.units or (a * c).double().sum(0).argsort(descending=True, stable=True)[:n].tolist()
            basis = units(site.n_units, shown)
        else:
            found = drsa(a, c, n, generator=generator, trials=settings.trials or TRIALS)
            basis, history = found.basis, found.history
        subspaces = Subspaces(site.layer, site.axis, basis, basis, n, d, torch.zeros(site.n_units))
    if settings.concept is None:
        # What images of one class have in common is no neutral thing to put in place of a subspace.
        everything = _read(bench, bench.data.train.limit(max(settings.images, bench.data.n_classes)))
        mean = hooks.means(model, [site], (part.x for part in everything.in_passes()))[site].mean(1)
        subspaces = replace(subspaces, mean=mean)
    desk.save("subspaces", {name: getattr(subspaces, name).numpy() for name in ("basis", "dual", "mean")})
    test = bench.test().to(bench.device)
    relevance, maps = _relevance(bench, replace(test, objective=objective), site, subspaces, number, settings)
    own = test.target.cpu().numpy() == number
    looked = {
        "relevance": relevance,
        "own": own,
        **{f"shows/{name}": mask.flatten(1).any(1).numpy() for name, mask in asked.masks.items()},
    }
    desk.save("looked", looked)
    correct, _ = accuracy.evaluate(model, test)
    pictures, kept = _pictures(bench, test, relevance, maps)
    desk.save("gallery", kept)
    desk.finish(
        {
            "axis": site.axis,
            "n_dimensions": d,
            "n_images": len(images),
            "n_subspaces": n,
            "units": shown,
            "changed": subspaces.facts.get("share"),
            "n_test": len(test),
            "n_own": int(own.sum()),
            "accuracy": float(correct.mean()),
            "history": history,
            "image_ids": list(test.image_id),
            "pictures": pictures,
            "warnings": [*bench.data.warnings, *bench.doubts(correct, test)],
            "notes": list(bench.data.notes),
        }
    )


def _most_relevant(asked: _Asked, part: _Part, images: Batch) -> Tensor:
    """(B, H, W) where a subspace is most relevant in images, as large as they are; nowhere where it speaks against the
    class, or is silent."""
    site = features(asked.bench.loaded.model, part.subspaces.layer, asked.bench.example)
    _, maps = _relevance(asked.bench, images, site, part.subspaces, asked.number, asked.settings)
    of_part = torch.from_numpy(maps[:, 1 + part.number]).unsqueeze(1)
    large = F.interpolate(of_part, images.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return highest(large, asked.settings.imputed or IMPUTED) & (large > 0)


def _read(bench: Bench, split: Split) -> Batch:
    return split.whole(bench.loaded.preprocess, bench.source.workers).to(bench.device)


def _relevance(
    bench: Bench, test: Batch, layer: Site, subspaces: Subspaces, number: int, settings: Concepts
) -> tuple[Array, Array]:
    """(B, 1 + K) the relevance of the layer and of each subspace for the class in each image, and (B, 1 + K, h, w)
    where it lies."""
    sums, maps = [], []
    with progress.task("relevance", len(test)) as shown:
        for batch in test.in_passes():
            x, target = batch.x, torch.full_like(batch.target, number)
            where = relevance_maps(bench.loaded.model, x, target, layer, subspaces, test.objective, rule=settings.rule)
            sums.append(where.flatten(2).double().sum(2).cpu())
            maps.append((where if where.dim() == 4 else _over_image(where, x)).cpu())
            shown.advance(len(x))
    return torch.cat(sums).numpy(), torch.cat(maps).numpy()


def _over_image(values: Tensor, x: Tensor) -> Tensor:
    """(B, K, h, w) of tokens (B, K, P), a grid as the images' (B, C, H, W) sides are to each other; those before it,
    such as a class token, are left out.

    Raises ModelError where no grid has so many positions.
    """
    n, (height, width) = values.shape[2], x.shape[2:]
    for n_before in range(min(n, MOST_BEFORE + 1)):
        h = round(math.sqrt((n - n_before) * height / width))
        if h and (n - n_before) % h == 0 and h * width == (n - n_before) // h * height:
            grid: Tensor = values[:, :, n_before:].unflatten(2, (h, -1))
            return grid
    raise ModelError(
        f"{n} positions are no grid over images of {height} x {width}, so that what is relevant can't be shown: give a "
        "layer whose positions are places of the image"
    )


def _pictures(
    bench: Bench, test: Batch, relevance: Array, maps: Array
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """The images that are shown of each subspace, those of its largest relevance first, and their pixels and maps."""
    names, told, rows = bench.data.class_names, [], []
    for k in range(relevance.shape[1] - 1):
        for row in np.argsort(-relevance[:, 1 + k], kind="stable")[:SHOWN].tolist():
            told.append({"subspace": k, "image_id": test.image_id[row], "class": names[int(test.target[row])]})
            rows.append(row)
    pixels = bench.data.test.limit(len(test)).shown(bench.loaded.preprocess, rows)
    step = max(1, -(-max(pixels.shape[1:3]) // LARGEST))
    return told, {"pixels": pixels[:, ::step, ::step], "maps": maps[rows].astype(np.float32)}
