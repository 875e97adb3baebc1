"""Attributions at the pixels of every family of supported architectures: each gives a map, or says no by name."""

import pytest
import torch

from sukashi.attributions import attributions
from sukashi.core.errors import ModelError
from sukashi.network import sites
from supported import build

# One of a family, and not those that take most of a minute.
FAMILIES = (
    *("torchvision:resnet18", "torchvision:vgg16_bn", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0"),
    *("timm:vit_tiny_patch16_224", "sukashi:cifar_resnet20", "sukashi:digits_cnn", "sukashi:digits_vit"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def shown(request):
    """A network and an image for it; in float64, for random weights answer with less than float32 tells apart."""
    model, shape = build(request.param)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return request.param, model.double(), x.double()


@pytest.mark.slow
@pytest.mark.parametrize("method", attributions, ids=lambda method: method.name)
def test_an_attribution_maps_the_pixels_or_refuses_by_name(shown, method):
    name, model, x = shown
    pixels, target = sites.input_site(x), torch.tensor([1])
    steps = {"steps": 2} if "steps" in method.options else {}
    fact = "refuses" if "vit" in name else "needs"
    if "attention" in method.facts.get(fact, ()):
        with pytest.raises(ModelError, match=f"^{method.name} "):
            method(model, x, target, [pixels])
        return
    found = method(model, x, target, [pixels], **steps)[pixels]
    assert found.shape == x.shape
    assert found.isfinite().all()
    if method.name == "gradcam":  # what speaks against a class is cut off, and of some classes nothing is left
        others = (method(model, x, torch.tensor([k]), [pixels])[pixels] for k in range(8))
        found = next((of for of in others if of.any()), found)
        assert len(found.unique()) > 1, "a map is as coarse as the layer it is of"
        return
    assert len(found.unique()) > 10
