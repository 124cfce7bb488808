"""Fixtures that many tests share: the real photographs and weights, small image folders, a runner."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# one environment for all: no progress bars, no network, no threads beyond the machine's
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("FEATX_TEST_DATA", ROOT.parent / "shared"))


def _real(path: str) -> Path:
    found = TEST_DATA / path
    if not found.exists():
        reason = f"{found} is not there; set FEATX_TEST_DATA to the folder that holds {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def photos() -> Path:
    """The ants and bees: `{train,val}/{ants,bees}/*.jpg`, 244 + 153 photographs."""
    return _real("data/hymenoptera_data")


@pytest.fixture(scope="session")
def squeezenet_weights() -> Path:
    """SqueezeNet 1.1 with real ImageNet weights, a torchvision state dict."""
    return _real("weights/squeezenet1_1-imagenet1k.pth")


def write_images(
    root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cold", "warm"), seed: int = 0
) -> Path:
    """A folder of small PNG files, one sub-folder a class, each class with its own colours."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            low = 120 * number // max(1, len(classes) - 1)
            pixels = rng.integers(low, low + 120, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two classes, `cold` and `warm`, of six PNG files each."""
    return write_images(tmp_path / "tiny")
