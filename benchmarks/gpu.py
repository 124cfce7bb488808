"""Extraction on a GPU: featx, the usual loop, the backbone alone, decoding alone, the roof.

    python benchmarks/gpu.py PHOTOS [--networks resnet50 resnet18] [--images 20000] [--page docs/benchmarks/gpu.md]

All in one process tree, taken in turns, medians. Random weights: speed does not depend on them. The photographs
are repeated, each copy with bytes of its own behind its end. `--device cpu` is for trying the script out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from decoding import asked
from extraction import decode_alone, featx, in_turns, machine, model_alone, operations, repeated_photos, say
from peers import Files, Run, timed, trunk
from torch.utils.data import DataLoader
from torchvision import transforms

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.devices import available_threads
from featx.engines.opening import open_engine
from featx.features import cosines
from featx.pixels.nvjpeg import Gpu
from featx.pixels.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

BATCH = 256


def usual(paths: list[Path], name: str, device: str, workers: int) -> Run:
    """DataLoader, autocast to bf16, channels-last, torch.compile: what a careful user writes."""
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    network = trunk(name).to(device).to(memory_format=torch.channels_last)
    forward = torch.compile(lambda images: _forward(network, images, device), dynamic=False)

    def work() -> None:
        loader = DataLoader(Files(paths, transform), BATCH, num_workers=workers, pin_memory=device != "cpu")
        with torch.inference_mode():
            for images in loader:
                forward(images.to(device, non_blocking=True)).float().cpu().numpy()

    return timed(work)


def eager(pixels: np.ndarray, name: str, device: str) -> Run:
    """The network alone on pixels that are there: eager, autocast to bf16, channels-last."""
    network = trunk(name).to(device).to(memory_format=torch.channels_last)
    images = torch.from_numpy(pixels).to(device)

    def work() -> None:
        with torch.inference_mode():
            for part in torch.split(images, BATCH):
                rows = _forward(network, part, device)
            rows.float().cpu()

    return timed(work)


def decoding(paths: list[Path], device: str) -> Run:
    """The GPU's decoder and resize alone, from bytes in memory, in groups of 64."""
    gpu, files = Gpu(Preprocess(), device), [path.read_bytes() for path in paths[:2048]]
    images = asked(files, gpu.preprocess)
    say(f"  {len(images)} of {len(files)} files are for the GPU's decoder")

    def work() -> None:
        for start in range(0, len(images), 64):
            gpu(images[start : start + 64])

    run = timed(work)
    return lambda: run() * len(paths) / len(images)


def roof(device: str) -> Run:
    """Seconds of a bf16 product of 8192 x 8192 matrices (512 x 512 on a CPU)."""
    size = 512 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(10):
            c = a @ b
        c[0, 0].item()

    run = timed(work)
    return lambda: run() / 10 * (8192 / size) ** 3


def _forward(network: torch.nn.Module, images: torch.Tensor, device: str) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        pixels = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = network(pixels)
        return features.flatten(1)


def compare(name: str, photos: Path, count: int, rounds: int, device: str, folder: Path) -> str:
    data = repeated_photos(photos, count, folder / "data")
    paths = [data.path(i) for i in range(len(data))]
    pixels = np.stack([Preprocess()(data.read(i)) for i in range(min(len(data), 256))])
    many = np.concatenate([pixels] * max(1, min(count, 8192) // len(pixels)))
    cache, cores = folder / "cache", available_threads()
    precisions = ("bf16",) if device == "cpu" else ("bf16", "fp16", "fp32")
    ways = ("exact",) if device == "cpu" else ("exact", "gpu")
    makers: dict[str, Callable[[], Run]] = {
        f"featx {p}, --decode {way}": partial(
            featx, folder / "data", name, cache / p / way, device=device, precision=p, decode=way
        )
        for p in precisions
        for way in ways
    }
    makers |= {
        f"DataLoader({cores}) + AMP + compile": lambda: usual(paths, name, device, cores),
        "backbone alone, eager AMP channels-last": lambda: eager(many, name, device),
        **{
            f"backbone alone, featx {p}": partial(
                model_alone, many, folder / "data", name, cache / "alone", device=device, precision=p
            )
            for p in precisions
        },
        "decoding alone, all cores": lambda: decode_alone(paths),
        "decoding alone, the GPU": lambda: decoding(paths, device),
    }
    seconds, absent = in_turns(name, {**makers, "roof": lambda: roof(device)}, rounds)
    middle = {label: statistics.median(values) for label, values in seconds.items()}
    peak = 2 * 8192**3 / middle.pop("roof") / 1e12
    gflop = operations(name) / 1e9
    lines = [
        f"## {name}",
        "",
        f"{count} files a round, {rounds} rounds.",
        "",
        "| | images/s | of the bf16 roof |",
        "|---|---|---|",
    ]
    for label, value in middle.items():
        images = len(many) if label.startswith("backbone") else len(paths)
        share = f"{images / value * gflop / 1000 / peak:.1%}" if "decoding" not in label else ""
        lines.append(f"| {label} | {images / value:.0f} | {share} |")
    lines += [f"| {label} | not measured | {why} |" for label, why in absent.items()]
    lines += ["", f"- The roof, a bf16 product of large matrices: {peak:.2f} TFLOP/s; the network: {gflop:.2f} GFLOP."]
    request = BackboneRequest(name, weights="random")
    info = resolve(request, cache)
    sample = pixels[:64]
    exact = open_engine(request, info, cache=cache, device="cpu")
    reference = np.concatenate(
        [exact(sample[i : i + exact.batch_size]) for i in range(0, len(sample), exact.batch_size)]
    )
    for p in precisions:
        engine = open_engine(request, info, cache=cache, device=device, precision=p)
        rows = np.concatenate(
            [engine(sample[i : i + engine.batch_size]) for i in range(0, len(sample), engine.batch_size)]
        )
        lines.append(f"- Features in {p} against fp32 on the CPU: least cosine {cosines(rows, reference).min():.6f}.")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="*", default=["resnet50", "resnet18"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "no GPU: a trial of the script"
    lines = ["# Extraction on a GPU", "", "Written by `python benchmarks/gpu.py`.", "", f"- GPU: {name}"]
    lines += [f"- {key}: {value}" for key, value in machine().items()] + [""]
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(compare(network, options.photos, options.images, options.rounds, options.device, Path(folder)))
    text = "\n".join(lines)
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
