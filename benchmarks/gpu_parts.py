"""The parts of `benchmarks/gpu.py`, each a process of its own; results are written after every measurement."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_page import ALONE, BY_GPU, CPU_DECODES, EXACT, GPU_DECODES, LOADER

ROOT = Path(__file__).resolve().parent.parent
BATCH = 256


class Results(dict[str, Any]):
    """What a part has measured; `keep` writes it where the time limit cannot take it away."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, **values: Any) -> None:
        self.update(values)
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps(self))
        aside.replace(self.path)


def machine(options: argparse.Namespace, results: Results) -> None:
    """The card, the processor, the versions, the day."""
    import extraction

    results.keep(facts={"date": time.strftime("%Y-%m-%d"), **extraction.machine()})
    if options.device == "cpu":
        return
    import torch

    card = torch.cuda.get_device_properties(options.device)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    gpu = f"{card.name}, {card.total_memory >> 30} GiB, {card.multi_processor_count} multiprocessors; {driver.strip()}"
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    results.keep(facts={"GPU": gpu, **results["facts"], "CUDA": cuda})


def tests(options: argparse.Namespace, results: Results) -> None:
    """`pytest -m gpu`, in the files that have such tests: others may need packages that are not here."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, *files], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    failures = [f"{case.get('name')}: {(case[0].get('message') or '').splitlines()[:1]}" for case in bad]
    passed = len(cases) - len(bad) - len(skipped)
    results.keep(passed=passed, failed=len(bad), skipped=len(skipped), failures=failures)


def extraction(options: argparse.Namespace, results: Results) -> None:
    """Files to shards, by featx and by a tuned loader, and each stage alone: in turns, as long as there is time."""
    import numpy as np
    from extraction import decode_alone, model_alone, operations, repeated_photos, say

    from featx.devices import available_threads
    from featx.pixels.preprocess import Preprocess

    cpu = options.device == "cpu"
    name, precision = ("squeezenet1_1", "fp32") if cpu else ("resnet50", "bf16")
    folder = Path(options.folder)
    data = repeated_photos(options.photos, options.images, folder / "data")
    paths = [data.path(i) for i in range(len(data))]
    pixels = np.stack([Preprocess()(data.read(i)) for i in range(min(len(data), 256))])
    many = np.concatenate([pixels] * (len(data) // len(pixels)))
    results.keep(network=name, precision=precision, gflop=operations(name) / 1e9, times={}, images={}, absent={})

    stages = results.setdefault("stages", {})
    alone = partial(model_alone, many, folder / "data", name, folder / "cache", device=options.device)
    makers: dict[str, Callable[[], Callable[[], float]]] = {
        EXACT: lambda: extracted(folder, name, "exact", options.device, precision, stages),
        LOADER: lambda: usual(paths, name, options.device, available_threads(), compiles=not cpu),
        CPU_DECODES: lambda: decode_alone(paths),
        ALONE: lambda: alone(precision=precision),
    }
    if not cpu:
        makers |= {
            BY_GPU: lambda: extracted(folder, name, "gpu", options.device, precision, stages),
            GPU_DECODES: lambda: decoding_alone(paths, options.device),
            f"{ALONE} fp16": lambda: alone(precision="fp16"),
            f"{ALONE} fp32": lambda: alone(precision="fp32"),
            "backbone alone, eager AMP channels-last": lambda: eager(many, name, options.device),
            "roof": lambda: roof(options.device),
        }
    runs: dict[str, Callable[[], float]] = {}
    for label, make in makers.items():
        say(label)
        try:
            run = make()
            run()  # compiles, and is not counted
        except Exception as error:
            results["absent"][label] = f"{type(error).__name__}: {error}"[:300]
            if label == LOADER:  # triton needs a compiler
                label = "DataLoader + AMP, not compiled"
                run = usual(paths, name, options.device, available_threads(), compiles=False)
            else:
                results.keep()
                continue
        runs[label] = run
        results["images"][label] = len(paths)
        results["times"][label] = [run()]
        results.keep()
    rounds = 1
    while rounds < (2 if cpu else 5) and time.perf_counter() < options.until:
        for label, run in runs.items():
            results["times"][label].append(run())
            results.keep()
        rounds += 1


def extracted(
    folder: Path, name: str, way: str, device: str, precision: str, stages: dict[str, Any]
) -> Callable[[], float]:
    """featx on the files in `folder`, into an empty cache; opening the engine is not counted."""
    from featx.backbones.request import BackboneRequest
    from featx.extraction.pipeline import sync

    cache = folder / "cache"

    def run() -> float:
        for old in ("features", "memo"):
            shutil.rmtree(cache / old, ignore_errors=True)
        where: dict[str, Any] = {"cache": cache, "device": device, "precision": precision, "decode": way}
        report = sync(folder / "data", BackboneRequest(name, weights="random"), **where).report
        assert report.cached == report.skipped == 0 and report.images_per_second
        said = {"shares": report.shares, "seconds": report.seconds, "advice": report.advice}
        stages[f"featx, --decode {way}"] = said | {"decoded_on_gpu": report.decoded_on_gpu}
        return report.extracted / report.images_per_second

    return run


def usual(paths: list[Path], name: str, device: str, workers: int, *, compiles: bool) -> Callable[[], float]:
    """DataLoader, autocast to bf16, channels-last, torch.compile: what a careful user writes."""
    import torch
    from peers import Files, timed, trunk
    from torch.utils.data import DataLoader
    from torchvision import transforms

    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    network = trunk(name).to(device).to(memory_format=torch.channels_last)
    eager = partial(autocast, network, device)
    forward: Callable[..., Any] = torch.compile(eager, dynamic=False) if compiles else eager

    def work() -> None:
        loader = DataLoader(Files(paths, transform), BATCH, num_workers=workers, pin_memory=device != "cpu")
        with torch.inference_mode():
            for images in loader:
                forward(images.to(device, non_blocking=True)).float().cpu().numpy()

    return timed(work)


def autocast(network: Any, device: str, images: Any) -> Any:
    import torch

    from featx.pixels.preprocess import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device != "cpu"):
        pixels = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        return network(pixels).flatten(1)


def eager(pixels: Any, name: str, device: str) -> Callable[[], float]:
    """The network alone on pixels that are on the GPU already."""
    import torch
    from peers import timed, trunk

    network = trunk(name).to(device).to(memory_format=torch.channels_last)
    images = torch.from_numpy(pixels).to(device)

    def work() -> None:
        with torch.inference_mode():
            for part in torch.split(images, BATCH):
                rows = autocast(network, device, part)
            rows.float().cpu()

    return timed(work)


def decoding_alone(paths: list[Path], device: str) -> Callable[[], float]:
    """The GPU's decoder and resize alone, from bytes in memory, in groups of 64."""
    from decoding import asked
    from peers import timed

    from featx.pixels.nvjpeg import Gpu
    from featx.pixels.preprocess import Preprocess

    gpu, files = Gpu(Preprocess(), device), [path.read_bytes() for path in paths[:2048]]
    images = asked(files, gpu.preprocess)

    def work() -> None:
        for start in range(0, len(images), 64):
            gpu(images[start : start + 64])

    run = timed(work)
    return lambda: run() * len(paths) / len(images)


def roof(device: str) -> Callable[[], float]:
    """Seconds of a bf16 product of matrices of 8192 x 8192."""
    import torch
    from peers import timed

    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(10):
            c = a @ b
        c[0, 0].item()

    run = timed(work)
    return lambda: run() / 10


def precision(options: argparse.Namespace, results: Results) -> None:
    """Rows of every precision against eager fp32 on the CPU, and whether a row is the same alone."""
    import numpy as np
    import torch

    from featx.backbones.loading import load_backbone
    from featx.backbones.request import BackboneRequest
    from featx.engines.opening import open_engine
    from featx.features import TOLERANCE, cosines, difference
    from featx.pixels.preprocess import Preprocess
    from featx.sources.opening import open_source

    cpu = options.device == "cpu"
    source, results["distances"] = open_source(options.photos), {}
    pixels = np.stack([Preprocess()(source.read(i)) for i in range(min(len(source), 4 if cpu else 64))])
    for name in ("squeezenet1_1",) if cpu else ("squeezenet1_1", "resnet50", "vit_b_16", "convnext_tiny"):
        real = name == "squeezenet1_1" and options.weights.exists()
        request = BackboneRequest(name, weights=str(options.weights) if real else "random")
        backbone = load_backbone(request)
        with torch.inference_mode():
            eager = np.concatenate([backbone.module(torch.from_numpy(p)).numpy() for p in np.split(pixels, 4)])
        for how in ("fp32",) if cpu else ("fp32", "bf16", "fp16"):
            engine = open_engine(
                request, backbone.info, cache=Path(options.folder), device=options.device, precision=how
            )
            rows, alone = engine(pixels[: engine.batch_size]), engine(pixels[1:2])
            results["distances"][f"{name}, {how}"] = {
                "difference": difference(rows, eager[: len(rows)]),
                "tolerance": TOLERANCE if how == "fp32" else None,
                "cosine": float(cosines(rows, eager[: len(rows)]).min()),
                "alone is equal": bool(np.array_equal(alone[0], rows[1])),
                "batch": engine.batch_size,
            }
            results.keep()
            del engine


def solver(options: argparse.Namespace, results: Results) -> None:
    """`logreg.fit` with cross-validation, on the CPU's cores and with its passes on the GPU."""
    import numpy as np
    from heads import features

    from featx.heads import logreg
    from featx.solvers.examples import Examples

    cpu = options.device == "cpu"
    results["fits"] = {}
    for rows, size, classes in (
        ((300, 16, 3),) if cpu else ((20_000, 512, 10), (50_000, 768, 100), (100_000, 1024, 100))
    ):
        X, y = features(rows, size, classes, 0.11)
        fits, found = {}, results["fits"].setdefault(f"{rows:,} x {size}, {classes} classes", {})
        if not cpu:  # the first use of a GPU takes a second or more
            logreg.fit(Examples(X[:2000], y[:2000]), [str(c) for c in range(classes)], device=options.device)
        for place in ("cpu",) if cpu else ("gpu", "cpu"):
            begin = time.perf_counter()
            device = "cpu" if place == "cpu" else options.device
            fits[place] = logreg.fit(Examples(X, y), [str(c) for c in range(classes)], device=device)
            found[place] = time.perf_counter() - begin
            results.keep()
        if not cpu:
            weights = {place: fit.head.weight for place, fit in fits.items()}
            apart = np.abs(weights["gpu"] - weights["cpu"]).max() / np.abs(weights["cpu"]).max()
            same = fits["gpu"].info["strength"] == fits["cpu"].info["strength"]
            found |= {"difference": float(apart), "same strength": bool(same)}
            results.keep()


def decoding(options: argparse.Namespace, results: Results) -> None:
    """How near the pixels of the GPU's decoder are to Pillow's, and the features of both."""
    from decoding import compared, networks, saved_again

    from featx.pixels.preprocess import CLOSE

    files = saved_again(options.photos)
    made = networks(options.weights if options.weights.exists() else None)
    results["rows"] = []
    for way in ("bilinear", "bicubic"):
        for resize, chroma, network, count, apart, found in compared(files, way, options.device, made):
            row: dict[str, Any] = {"resize": resize, "chroma": chroma, "network": network, "images": count}
            row |= {"cosine": float(found.min()), "below": int((found < CLOSE).sum())}
            results["rows"].append(row | {"mean": float(apart.mean()), "largest": int(apart.max())})
        results.keep()


PARTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    part.__name__: part for part in (machine, tests, extraction, precision, solver, decoding)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="after which no round begins")
    options = parser.parse_args()
    options.until = time.perf_counter() + options.seconds
    options.photos = options.data / "data" / "hymenoptera_data"
    options.weights = options.data / "weights" / "squeezenet1_1-imagenet1k.pth"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as options.folder:
        PARTS[options.part](options, Results(options.results))


if __name__ == "__main__":
    main()
