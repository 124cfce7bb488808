"""The other ways from photographs to features that featx is timed against: the usual loops, and two packages."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from featx.devices import available_threads
from featx.pixels.preprocess import IMAGENET_MEAN, IMAGENET_STD

BATCH = 32
Run = Callable[[], float]
"""Does all images once; returns the seconds that count."""


class Files(Dataset):  # type: ignore[type-arg]
    """Photographs as a tutorial loads them."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def trunk(name: str) -> torch.nn.Module:
    """The torchvision network without its last layer, in eval mode."""
    network: torch.nn.Module = torchvision.models.get_model(name, weights=None).eval()
    if hasattr(network, "fc"):
        network.fc = torch.nn.Identity()
    else:
        network.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))
    return network


def timed(work: Callable[[], Any]) -> Run:
    def run() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return run


def tutorial(paths: list[Path], name: str) -> Run:
    """DataLoader with 4 workers, PIL, eager fp32, batches of 32: the loop of the transfer-learning tutorials."""
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    network = trunk(name)

    def work() -> None:
        with torch.no_grad():
            for images in DataLoader(Files(paths, transform), BATCH, num_workers=4):
                network(images).flatten(1).numpy()

    return timed(work)


def tuned(paths: list[Path], name: str) -> Run:
    """As many workers as cores, uint8 to the model, channels-last, torch.compile."""
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    network = trunk(name).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def forward(images: torch.Tensor) -> torch.Tensor:
        pixels = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = network(pixels)
        return features.flatten(1)

    compiled = torch.compile(forward, dynamic=False)

    def work() -> None:
        with torch.inference_mode():
            for images in DataLoader(Files(paths, transform), BATCH, num_workers=available_threads()):
                compiled(images).numpy()

    return timed(work)


def timm_loop(paths: list[Path], name: str) -> Run:
    """timm's own transform and network behind 4 workers."""
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    transform = create_transform(**resolve_data_config({}, model=network))  # type: ignore[no-untyped-call]

    def work() -> None:
        with torch.inference_mode():
            for images in DataLoader(Files(paths, transform), BATCH, num_workers=4):
                network(images).numpy()

    return timed(work)


def img2vec(paths: list[Path], name: str) -> Run:
    """img2vec-pytorch, in lists of 32: its faster way."""
    from img2vec_pytorch import Img2Vec, img_to_vec

    for each in ("resnet18", "resnet50"):  # the weights cannot be downloaded here
        setattr(img_to_vec, each, lambda weights, each=each: torchvision.models.get_model(each, weights=None))
    vectors = Img2Vec(model=name, layer_output_size={"resnet18": 512, "resnet50": 2048}[name])

    def work() -> None:
        for start in range(0, len(paths), BATCH):
            vectors.get_vec([Image.open(path).convert("RGB") for path in paths[start : start + BATCH]])

    return timed(work)


def thingsvision(paths: list[Path], name: str) -> Run:
    """thingsvision, its data set and loader, batches of 32."""
    stubs = stub(
        "tensorflow",
        "torchtyping",
        "numba",
        "harmonization",
        "dreamsim",
        "skimage",
        "clip",
        "open_clip",
        "ftfy",
        "requests",
    )
    setattr(np, "AxisError", np.exceptions.AxisError)  # noqa: B010  where it was until numpy 2
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader as Batches
    from thingsvision.utils.data import ImageDataset

    for stubbed in stubs:  # matplotlib asks whether tensorflow was imported
        del sys.modules[stubbed]
    extractor = get_extractor(model_name=name, source="torchvision", device="cpu", pretrained=False)
    root, out = paths[0].parent.parent, tempfile.mkdtemp()
    module = "features" if name == "squeezenet1_1" else "avgpool"

    def work() -> None:
        data = ImageDataset(str(root), out, backend=extractor.get_backend(), transforms=extractor.get_transformations())
        batches = Batches(data, BATCH, extractor.get_backend())
        extractor.extract_features(batches, module, flatten_acts=module == "avgpool")

    def quiet() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()

    return timed(quiet)


def stub(*names: str) -> list[str]:
    """Put empty modules in place of those that are not installed and only imported; returns their names."""
    missing = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    parts = ("keras", "keras.applications", "keras.layers", "compat", "experimental", "io", "transform")
    stubs = [*missing, *(f"{name}.{part}" for name in missing for part in parts)]
    for name in stubs:
        sys.modules[name] = MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    return stubs
