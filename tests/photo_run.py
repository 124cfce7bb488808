"""Some of the ants and bees in a folder with one run on them, made once for all tests that need an exported file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from sharing import made_once

import featx

PER_CLASS = {"train": 20, "val": 30}
ORIENTATION = {"ants": 6, "bees": 5}
"""The EXIF orientation of each class's first validation photograph: it lies on its side, as phones write them."""
CHECKPOINT = "squeezenet1_1-b8a52dc0.pth"
"""What torchvision calls the file of its pretrained SqueezeNet 1.1."""


def some_photographs(photos: Path, folder: Path) -> Path:
    """`folder/{train,val}/{ants,bees}`: 20 and 30 photographs of each class, spread over the data set, some turned."""
    for split, count in PER_CLASS.items():
        for name in ("ants", "bees"):
            found = sorted((photos / split / name).glob("*.jpg"))
            (folder / split / name).mkdir(parents=True)
            for path in found[:: len(found) // count][:count]:
                shutil.copy(path, folder / split / name)
    for name, orientation in ORIENTATION.items():
        _turn(min((folder / "val" / name).iterdir()), orientation)
    return folder


def _turn(path: Path, orientation: int) -> None:
    """Store a photograph as a camera that lay on its side does: other pixels, and the tag that turns them upright."""
    image, exif = Image.open(path).convert("RGB"), Image.Exif()
    exif[0x0112] = orientation
    stored = {6: Image.Transpose.ROTATE_90, 5: Image.Transpose.TRANSPOSE}[orientation]
    # nearly without loss: the answers that pages show stay as they are
    image.transpose(stored).save(path, "JPEG", quality=100, subsampling=0, exif=exif)


def torch_home(folder: Path, weights: Path) -> Path:
    """A torch cache that holds the pretrained SqueezeNet 1.1, as after a download: a value for `TORCH_HOME`."""
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(weights, checkpoints / CHECKPOINT)
    return folder


def photo_run(photos: Path, weights: Path) -> Path:
    """A folder with `photos/`, `torch/`, `cache/` and `run/`, fitted and exported; the same one for a whole session."""

    def make(base: Path) -> None:
        some_photographs(photos, base / "photos")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_HOME", str(torch_home(base / "torch", weights)))
            folders = {"cache": base / "cache", "output": base / "run"}
            run = featx.fit(base / "photos", "squeezenet1_1", **folders)
            featx.export(run.path)

    return made_once("some-photographs", make)
