"""A network that learned a watermark instead of shapes points at the watermark, and the measures say so."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cases import fitted
from sukashi import data
from sukashi.attributions import attributions
from sukashi.attributions.maps import saliency_map
from sukashi.core import stats
from sukashi.core.types import Maps, Preprocess
from sukashi.measures.inputs import measured
from sukashi.network import sites

PREPROCESS = Preprocess(32, 32, 3, (0.3,) * 3, (0.3,) * 3)
N = 60


def trained(spec):
    """A small CNN after some epochs on generated shapes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = data.load(spec).train.whole(PREPROCESS, 0)
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 6)]
        return fitted(nn.Sequential(*layers), images, epochs=12, size=32, rate=1e-2)


@pytest.fixture(scope="module")
def scene():
    """Both networks, and the marked test circles that both get right, with the concepts' masks."""
    marked, clean = trained(f"shapes:watermark=1,n={N}"), trained(f"shapes:n={N}")
    found = data.load(f"shapes:watermark=1,n={N}")
    images = found.test.whole(PREPROCESS, 0)
    with torch.no_grad():
        right = [model(images.x).argmax(1) == images.target for model in (marked, clean)]
    images = images[(images.target == 0) & right[0] & right[1]]
    return SimpleNamespace(
        marked=marked, clean=clean, images=images, truth=found.ground_truth(images.image_id, PREPROCESS)
    )


def maps(model, scene, name):
    x = scene.images.x
    pixels = sites.input_site(x)
    found = attributions[name](model, x, scene.images.target, [pixels])[pixels]
    return Maps(saliency_map(found, "sum"), scene.images.image_id)


def mean_difference(a, b):
    return stats.bootstrap((a - b).numpy(), generator=np.random.default_rng(0))


@pytest.mark.parametrize("name", ["saliency", "integrated_gradients", "lrp", "deeplift"])
def test_only_the_network_with_the_shortcut_points_at_the_watermark(scene, name):
    assert len(scene.images) >= 8
    marked, clean = (maps(model, scene, name) for model in (scene.marked, scene.clean))
    masks = {concept: Maps(mask, scene.images.image_id) for concept, mask in scene.truth.items()}
    found = [measured(["localisation"], {"maps": m, "masks": masks}) for m in (marked, clean)]
    at_mark = [each["localisation/watermark"].values for each in found]
    assert mean_difference(*at_mark).low > 0.1
    assert at_mark[0].mean() > 4 * at_mark[1].mean()
    assert at_mark[0].mean() > 8 * scene.truth["watermark"].double().mean(), "of the pixels it has 2 %"
    # And away from what the circles are.
    away = mean_difference(*(each["localisation/shape"].values for each in found[::-1]))
    assert away.low > 0.1
    alike = measured(["rank_correlation"], {"maps": marked, "reference_maps": clean})
    assert alike["rank_correlation"].values.mean() < 0.7
