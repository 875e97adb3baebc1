"""What an audit is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from sukashi.core.schema import MAX_SEED, option
from sukashi.experiments.reading import OPTIONS, Masked, Opening


class Audit(Masked, Opening):
    """Compare saliency maps, concepts or units: do cut networks decide as the reference does, for the same reasons?"""

    kind: ClassVar[str] = "audit"
    shared: ClassVar[bool] = True
    grows: ClassVar[frozenset[str]] = frozenset({"models", "attributions"})

    models: list[str] = option(
        argument=True,
        named=True,
        help="Specs, which share `weights`, saved folders, or SPEC=FOLDER and SPEC=FILE, each with weights of its own. "
        "The first is the reference.",
    )
    out: str = option(path=True, decides=False, help="Folder for results; an interrupted audit is resumed.")
    subjects: list[str] = option(
        ["saliency"], joined=True, help="What to look at: saliency, concepts, neurons, sae, circuits, or several."
    )
    attributions: list[str] | None = option(
        None,
        joined=True,
        default="saliency,integrated_gradients; for transformers chefer too",
        help="Names, see `sukashi list attributions`, or package.module:function of your own.",
    )
    measures: list[str] | None = option(
        None,
        joined=True,
        default="gini,road,aopc,rank_correlation,ssim,top_overlap; for transformers insertion,deletion too, with "
        "masks localisation,region_drop too",
        help="Names, see `sukashi list measures`, or package.module:function of your own.",
    )
    population: str = option(
        "both", help="Images looked at: both (reference and model get them right), reference (it does) or all."
    )
    test_images: int = option(500, help="Test images at most, evenly over the classes.")
    sanity: bool = option(
        False,
        help="Ask of each attribution whether its maps depend on what the network learned: lay those of the reference "
        "beside those it has when its layers are drawn anew, from the logits downward.",
    )
    layer: str | None = option(None, help="Of concepts and sae: the layer that holds them, as layer4, of all models.")
    of: str | None = option(None, help="Of concepts: the class whose images are cropped, by name.")
    concepts: int | None = option(None, ge=2, le=256, default="10", help="Of concepts: how many.")
    crop: float | None = option(
        None, gt=0, le=1, default="0.3", help="Of concepts: the side of a crop, as a share of the image's shorter side."
    )
    layers: list[str] | None = option(
        None,
        joined=True,
        default="three, early to late: of transformers what the second layers of MLPs read, else ends of blocks",
        help="Of neurons: the layers whose units are looked at, as blocks.5.mlp.act, of all models; of attention, as "
        "blocks.5.attn.core, its heads.",
    )
    top: int | None = option(
        None,
        ge=1,
        default="50, and no more than a quarter of a layer's",
        help="Of neurons and sae: how many units of each layer, or latents, are looked at for each class, those that "
        "matter most.",
    )
    tokens: Literal["class", "patch", "all"] | None = option(
        None,
        default="class where there is a class token, else all",
        help="Of sae: the tokens that an autoencoder is trained on: class, patch or all; of maps all positions.",
    )
    k: list[int] | None = option(
        None,
        joined=True,
        default="a sixth of the layer's features",
        help="Of sae: how many latents are active for a row on average; of several the first is looked into, and of "
        "the others is said how well they give back what the layer writes.",
    )
    expansion: int | None = option(
        None, ge=1, le=256, default="32", help="Of sae: how many times as many latents as the layer has features."
    )
    penalties: list[float] | None = option(
        None,
        joined=True,
        default="0.75,1.5,3,6",
        help="Of circuits: what all nodes together cost, in nats of the cross entropy that a circuit is found by; of "
        "several, of each network that whose circuits are best (accuracy times the share of edges left out) on "
        "validation images.",
    )
    epochs: int | None = option(None, ge=1, le=10_000, default="20", help="Of circuits: how long they are looked for.")
    seeds: int = option(1, ge=1, le=100, help="Of sae and circuits: number of trainings, by seeds counted from 0.")
    seed: int = option(
        0, ge=0, le=MAX_SEED, help="Draws ROAD's noise, the rounding, the bootstrap and training images."
    )
    options: dict[str, dict[str, Any]] = option({}, help=OPTIONS)
