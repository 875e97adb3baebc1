"""The three kinds of network of the medical study, small enough for two cores: 64 x 64 pixels instead of 224 x 224.

`PYTHONPATH=studies` makes them known as `networks:vgg`, `networks:resnet` and `networks:vit`. With a GPU take
`torchvision:vgg19_bn`, `torchvision:resnet50` and `torchvision:vit_b_16` in their place, here and in medical.toml.
"""

from torch import nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.vision_transformer import VisionTransformer

from sukashi.core.types import Preprocess

SIZE = 64


def vgg(n_classes: int = 3, width: int = 16) -> nn.Module:
    """3x3 convolutions with BatchNorm in five stages, and two linear layers; 0.6 M parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, n_convolutions in enumerate((1, 1, 2, 2, 2)):
        for _ in range(n_convolutions):
            wider = width * 2 ** min(stage, 3)
            layers += [nn.Conv2d(channels, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    flat = channels * (SIZE // 32) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, channels), nn.ReLU(), nn.Dropout(), nn.Linear(channels, n_classes)]
    return _reads(nn.Sequential(*layers))


def resnet(n_classes: int = 3, width: int = 16) -> nn.Module:
    """Eight bottleneck blocks in four stages, as in a ResNet-26; 0.9 M parameters."""
    block = torchvision_resnet.Bottleneck
    model = torchvision_resnet.ResNet(block, [2, 2, 2, 2], num_classes=n_classes)
    model.inplanes = width
    model.conv1, model.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
    for stage in range(4):
        setattr(model, f"layer{stage + 1}", model._make_layer(block, width * 2**stage, 2, stride=1 + (stage > 0)))
    model.fc = nn.Linear(width * 8 * block.expansion, n_classes)
    return _reads(model)


def vit(n_classes: int = 3, width: int = 96) -> nn.Module:
    """Six blocks of four heads over patches of 8 x 8 pixels; 0.5 M parameters."""
    return _reads(VisionTransformer(SIZE, 8, 6, 4, width, 2 * width, num_classes=n_classes))


def _reads(model: nn.Module) -> nn.Module:
    model.preprocess = Preprocess(SIZE, SIZE, 3, (0.5,) * 3, (0.25,) * 3)
    return model
