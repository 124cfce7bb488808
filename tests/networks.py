"""Random weights whose outputs have a real scale.

Freshly initialised MobileNetV2, MNASNet, Inception and GoogLeNet give outputs of 1e-9 to 1e-2, which pass
any absolute tolerance; batch norm that is still the identity hides mistakes in folding it.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from sharing import made_once, session_cache, session_folder
from torch import nn

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.backbones.zoos.torchvision import create, first_weights, preprocessing
from featx.engines.onnx import accelerated, backbone_onnx

THIRTEEN = (
    "alexnet",
    "densenet161",
    "googlenet",
    "inception_v3",
    "mnasnet1_0",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "vgg16",
    "wide_resnet50_2",
)


@functools.cache
def weights_file(name: str) -> Path:
    """A torchvision state dict, .pth, of calibrated random weights; the same ones for a name each time."""
    path = session_folder() / f"{name}.pth"
    if path.exists():
        return path
    crop = preprocessing(first_weights(name)).crop
    network = create(name, crop, seed=1)
    calibrate(network, crop)
    with tempfile.NamedTemporaryFile(dir=session_folder(), delete=False) as file:
        torch.save(network.state_dict(), file)
    os.replace(file.name, path)
    return path


def calibrated(name: str, layer: str = "features") -> BackboneRequest:
    """The request for a torchvision network with calibrated random weights."""
    return BackboneRequest(name, weights=str(weights_file(name)), layer=layer)


def resnet18_rewritten() -> tuple[Path, Path]:
    """ResNet-18 as exported and as rewritten, measured as twice as fast, in a folder of their own: each processor
    decides otherwise which of them runs."""

    def make(folder: Path) -> None:
        request = calibrated("resnet18")
        shutil.copy(backbone_onnx(request, resolve(request, session_cache()), session_cache()), folder / "plain.onnx")
        moments = iter([0, 0, 2, 3, 1000])
        accelerated(folder / "plain.onnx", clock=lambda: next(moments))

    folder = made_once("resnet18-rewritten", make)
    (fast,) = folder.glob("plain.winograd*.onnx")
    return folder / "plain.onnx", fast


def calibrate(network: nn.Module, crop: int, seed: int = 0) -> None:
    """Give batch norms statistics of their own, then scale every layer to outputs of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    handles = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.1, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(_unit_scale))
    coarse = torch.randn((2, 3, crop // 16 + 1, crop // 16 + 1), generator=generator)
    pixels = nn.functional.interpolate(coarse, (crop, crop), mode="bilinear")
    with torch.no_grad():
        network.eval()(pixels)
    for handle in handles:
        handle.remove()


def _unit_scale(module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    scale = output.std() + 1e-12
    module.weight.data /= scale
    if module.bias is not None:
        module.bias.data /= scale
    return output / scale
