"""Every supported architecture, with random weights far from what hides a mistake."""

import itertools

import timm
import torch
import torchvision
from torch import nn

from sukashi.models.architectures import OWN
from sukashi.network.layers import explicit_attention

# name -> input size, units; the counts are written down from the architectures, not from what find() says. Images are
# small, the hidden layers of VGG's classifier narrow, and vision transformers have four of their equal blocks: what is
# coupled to what depends on none of these.
ZOO = {
    "torchvision:resnet18": (64, 2880),
    "torchvision:resnet50": (64, 11456),
    "torchvision:vgg16": (64, 4224 + 2 * 24),
    "torchvision:vgg16_bn": (64, 4224 + 2 * 24),
    "torchvision:mobilenet_v2": (64, 9128),
    "torchvision:densenet121": (64, 10240),
    "torchvision:efficientnet_b0": (64, 11404),
    "torchvision:vit_b_16": (64, 4 * (3072 + 768)),
    "timm:deit3_small_patch16_224": (64, 4 * (1536 + 384)),
    "timm:deit3_base_patch16_224": (64, 4 * (3072 + 768)),
    "timm:vit_tiny_patch16_224": (64, 4 * (768 + 192)),
    "sukashi:cifar_resnet20": (32, 448),
    "sukashi:cifar_resnet32": (32, 672),
    "sukashi:cifar_resnet44": (32, 896),
    "sukashi:cifar_resnet56": (32, 1120),
    "sukashi:cifar_resnet18": (32, 2880),
    "sukashi:small_vit": (64, 2304),
    "sukashi:digits_cnn": (8, 128),
    "sukashi:digits_vit": (8, 288),
}


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights, and the shape (C, H, W) of its images."""
    family, _, short = name.partition(":")
    size, _ = ZOO[name]
    torch.manual_seed(0)
    channels = 3
    if family == "sukashi":
        make, n_classes, width, channels, _ = OWN[short]
        model: nn.Module = make(n_classes, width)
    elif short.startswith("vgg"):
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], short.endswith("bn"))
        with torch.device("meta"):
            model = torchvision.models.VGG(features)
        widths = itertools.pairwise((512 * 7 * 7, 24, 24, 10))
        model.classifier[0], model.classifier[3], model.classifier[6] = (nn.Linear(*both) for both in widths)
    elif family == "timm":
        model = timm.create_model(short, img_size=size, depth=4)
    elif short == "vit_b_16":
        model = torchvision.models.VisionTransformer(size, 16, 4, 12, 768, 3072)
    else:
        model = torchvision.models.get_model(short)
    explicit_attention(model)
    return randomised(model.eval()), (channels, size, size)


def randomised(model: nn.Module) -> nn.Module:
    """Statistics, affine parameters and scales far from 0 and 1, where a wrong cut could hide; no zero classifier."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
    return model
