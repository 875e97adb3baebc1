"""Networks of our own: CIFAR ResNets, a ViT for 64x64 images, and a small CNN and a small ViT for 8x8 digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sukashi.network.layers import Attention, PadShortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        plain = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if plain else PadShortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He et al. 2016, sec. 4.2: three stages of n blocks with 16, 32 and 64 channels; depth 6n + 2."""

    def __init__(self, depth: int, n_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n_blocks, 1)
        self.layer2 = self._stage(16, 32, n_blocks, 2)
        self.layer3 = self._stage(32, 64, n_blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, n_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, n_blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return cast(Tensor, self.linear(self.pool(out).flatten(1)))


def cifar_resnet18(n_classes: int, width: int) -> nn.Module:
    """torchvision's ResNet-18 with a CIFAR stem (3x3 stride 1, no max-pool); `width` channels in the first stage."""
    # width_per_group only widens bottlenecks; a narrower basic ResNet has its stages laid anew.
    model = torchvision.models.resnet18(weights=None, num_classes=n_classes)
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.maxpool = nn.Identity()
    block = torchvision.models.resnet.BasicBlock
    for stage in range(4):
        layer = model._make_layer(block, width * 2**stage, 2, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(width * 8, n_classes)
    return cast(nn.Module, model)


def small_vit(n_classes: int, width: int) -> nn.Module:
    """timm's ViT for (3, 64, 64) images: patches of 8x8, a class token, six blocks of four heads; 0.8 M parameters."""
    return cast(
        nn.Module,
        VisionTransformer(
            img_size=64,
            patch_size=8,
            num_classes=n_classes,
            embed_dim=width,
            depth=6,
            num_heads=4,
            mlp_ratio=2,
        ),
    )


class DigitsCNN(nn.Module):
    """A small CNN with one residual block for (1, 8, 8) digits; about 30 thousand parameters at width 32."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc1 = nn.Linear(width * 16, width * 2)
        self.fc2 = nn.Linear(width * 2, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return cast(Tensor, self.fc2(F.relu(self.fc1(x.flatten(1)))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), n_heads, (dim // n_heads) ** -0.5)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class DigitsViT(nn.Module):
    """A small ViT for (1, 8, 8) digits: 2x2 patches, 16 tokens averaged at the end."""

    def __init__(self, n_classes: int, width: int, depth: int = 3, n_heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, n_heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return cast(Tensor, self.head(self.norm(self.blocks(tokens)).mean(1)))


# name -> (constructor taking n_classes and width, default classes, default width, input channels, input size)
OWN: dict[str, tuple[Callable[[int, int], nn.Module], int, int, int, int]] = {
    "cifar_resnet20": (lambda n, w: CifarResNet(20, n), 10, 16, 3, 32),
    "cifar_resnet32": (lambda n, w: CifarResNet(32, n), 10, 16, 3, 32),
    "cifar_resnet44": (lambda n, w: CifarResNet(44, n), 10, 16, 3, 32),
    "cifar_resnet56": (lambda n, w: CifarResNet(56, n), 10, 16, 3, 32),
    "cifar_resnet18": (cifar_resnet18, 10, 64, 3, 32),
    "small_vit": (small_vit, 10, 128, 3, 64),
    "digits_cnn": (DigitsCNN, 10, 32, 1, 8),
    "digits_vit": (DigitsViT, 10, 32, 1, 8),
}
