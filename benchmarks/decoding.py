"""What `--decode gpu` changes: pixels and features against Pillow's, on a GPU or, without one, on a stand-in.

    python benchmarks/decoding.py PHOTOS --weights SQUEEZENET.pth --page docs/benchmarks/decoding.md

Without a GPU, Pillow's libjpeg stands in for its decoder, with chroma samples repeated as nvJPEG repeats
them. The figures then lack what nvJPEG's own arithmetic adds, and say nothing about speed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featx.backbones.loading import load_backbone
from featx.backbones.request import BackboneRequest
from featx.features import cosines
from featx.pixels.nvjpeg import Gpu
from featx.pixels.preprocess import CLOSE, Preprocess

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]

from extraction import machine  # noqa: E402
from jpegs import asked as asked  # noqa: E402
from jpegs import encoded, repeated  # noqa: E402

warnings.filterwarnings("ignore")


def features(module: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate(
            [module(torch.from_numpy(x)).numpy() for x in np.array_split(pixels, -(-len(pixels) // 16))]
        )


def repeating(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor | None]:
    """Decode JPEG files on the CPU and repeat their chroma samples, as nvJPEG does."""
    return [torch.from_numpy(repeated(data)) for data in files]


def compared(files: list[bytes], interpolation: str, device: str, networks: dict[str, torch.nn.Module]) -> list[Any]:
    """A row for each network and way to bring up chroma: repeated, and interpolated as featx does it."""
    preprocess = Preprocess(interpolation=interpolation)
    images = asked(files, preprocess)
    exact = np.stack([preprocess(image.data) for image in images])
    gpu = Gpu(preprocess, device, repeating if device == "cpu" else None)
    rows = []
    for way, gpu.repeats in (("repeated", False), ("interpolated", True)):
        ours = np.stack([views[0].cpu().numpy() for views in gpu(images) if views])
        apart = np.abs(ours.astype(int) - exact)
        for name, module in networks.items():
            found = cosines(features(module, ours), features(module, exact))
            rows.append([interpolation, way, name, len(images), apart, found])
    return rows


WITHOUT = """\
**nvJPEG has never run under featx, and its speed has never been measured.** Written by
`python benchmarks/decoding.py`, which runs the same on a GPU, as `make gpu` does. Here Pillow's own libjpeg plays the
GPU's decoder: its samples of chroma are repeated, as nvJPEG repeats them under torchvision, where libjpeg interpolates
them. What nvJPEG's own arithmetic adds is not in these figures.
"""
TEXT = """\
# `--decode gpu`: how near its pixels and features are to Pillow's

{how}
The photographs were saved again as 4:2:0, quality 90; features of squeezenet1_1 (ImageNet weights) and of a resnet18
(random weights, which tell images apart less), fp32; pixels in levels of 255, resized and cropped to 224 pixels.

{told}

| resize | chroma | network | least cosine | median | below {close} | mean difference | largest | pixels that differ |
|---|---|---|---|---|---|---|---|---|
{rows}

- *repeated* is what the decoder gives; *interpolated* is what featx makes of it (`pixels/chroma.py`) and stores.
  Without that step 4:2:0 files would miss the cosine of {close} that a run must reach.
- The largest differences after it are at colours cut off at 0 or 255, from which a sample cannot be told exactly.
- The resize adds little: at most 2 levels in fewer than 5 of 1,000 pixels (`tests/pixels/test_resample.py`).
"""


def page(rows: list[Any], rates: dict[str, float], device: str) -> str:
    told = machine()
    told["versions"] = ", ".join(v for v in told["versions"].split(", ") if not v.startswith(("timm", "onnx")))
    table = [
        f"| {interpolation} | {way} | {name} | {found.min():.5f} | {np.median(found):.5f} | {(found < CLOSE).sum()} of "
        f"{count} | {apart.mean():.3f} | {apart.max()} | {(apart > 0).mean():.1%} |"
        for interpolation, way, name, count, apart, found in rows
    ]
    text = TEXT.format(
        how=WITHOUT
        if device == "cpu"
        else f"By `python benchmarks/decoding.py` on {torch.cuda.get_device_name(device)}.\n",
        told="\n".join(f"- {name}: {told[name]}" for name in ("processor", "system", "versions")),
        close=CLOSE,
        rows="\n".join(table),
    )
    return text + "".join(f"- {name}: {rate:.0f} images/s.\n" for name, rate in rates.items())


def rates(files: list[bytes], device: str) -> dict[str, float]:
    """Images per second of decoding and resizing on a GPU, groups of 64, from bytes in memory; nothing on a CPU."""
    if device == "cpu":
        return {}
    preprocess = Preprocess()
    images, gpu = asked(files, preprocess), Gpu(preprocess, device)
    gpu(images[:64])
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for start in range(0, len(images), 64):
            gpu(images[start : start + 64])
        times.append(time.perf_counter() - begin)
    return {"decoded, resized and cropped on the GPU, from memory, median of 5": len(images) / sorted(times)[2]}


def saved_again(photos: Path) -> list[bytes]:
    """The validation photographs as 4:2:0, quality 90."""
    pictures = (Image.open(path).convert("RGB") for path in sorted(photos.glob("val/*/*.jpg")))
    return [encoded(picture, quality=90, subsampling="4:2:0") for picture in pictures]


def networks(weights: Path | None) -> dict[str, torch.nn.Module]:
    """squeezenet1_1 with these weights, and a resnet18 with random ones."""
    requests = {
        "squeezenet1_1": BackboneRequest("squeezenet1_1", weights=str(weights) if weights else "random"),
        "resnet18": BackboneRequest("resnet18", weights="random"),
    }
    return {name: load_backbone(request).module for name, request in requests.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="SqueezeNet 1.1's")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    files, made = saved_again(options.photos), networks(options.weights)
    rows = [row for way in ("bilinear", "bicubic") for row in compared(files, way, device, made)]
    text = page(rows, rates(files, device), device)
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
