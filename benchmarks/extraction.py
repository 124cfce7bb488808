"""How fast images become features: featx against the usual loops, and against what this machine can do.

    python benchmarks/extraction.py --photos DIR [--networks resnet18 ...] [--rounds 5] [--peers FOLDER]

All in one process tree, taken in turns, medians. Random weights: speed does not depend on them. The
peers `img2vec-pytorch` and `thingsvision` are taken from FOLDER (`pip install --no-deps --target FOLDER
img2vec-pytorch thingsvision`: their own pins ask for versions that exclude each other's and featx's);
what else thingsvision imports and does not need here is replaced by empty modules.
Writes docs/benchmarks/extraction.md and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import BATCH, Run, img2vec, thingsvision, timed, timm_loop, trunk, tuned, tutorial
from PIL import Image

from featx import __version__
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneRequest
from featx.devices import available_threads
from featx.engines.opening import open_engine
from featx.extraction.job import prepare
from featx.extraction.pipeline import sync
from featx.features import content_key, difference
from featx.options import complete
from featx.pixels.preprocess import FAST, Preprocess
from featx.sources.opening import open_source
from featx.sources.source import Source

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
IMAGES = {"resnet18": 160, "resnet50": 64, "squeezenet1_1": 320}
TUTORIAL, TUNED = "tutorials' loop", "tuned loop"
PEERS = (TUTORIAL, "img2vec-pytorch", "thingsvision")
REDUCED = ("bf16", "int8")


def featx(folder: Path, name: str, cache: Path, **options: Any) -> Run:
    """One extraction into an empty cache that holds the exported backbone; opening the engine is not counted."""
    request = BackboneRequest(name, weights="random")

    def run() -> float:
        shutil.rmtree(cache / "features", ignore_errors=True)
        shutil.rmtree(cache / "memo", ignore_errors=True)
        report = sync(folder, request, cache=cache, **options).report
        assert report.cached == 0 and report.skipped == 0
        assert report.images_per_second is not None
        return report.extracted / report.images_per_second

    return run


def decode_alone(paths: list[Path]) -> Run:
    preprocess, source = Preprocess(), open_source(paths[0].parent.parent)

    def work() -> None:
        def one(i: int) -> None:
            data = source.read(i)
            content_key(data)
            preprocess(data)

        with ThreadPoolExecutor(available_threads()) as executor:
            for _ in executor.map(one, range(len(source))):
                pass

    return timed(work)


def model_alone(pixels: np.ndarray, folder: Path, name: str, cache: Path, **options: Any) -> Run:
    """featx's engine alone; it takes pixels from main memory, batch by batch. folder: int8 takes its ranges from it."""
    job = prepare(folder, BackboneRequest(name, weights="random"), complete({"cache": cache, **options}))
    engine = job.open_engine([])

    def work() -> None:
        last: Callable[[], Any] = lambda: None  # noqa: E731
        for start in range(0, len(pixels), engine.batch_size):
            running = engine.submit(pixels[start : start + engine.batch_size])
            last()
            last = running
        last()

    return timed(work)


def matrix_roof() -> Run:
    """Seconds of an fp32 product of 2048 x 2048 matrices, checked to be fp32: the machine may use bf16 instead."""
    torch.set_float32_matmul_precision("highest")
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    error = float((a @ b - (a.double() @ b.double())).abs().max() / (a.double() @ b.double()).abs().max())
    assert error < 1e-5, f"the product is off by {error:.1e}: not fp32"
    run = timed(lambda: [a @ b for _ in range(8)])
    return lambda: run() / 8


def operations(name: str) -> float:
    """Floating-point operations of one image: two for each multiplication of convolutions and Linears."""
    total = 0.0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output[0].numel() * module.weight[0].numel()

    network = trunk(name)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    return total


def repeated_photos(photos: Path, count: int, folder: Path) -> Source:
    """`count` files in `folder`; a repeated photograph gets extra bytes at its end, and so another key."""
    source = open_source(photos)
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        lap, which = divmod(i, len(source))
        (folder / "all" / f"{i:06d}{source.path(which).suffix}").write_bytes(source.read(which) + bytes(lap))
    return open_source(folder)


def in_turns(
    name: str, makers: dict[str, Callable[[], Run]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round of each contender, run once before; and why those are absent that do not run."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for label, make in makers.items():
        say(f"{name}: {label}")
        try:
            runs[label] = make()
            runs[label]()
        except Exception as error:  # reported, not measured
            runs.pop(label, None)
            absent[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(rounds):
        say(f"{name}: round {turn + 1} of {rounds}")
        for label, run in runs.items():
            seconds[label].append(run())
    return seconds, absent


def compare(name: str, photos: Path, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All contenders on one network, in turns."""
    data = repeated_photos(photos, count, folder / "data")
    paths = [data.path(i) for i in range(len(data))]
    preprocess = Preprocess()
    pixels = np.stack([preprocess(data.read(i)) for i in range(min(len(data), 128))])
    cache = folder / "cache"
    makers: dict[str, Callable[[], Run]] = {
        "featx": lambda: featx(folder / "data", name, cache),
        TUTORIAL: lambda: tutorial(paths, name),
        TUNED: lambda: tuned(paths, name),
        "timm": lambda: timm_loop(paths, name),
        "img2vec-pytorch": lambda: img2vec(paths, name),
        "thingsvision": lambda: thingsvision(paths, name),
        "decoding alone": lambda: decode_alone(paths),
        "onnxruntime alone": lambda: model_alone(pixels, folder / "data", name, cache),
        "matrix product": matrix_roof,
    }
    counts = {"onnxruntime alone": len(pixels), "matrix product": 2 * 2048**3 / 1e9}
    for p in REDUCED:
        makers[f"featx, {p}"] = partial(featx, folder / "data", name, cache, precision=p)
        makers[f"{p} alone"] = partial(model_alone, pixels, folder / "data", name, cache, precision=p)
        counts[f"{p} alone"] = len(pixels)
    seconds, absent = in_turns(name, makers, rounds)
    rates = {k: [counts.get(k, len(paths)) / s for s in v] for k, v in seconds.items()}
    request = BackboneRequest(name, weights="random")
    backbone = load_backbone(request)
    with torch.inference_mode():
        eager = backbone.module(torch.from_numpy(pixels[:BATCH])).numpy()
    rows = open_engine(request, backbone.info, cache=cache)(pixels[:BATCH])
    return {
        "images": len(paths),
        "rates": rates,
        "absent": absent,
        "gflop": operations(name) / 1e9,
        "difference": difference(rows, eager),
    }


def start_up(name: str, photos: Path, folder: Path) -> dict[str, float]:
    """Seconds of whole `featx extract` commands on 32 photographs, in processes of their own."""
    data = folder / "few" / "all"
    data.mkdir(parents=True)
    source = open_source(photos)
    for i in range(BATCH):
        shutil.copy(source.path(i), data)
    cache = folder / "start"
    command = [sys.executable, "-m", "featx", "extract", str(data.parent), "--backbone", name]
    command += ["--weights", "random", "--cache", str(cache)]
    seconds: dict[str, list[float]] = {"nothing at hand": [], "exported backbone at hand": []}
    for _ in range(3):
        for kind, gone in (("nothing at hand", cache), ("exported backbone at hand", cache / "features")):
            shutil.rmtree(gone, ignore_errors=True)
            begin = time.perf_counter()
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            seconds[kind].append(time.perf_counter() - begin)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def fast_decoding(photos: Path, cache: Path) -> list[dict[str, Any]]:
    """What `--decode fast` gains and changes, on the photographs that are large enough for it."""
    exact, fast = Preprocess(), Preprocess(pixels=FAST)
    source = open_source(photos)
    request = BackboneRequest("resnet18", weights="random")
    engine = open_engine(request, resolve(request, cache), cache=cache)
    found = []
    for i in range(len(source)):
        data = source.read(i)
        if not data.startswith(b"\xff\xd8") or not exact.shrinks(data, Image.open(source.path(i)).size):
            continue
        runs = {p.pixels: timed(partial(p, data)) for p in (exact, fast)}
        times = {name: statistics.median(run() for _ in range(9)) for name, run in runs.items()}
        a, b = exact(data), fast(data)
        rows = engine(np.stack([a, b])).astype(np.float64)
        apart = np.abs(a.astype(int) - b.astype(int))
        found.append(
            {
                "size": " x ".join(map(str, Image.open(source.path(i)).size)),
                "exact": 1000 * times[exact.pixels],
                "fast": 1000 * times[fast.pixels],
                "mean": float(apart.mean()),
                "max": int(apart.max()),
                "cosine": float(rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])),
            }
        )
    return found


def version(package: str) -> str:
    """featx may run from its checkout, and timm is not needed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return __version__ if package == "featx" else "not installed"


def machine() -> dict[str, str]:
    names: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            names.setdefault(key.strip(), value.strip())
    flags = names.get("flags", "").split()
    kinds = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in flags]
    packages = ("featx", "torch", "torchvision", "timm", "onnxruntime", "openvino", "numpy", "pillow")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("OPENBLAS", "OMP", "MKL", "NVPL"))]
    return {
        "processor": f"{names.get('model name', platform.processor())}, {available_threads()} cores, {' '.join(kinds)}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
        "BLAS environment": ", ".join(variables) or "nothing set",
        "load before": " ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


def bound(rates: dict[str, list[float]], whole: str, alone: str) -> float:
    """The share of 1 / (1/decode + 1/model) that the whole pipeline reaches, the median of the rounds."""
    rounds = zip(rates[whole], rates["decoding alone"], rates[alone], strict=True)
    return statistics.median(f * (1 / d + 1 / m) for f, d, m in rounds)


def reduced(rates: dict[str, list[float]], precision: str) -> str:
    """What less than fp32 gains, in a sentence."""
    mine = rates[f"featx, {precision}"]
    times = ", ".join(
        f"{statistics.median(a / b for a, b in zip(mine, rates[peer], strict=True)):.2f} times {peer}"
        for peer in ("featx", *PEERS)
        if peer in rates
    )
    share = bound(rates, f"featx, {precision}", f"{precision} alone")
    return f"- In {precision}: {times}; {share:.0%} of its own 1 / (1/decode + 1/model)."


def page(results: dict[str, Any]) -> str:
    """The report, in Markdown."""
    out = ["# Extraction: how fast images become features", ""]
    out += ["Written by `python benchmarks/extraction.py`; random weights, real photographs (0.2 megapixels, 120 KB),"]
    out += [f"batches of {BATCH}, medians of {results['rounds']} rounds in turns, one process tree, 224 px, fp32.", ""]
    out += [
        "Where the load before is above the number of cores, other work shared the machine: read the ratios, not the"
    ]
    out += ["rates. No GPU is used.", ""]
    out += [f"- {key}: {value}" for key, value in results["machine"].items()]
    out += ["", "![images per second](extraction.png)", ""]
    for name, result in results["networks"].items():
        rates = {label: statistics.median(values) for label, values in result["rates"].items()}
        out += [f"## {name}", "", f"{result['images']} images a round.", ""]
        out += ["| | images/s (least - most) | featx is |", "|---|---|---|"]
        for label, values in result["rates"].items():
            if label != "matrix product":
                ratio = statistics.median(f / v for f, v in zip(result["rates"]["featx"], values, strict=True))
                times = "" if label == "featx" or label.endswith("alone") else f"{ratio:.2f} times as fast"
                out.append(f"| {label} | {rates[label]:.1f} ({min(values):.1f} - {max(values):.1f}) | {times} |")
        out += [f"| {label} | not measured | {why} |" for label, why in result["absent"].items()]
        shares = bound(result["rates"], "featx", "onnxruntime alone")
        roof = rates["matrix product"]
        alone, whole = (rates[label] * result["gflop"] / roof for label in ("onnxruntime alone", "featx"))
        out += [
            "",
            f"- Against 1 / (1/decode + 1/model), each alone on all cores: {shares:.0%}.",
            *(reduced(result["rates"], p) for p in REDUCED if f"featx, {p}" in result["rates"]),
            f"- The network is {result['gflop']:.2f} GFLOP an image by direct convolution; an fp32 matrix product runs "
            f"at {roof:.0f} GFLOP/s. The model alone reaches {alone:.0%} of that, the whole pipeline {whole:.0%}; more "
            "than 100% is possible, since Winograd's convolutions multiply less.",
            f"- Features differ from eager torch by {result['difference']:.1e} of their largest entry.",
            "",
        ]
    out += ["## Start-up", "", "The whole command `featx extract` on 32 photographs, medians of 3.", ""]
    out += ["| | nothing at hand | exported backbone at hand |", "|---|---|---|"]
    for name, seconds in results["start"].items():
        out.append(f"| {name} | " + " | ".join(f"{value:.1f} s" for value in seconds.values()) + " |")
    out += ["", "## `--decode fast`", ""]
    out += ["Large JPEGs decoded at 1/2, 1/4 or 1/8 of their size, on one core; pixels in levels of 255, features"]
    out += ["of a ResNet-18. Only images whose short side has 1024 pixels or more change at all.", ""]
    out += ["| photograph | exact | fast | mean difference | largest | cosine of the features |"]
    out += ["|---|---|---|---|---|---|"]
    for row in results["fast"]:
        out.append(
            f"| {row['size']} | {row['exact']:.1f} ms | {row['fast']:.1f} ms | {row['mean']:.2f} | {row['max']} "
            f"| {row['cosine']:.5f} |"
        )
    return "\n".join([*out, ""])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = results["networks"]
    figure, axes = plt.subplots(1, len(networks), figsize=(3.2 * len(networks), 2.6), squeeze=False)
    for axis, (name, result) in zip(axes[0], networks.items(), strict=True):
        rates = {k: statistics.median(v) for k, v in result["rates"].items() if k != "matrix product"}
        limit = 1 / (1 / rates.pop("decoding alone") + 1 / rates.pop("onnxruntime alone"))
        rates = {label: rate for label, rate in rates.items() if not label.endswith(" alone")}
        labels = list(rates)[::-1]
        colours = ["#1f77b4" if label.startswith("featx") else "#bbbbbb" for label in labels]
        axis.barh(labels, [rates[label] for label in labels], color=colours)
        axis.axvline(limit, color="black", linestyle=":", linewidth=1)
        axis.set_title(f"{name}, images/s", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.text(0.99, 0.01, "dotted: decoding and model alone, costs added", ha="right", fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=90)


def write(results: dict[str, Any], output: Path, raw: Path | None) -> None:
    """The page, the plot, and the raw figures where they are wanted."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "extraction.md").write_text(page(results))
    with tempfile.TemporaryDirectory() as folder:
        raw = raw or Path(folder) / "raw.json"
        raw.write_text(json.dumps(results, indent=1))
        # in a process without the peers, whose stand-ins confuse matplotlib
        subprocess.run([sys.executable, __file__, "--draw", str(raw), "--output", str(output)], check=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a data set of photographs")
    parser.add_argument("--networks", nargs="*", default=list(IMAGES))
    parser.add_argument("--images", type=int, help="in each round; by default 5 to 10 s of the slowest loop's work")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="the folder that the peers were installed to")
    parser.add_argument("--json", type=Path, help="where the raw figures go")
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument("--draw", type=Path, help="draw the plot of raw figures, and measure nothing")
    options = parser.parse_args()
    if options.draw:
        plot(json.loads(options.draw.read_text()), options.output / "extraction.png")
        return
    if not options.photos:
        parser.error("--photos is missing")
    if options.peers:
        sys.path.append(str(options.peers))
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(available_threads())
    results: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "networks": {}, "start": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in options.networks:
            results["networks"][name] = compare(
                name, options.photos, options.images or IMAGES.get(name, 320), options.rounds, folder / name
            )
            results["start"][name] = start_up(name, options.photos, folder / name)
        results["fast"] = fast_decoding(options.photos, folder / "fast")
    write(results, options.output, options.json)
    print(page(results))


if __name__ == "__main__":
    main()
