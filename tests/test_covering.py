"""Grad-CAM, occlusion, RISE and SmoothGrad: which layer is read, what is covered, what is refused, and captum."""

import pytest
import torch
import torchvision
from torch import nn

from cases import PIXELS, TARGET, explained, noise
from oracles import ORACLES
from sukashi.attributions import attributions
from sukashi.attributions.gradcam import _maps
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Site


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4).double().eval()


@pytest.fixture(scope="module")
def body():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2), nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 5 * 6, 3)).double().eval()


def test_gradcam_reads_the_last_maps_before_pooling_or_the_layer_that_is_asked_for(resnet):
    x = noise(2, 3, 64, 64)
    target = torch.tensor([1, 3])
    assert _maps(resnet, x[:1], None) == ("layer4", "channel", 512)
    for layer in (None, "layer2"):
        seen = {}
        module = resnet.get_submodule(layer or "layer4")
        handle = module.register_forward_hook(lambda *args, seen=seen: seen.update(maps=args[2]))
        logits = resnet(x)
        handle.remove()
        (slope,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen["maps"])
        small = (slope.mean((2, 3), keepdim=True) * seen["maps"].detach()).sum(1, keepdim=True).relu()
        large = nn.functional.interpolate(small, (64, 64), mode="bilinear")[:, 0]
        found = explained(attributions["gradcam"], resnet, x, target, layer=layer)
        torch.testing.assert_close(found.sum(1), large, rtol=1e-9, atol=1e-15)
        assert small.max() > 0


def test_what_gradcam_cannot_read_is_refused_by_name(resnet, small64):
    x = noise(2, 3, 64, 64)
    target = torch.tensor([1, 3])
    gradcam = attributions["gradcam"]
    with pytest.raises(ModelError, match=r"layer 'fc' gives \(1, 4\): choose another layer"):
        explained(gradcam, resnet, x, target, layer="fc")
    with pytest.raises(ModelError, match=r"no layer 'layer5' .*did you mean 'layer"):
        explained(gradcam, resnet, x, target, layer="layer5")
    with pytest.raises(ModelError, match=r"layer 'layer1\.0\.relu' is called 2 times"):
        explained(gradcam, resnet, x, target, layer="layer1.0.relu")

    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((1, 2))

    last = nn.Sequential(nn.Conv2d(3, 9, 3, 4), Last(), Mean()).double().eval()
    with pytest.raises(ModelError, match=r"in the shape of the image, and layer '1' gives \(1, 16, 16, 9\)"):
        explained(gradcam, last, x, target)
    vit = small64["vit"]
    with pytest.raises(ModelError, match="this DigitsViT has none behind which only vectors follow"):
        explained(gradcam, vit.model, vit.data.x[:2], vit.data.target[:2], site=Site("", "pixel", 1))


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (4, 3), (5, 5), (13, 1), (2, 1)])
@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_occlusion_covers_every_pixel_by_patches_that_end_with_the_image(body, window, stride, batch_size):
    x = noise(3, 3, 11, 13)
    given = {"window": window, "stride": stride}
    found = explained(attributions["occlusion"], body, x, **given, batch_size=batch_size)
    for row, image, target in zip(found, x, TARGET, strict=True):
        expected = ORACLES["attributions", "occlusion"](body, image, target, PIXELS, **given)
        torch.testing.assert_close(row.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_occlusion_by_default_takes_an_eighth_in_steps_of_half_and_refuses_gaps(body):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 2, 5, 5), nn.Flatten(), nn.Linear(2 * 6 * 8, 3)).double().eval()
    x = noise(3, 3, 32, 40)
    occlusion = attributions["occlusion"]
    assert torch.equal(explained(occlusion, wide, x), explained(occlusion, wide, x, window=4, stride=2))
    with pytest.raises(UsageError, match="stride of occlusion must be at most the window of 2, got 3"):
        explained(occlusion, wide, x, window=2, stride=3)


def test_smoothgrad_is_a_slope_where_the_noise_is_small_and_is_drawn_for_each_image(body):
    x = noise(3, 3, 11, 13)
    smooth, slope = attributions["smoothgrad"], attributions["gradient_x_activation"]
    small = explained(smooth, body, x, sigma=1e-7, n_samples=2)
    torch.testing.assert_close(small * x, explained(slope, body, x), rtol=1e-4, atol=1e-6)
    twice = torch.cat([x, x[:1] * 0.5])
    found = explained(smooth, body, twice, torch.tensor([0, 2, 1, 0]), n_samples=3)
    torch.testing.assert_close(found[:3], explained(smooth, body, x, n_samples=3))
    assert not torch.allclose(found[3], found[0])


def test_captum_says_the_same(body):
    attr = pytest.importorskip("captum.attr")
    x = noise(3, 3, 11, 13)
    shapes = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 3, 3), "baselines": 0}
    expected = attr.Occlusion(body).attribute(x, target=TARGET, **shapes)
    torch.testing.assert_close(3 * explained(attributions["occlusion"], body, x, window=4, stride=3), expected)
    maps = attr.LayerGradCam(body, body[3]).attribute(x, target=TARGET, relu_attributions=True)
    expected = attr.LayerAttribution.interpolate(maps, (11, 13), "bilinear")
    torch.testing.assert_close(explained(attributions["gradcam"], body, x).sum(1, keepdim=True), expected)


def test_rise_finds_what_alone_decides():
    """A network that reads one corner is explained by that corner."""
    corner = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    corner[:, :, :4, :4] = 1
    reads = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 3)).double().eval()
    with torch.no_grad():
        reads[1].weight.copy_(torch.cat([corner.flatten(1), 0 * corner.flatten(1), -corner.flatten(1)]))
    x = 1 + 0.1 * noise(2, 3, 12, 12)
    found = explained(attributions["rise"], reads, x, torch.tensor([0, 2]), cells=3, n_masks=500).sum(1)
    inside, outside = found[:, :4, :4].mean((1, 2)), found[:, 8:, 8:].abs().mean((1, 2))
    assert (inside.sign() == torch.tensor([1.0, -1.0])).all(), "for the class it speaks for, against the other"
    assert (inside.abs() > 5 * outside).all()


def test_rise_counts_what_is_seen_beside_the_baseline(body):
    x = noise(3, 3, 11, 13)
    found = explained(attributions["rise"], body, x, n_masks=30)
    assert not torch.allclose(found, explained(attributions["rise"], body, x, n_masks=30, baseline=1.0))
    assert not explained(attributions["rise"], body, x, n_masks=30, baseline=x).abs().max() > 1e-12, "nothing is hidden"
