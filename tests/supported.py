"""Every supported architecture, with random weights far from what hides a mistake."""

import timm
import torch
import torchvision
from torch import nn

from sukashi.models.architectures import OWN
from sukashi.network.layers import explicit_attention

# name -> input size, units; the counts are written down from the architectures, not from what find() says
ZOO = {
    "torchvision:resnet18": (64, 2880),
    "torchvision:resnet50": (64, 11456),
    "torchvision:vgg16": (64, 12416),
    "torchvision:vgg16_bn": (64, 12416),
    "torchvision:mobilenet_v2": (64, 9128),
    "torchvision:densenet121": (64, 10240),
    "torchvision:efficientnet_b0": (64, 11404),
    "torchvision:vit_b_16": (224, 46080),
    "timm:deit3_small_patch16_224": (224, 23040),
    "timm:deit3_base_patch16_224": (224, 46080),
    "timm:vit_tiny_patch16_224": (224, 11520),
    "sukashi:cifar_resnet20": (32, 448),
    "sukashi:cifar_resnet32": (32, 672),
    "sukashi:cifar_resnet44": (32, 896),
    "sukashi:cifar_resnet56": (32, 1120),
    "sukashi:cifar_resnet18": (32, 2880),
    "sukashi:small_vit": (64, 2304),
    "sukashi:digits_cnn": (8, 128),
    "sukashi:digits_vit": (8, 288),
}


def build(name: str) -> tuple[nn.Module, int]:
    family, _, short = name.partition(":")
    torch.manual_seed(0)
    if family == "sukashi":
        make, n_classes, width, channels, _ = OWN[short]
        model: nn.Module = make(n_classes, width)
    else:
        channels = 3
        zoo = {"timm": timm.create_model, "torchvision": torchvision.models.get_model}[family]
        model = zoo(short)
    explicit_attention(model)
    return randomised(model.eval()), channels


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
