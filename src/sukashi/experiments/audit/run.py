"""Audits: do networks, side by side on the same images, still decide for the reasons of the first of them?

    audit.json       what is asked of which reference: another audit is refused, models and attributions may be added
    cells/KEY.npz    one network and one attribution: every value of every image, named by a hash of what decides them
    values.parquet   model, attribution, measure, image_id, value; similarities of the reference are what noise leaves
    curves.parquet   model, attribution, order, percentage, image_id, correct, probability: ROAD's curves
    results.json  report.html  figures/

An audit that was interrupted goes on from the cells it has. Every number is that of an image; means, intervals and
tests are made of them in the end, pair by pair.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from sukashi.attributions import attributions as explainers
from sukashi.core import files
from sukashi.core.errors import UsageError
from sukashi.core.registry import nearest
from sukashi.experiments.audit import page, summary
from sukashi.experiments.audit.cells import (
    FEW,
    ORDERS,
    POPULATIONS,
    Auditor,
    Network,
    channels,
    curves_table,
    explaining,
    measuring,
    opened,
    values_table,
)
from sukashi.experiments.bench import Opening, hardware, versions
from sukashi.measures import measures as registry

LEVELS = ("saliency",)
TEST_IMAGES = 500


def audit(
    models: Sequence[str],
    data: str,
    *,
    out: str | Path,
    levels: Sequence[str] = LEVELS,
    attributions: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    population: str = "both",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    command: str | None = None,
    **reading: Unpack[Opening],
) -> dict[str, Any]:
    """What cuts did to the reasons of a network: saliency maps of the first model beside those of the others.

    `models` are specs (which share `weights`, `width` and so on) or saved folders, the reference first. A map is an
    attribution of the image's class at the pixels; an attribution that refuses a model is left out for all, with the
    reason. By default `attributions` are saliency and integrated_gradients, for transformers chefer too; `measures` are
    gini, road, aopc, rank_correlation, ssim and top_overlap, for transformers insertion and deletion too, and
    localisation where the data know where the evidence is (`sukashi list measures` tells what each computes).
    `options` are those of attributions and measures by name. ROAD's curves, in the table and on the page, are at 10,
    20, ... percent whatever the options, with the noise and tolerance of aopc, or of road where there is no aopc.

    Images are `test_images` (500) of the test split, evenly over the classes, and of those the ones that the reference
    and the model both get right (`population`: "both", "reference" or "all"). Each model sees them by its own
    preprocessing, at the same size. `seed` draws ROAD's noise, the rounding below and the bootstrap. How models and
    data are read is as in `sukashi.train`: weights, width, only, device, workers and so on.

    Differences are paired by image: the model's value minus the reference's, their mean with a bootstrap interval, a
    paired t test, and Holm's correction over all comparisons. Maps that are constant or not finite are counted and left
    out. Maps have a floor of noise: similarities of the reference are those of its maps and the maps it has with every
    weight moved by the precision of float32. A model not shown to get more images right than guessing would is told
    by name, and left out of the verdict and the lines.

    Returns a dictionary:
        reference, attributions, measures, n_images, refused ({attribution: reason}), notes, out, report
        models        of each: label, series, ratio, accuracy, guesses, n_images, silent, means
        comparisons   a row for each model, attribution and measure: n, reference and mean (means over images),
                      difference, low, high, p, p_holm, size (in standard deviations over images), weight (that in a
                      word), changed, said (in words)
        similarities  how like the reference's maps are: model, attribution, measure, n, mean, low, high
        pointing      where the data know of concepts: model, attribution, concept, n, mean, low, high, area
        moved         the pairs of maps that changed most: attribution, model, image_id, target, measure, value
        verdict, lines   the sentences the page begins with; they speak of `measures` alone, which leaves out those in
                         probability, and not of models that guess or have too few images (`audited.FEW`)


    Raises UsageError for unknown names and keywords, models of different input sizes and a folder of another audit,
    DataError where there is no image to compare on, ModelError where every attribution refuses.
    """
    asked = dict(options or {})
    _check(models, levels, attributions, measures, population, asked, reading)
    reading.setdefault("test_images", TEST_IMAGES)
    networks = opened(models, data, population, reading)
    reference = networks[0]
    names, refused = explaining(networks, attributions, asked)
    measured = measuring(networks, measures)
    for name in asked:
        if name not in (*names, *refused, *measured):
            raise UsageError(f"options were given for {name!r}, which is not part of this audit: leave them out")
    auditor = Auditor(networks, measured, asked, seed)
    auditor.try_out(names[0])
    about = {
        "data": reference.setting.about_data,
        "population": population,
        "measures": measured,
        "options": {name: asked[name] for name in measured if name in asked},
        "seed": seed,
        "reference": reference.identity,
    }
    folder = Path(out)
    files.claim(folder / "audit.json", about)
    with files.lock(folder):
        cells = auditor.run(names, folder / "cells")
        files.write(folder / "values.parquet", values_table(cells))
        files.write(folder / "curves.parquet", curves_table(cells))
        result = summary.summary(networks, cells, names, seed)
        shown = auditor.gallery(names, result["moved"])
        result |= {
            "refused": refused,
            "notes": [*dict.fromkeys(note for n in networks for note in n.setting.data.notes), *_trained(networks)],
            "out": str(folder),
        }
        settings = {
            **about,
            "attributions": {name: {"channels": channels(name), **asked.get(name, {})} for name in names},
            "models": {network.label: network.identity for network in networks},
            "versions": versions(),
            "hardware": hardware(reference.setting.device),
        }
        result["report"] = str(
            page.write(
                folder,
                result,
                {(name, label): cell.curves for (name, label), cell in cells.items()},
                shown,
                percentages=ORDERS["morf"],
                population=POPULATIONS[population],
                least=FEW,
                command=command or "sukashi.audit(...)",
                settings=settings,
            )
        )
        files.write(folder / "results.json", files.canonical(result, indent=1) + b"\n")
    return result


def _trained(networks: Sequence[Network]) -> list[str]:
    """That trainings differ by more than images do, where a model was trained after its cut."""
    trained = [network.label for network in networks[1:] if network.trained]
    if not trained:
        return []
    return [
        f"trained after the cut: {', '.join(trained)}; intervals are for new images, and another training can say the "
        "opposite: audit several seeds before a change is laid to the cut"
    ]


def _check(
    models: Sequence[str],
    levels: Sequence[str],
    attributions: Sequence[str] | None,
    measures: Sequence[str] | None,
    population: str,
    options: Mapping[str, Mapping[str, Any]],
    reading: Mapping[str, Any],
) -> None:
    """Refuse what means nothing, before anything is loaded."""
    for name in reading:
        if name not in Opening.__annotations__:
            known = [*inspect.getfullargspec(audit).kwonlyargs, *Opening.__annotations__]
            raise UsageError(f"unknown setting {name!r}{nearest(name, known)}")
    lists = {"models": models, "levels": levels, "attributions": attributions, "measures": measures}
    for what, given in lists.items():
        if isinstance(given, str):
            like = "the reference first, then those to hold against it" if what == "models" else repr(given.split(","))
            raise UsageError(f"{what} must be a list, got the string {given!r}: give a list, {like}")
    if len(models) < 2:
        raise UsageError(f"an audit needs a reference and a model to hold against it, got {len(models)}: give more")
    for level in levels:
        if level not in LEVELS:
            raise UsageError(f"unknown level {level!r}{nearest(level, LEVELS)}")
    if population not in POPULATIONS:
        raise UsageError(f"unknown population {population!r}{nearest(population, POPULATIONS)}")
    for what, given in lists.items():
        if what != "models" and given is not None and (not given or len(set(given)) != len(given)):
            raise UsageError(f"{what} must be different names, at least one, got {list(given)}")
    for name in attributions or ():
        explainers[name]
    for name in measures or ():
        if "maps" not in registry[name].inputs:
            known = [method.name for method in registry if "maps" in method.inputs]
            raise UsageError(f"{name} measures no saliency maps: choose from {', '.join(known)}")
    for name, chosen in options.items():
        (explainers if name in explainers else registry)[name].check_options(chosen)
