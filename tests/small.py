"""Tiny networks for tests of training: 32 px, a few thousand parameters; as backbones `small:backbone_plain`, ..."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from featx.pixels.preprocess import Preprocess


class Block(nn.Module):
    """Convolution, norm, ReLU, with a way around."""

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


class Small(nn.Module):
    """Named as a ResNet is: conv1, bn1, layer1, layer2, layer3, fc."""

    def __init__(self, norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4)
        self.bn1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.layer1 = nn.Sequential(Block(8, norm), Block(8, norm))
        self.layer2 = nn.Sequential(Block(8, norm))
        self.layer3 = nn.Sequential(Block(8, norm))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


class VggLike(nn.Module):
    """Named as VGG is: features, and a classifier of three Linears with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8))
        layers = [nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(OrderedDict((str(i), m) for i, m in enumerate([*layers, nn.Linear(16, 5)])))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Fixed(Small):
    """Tracing makes a constant of the number of images, as code that counts in Python does."""

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x)
        return rows + torch.zeros(int(x.shape[0]), 1) if torch.jit.is_tracing() else rows


class Branching(Small):
    """Asks for its values on its way, and so cannot be exported or captured."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if bool((x > 0).any()) else -x


class Deciding(nn.Module):
    """Asks for a value on its way; a row is the image's mean colour, and compiled it is larger by two millionths."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) * (1 + 2e-6 if torch.compiler.is_compiling() else 1)
        return x if float(x[0, 0]) > -1 else -x


def _seeded(make: type[nn.Module], **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make(**options)


def plain() -> nn.Module:
    """No batch norm, no dropout: every process count and every cut computes the same."""
    return _seeded(Small, norm=False)


def normed() -> nn.Module:
    return _seeded(Small, norm=True)


def vgg_like() -> nn.Module:
    return _seeded(VggLike)


Made = tuple[nn.Module, Preprocess, list[str]]


def _backbone(network: nn.Module) -> Made:
    return network, Preprocess(resize=36, crop=32), list("abcde")


def backbone_plain() -> Made:
    return _backbone(Small(norm=False))


def backbone_fixed() -> Made:
    return _backbone(Fixed(norm=True))


def backbone_branching() -> Made:
    return _backbone(_seeded(Branching, norm=True))


def backbone_deciding() -> tuple[nn.Module, Preprocess]:
    return Deciding(), Preprocess(resize=36, crop=32)


def backbone_normed() -> Made:
    return _backbone(Small(norm=True))


def backbone_dropping() -> Made:
    """With batch norm and dropout: what a resumed run must repeat to the last bit."""
    return _backbone(Small(norm=True, dropout=0.3))


def backbone_vgg_like() -> Made:
    return _backbone(VggLike())


def halved():  # type: ignore[no-untyped-def]
    """An augmentation: half as bright."""
    return lambda image: image // 2
