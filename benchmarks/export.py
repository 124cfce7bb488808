"""What an exported file costs: latency and throughput beside torch and OpenVINO, int8, predict, grafting a head.

    python benchmarks/export.py --photos FOLDER [--networks resnet18 ...] [--json FILE] [--markdown FILE]

FOLDER holds class folders of photographs. Weights are random: speed does not depend on them. All engines
take `uint8` pixels and run by turns on all cores; each figure is the best of `--rounds`, since whatever
else the machine does can only slow it down. OpenVINO is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featx import fit
from featx.backbones.loading import load_backbone, resolve
from featx.engines.int8 import quantized
from featx.engines.onnx import backbone_onnx
from featx.head import Head
from featx.runs import open_run
from featx.shipping import graph, prediction, reduction
from featx.shipping.deployed import Model, open_session
from featx.shipping.exporting import export
from featx.shipping.gate import batches, gate_images

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1")
BATCHES = (1, 32)


def best(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest seconds of each, taken in turns."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, one in work.items():
            begin = time.perf_counter()
            one()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def engines(name: str, run: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of network, engine, batch, milliseconds and images per second."""
    opened = open_run(run)
    cache, request = Path(opened.config.cache), opened.request
    info = resolve(request, cache)
    crop = info.preprocess.crop
    source = backbone_onnx(request, info, cache)
    model = graph.build(graph.load(source), opened.head, info.preprocess, input="tensor", outputs=("probabilities",))
    images = batches(gate_images(opened, reduction.CALIBRATION, "train"))
    small = quantized(source, (np.stack([crop for _, crop in batch]) for batch in images))
    int8 = graph.build(
        graph.parse(small, source), opened.head, info.preprocess, input="tensor", outputs=("probabilities",)
    )
    data, int8_data = model.SerializeToString(), int8.SerializeToString()

    module = load_backbone(request).module.eval()
    weight, bias = (torch.from_numpy(x) for x in (opened.head.weight, opened.head.bias))

    def eager(pixels: torch.Tensor) -> None:
        with torch.inference_mode():
            torch.softmax(module(pixels) @ weight.T + bias, dim=1)

    sessions = {"ONNX fp32": open_session(data), "ONNX int8": open_session(int8_data)}
    compiled = {}
    for hint in ("LATENCY", "THROUGHPUT"):
        compiled[hint] = openvino_of(data, hint)
    for batch in BATCHES:
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, crop, crop), dtype=np.uint8)
        tensor = torch.from_numpy(pixels)
        work: dict[str, Callable[[], object]] = {"torch eager": partial(eager, tensor)}
        for label, session in sessions.items():
            work[label] = partial(session.run, None, {"images": pixels})
        vino = compiled["LATENCY"]
        if vino is not None:
            work["OpenVINO fp32"] = partial(vino, {"images": pixels})
        seconds = best(work, 1 if rounds < 2 else rounds * (4 if batch == 1 else 1))
        for label, value in seconds.items():
            yield {
                "network": name,
                "engine": label,
                "batch": batch,
                "ms": round(1000 * value, 2),
                "images_per_second": round(batch / value, 1),
                "bytes": len(int8_data) if "int8" in label else len(data),
            }


def openvino_of(data: bytes, hint: str) -> Any:
    """The same file in OpenVINO, in fp32 (its own default is bf16 where the processor has it); None without it."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(model=data), "CPU", settings)


def end_to_end(name: str, file: Path, photos: list[Path], rounds: int) -> dict[str, Any]:
    """predict beside its two halves, each alone on all cores."""
    model = Model(file)
    workers = os.cpu_count() or 1
    batches = [photos[i : i + 32] for i in range(0, len(photos), 32)]
    decoded = np.stack([prediction.pixels(model, path) for path in batches[0]])

    def decode() -> None:
        with ThreadPoolExecutor(workers) as executor:
            for batch in batches:
                list(executor.map(lambda path: prediction.pixels(model, path), batch))

    def compute() -> None:
        for batch in batches:
            model(decoded[: len(batch)])

    def predict() -> None:
        assert sum(p.error is None for p in prediction.predict(model, photos)) == len(photos)

    predict()
    seconds = best({"decode": decode, "model": compute, "predict": predict}, rounds)
    rates = {key: len(photos) / value for key, value in seconds.items()}
    bound = 1 / (1 / rates["decode"] + 1 / rates["model"])
    return {
        "network": name,
        **{key: round(rate, 1) for key, rate in rates.items()},
        "bound": round(bound, 1),
        "ratio": round(rates["predict"] / bound, 3),
    }


def graft(name: str, run: Path, rounds: int) -> dict[str, Any]:
    """Export again with another head, the backbone being verified: from the call to the file on the disk."""
    opened = open_run(run)
    head = opened.head
    seconds = []
    for i in range(max(3, rounds)):
        other = Head(head.weight * (1 - 0.01 * i), head.bias, head.class_names)
        begin = time.perf_counter()
        assert export(replace(opened, head=other), images=64).method == "head"
        seconds.append(time.perf_counter() - begin)
    size = (run / "model.onnx").stat().st_size
    return {"network": name, "seconds": round(min(seconds), 3), "first": round(seconds[0], 3), "bytes": size}


def environment() -> dict[str, Any]:
    names = ("torch", "onnx", "onnxruntime", "openvino", "numpy", "pillow")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed: not measured"
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
        **{name: os.environ[name] for name in variables if name in os.environ},
    }


def markdown(results: dict[str, Any], command: str) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    lines = ["# Exported files", "", f"`{command}`", "", machine + ".", ""]
    lines += ["Best of several rounds, engines by turns, all cores, `uint8` pixels in, probabilities out.", ""]
    engines = list(dict.fromkeys(row["engine"] for row in results["engines"]))
    cells = {(r["network"], r["engine"], r["batch"]): r for r in results["engines"]}
    for batch, title, key in ((1, "Latency at batch 1, ms", "ms"), (32, "Images/s at batch 32", "images_per_second")):
        lines += [f"## {title}", "", f"| network | {' | '.join(engines)} |", "|---" * (len(engines) + 1) + "|"]
        for name in dict.fromkeys(row["network"] for row in results["engines"]):
            values = [str(cells[name, engine, batch][key]) for engine in engines]
            lines.append(f"| {name} | {' | '.join(values)} |")
        lines.append("")
    lines += ["## Size of the file, MB", "", "| network | fp32 | int8 |", "|---|---|---|"]
    for name in dict.fromkeys(row["network"] for row in results["engines"]):
        sizes = [cells[name, engine, 1]["bytes"] / 1e6 for engine in ("ONNX fp32", "ONNX int8")]
        lines.append(f"| {name} | {sizes[0]:.1f} | {sizes[1]:.1f} |")
    lines += ["", "## predict, from files to labels, images/s", ""]
    lines += ["| network | decode alone | model alone | bound 1/(1/decode + 1/model) | predict | of the bound |"]
    lines += ["|---|---|---|---|---|---|"]
    for r in results["predict"]:
        lines.append(
            f"| {r['network']} | {r['decode']} | {r['model']} | {r['bound']} | {r['predict']} | {r['ratio']:.2f} |"
        )
    lines += ["", "## Another head into a verified file, seconds", ""]
    lines += ["| network | first | best | file, MB |", "|---|---|---|---|"]
    for r in results["graft"]:
        lines.append(f"| {r['network']} | {r['first']} | {r['seconds']} | {r['bytes'] / 1e6:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    photos = [Path(str(path)) for path in prediction.expand(arguments.photos)]
    results: dict[str, Any] = {"environment": environment(), "engines": [], "predict": [], "graft": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            run = Path(folder) / name
            fit(arguments.photos, name, weights="random", cache=Path(folder) / "cache", output=run)
            export(run, images=64)
            results["engines"] += engines(name, run, arguments.rounds)
            results["predict"].append(end_to_end(name, run / "model.onnx", photos, max(2, arguments.rounds // 2)))
            results["graft"].append(graft(name, run, arguments.rounds))
            print(name, json.dumps(results["engines"][-8:]), results["predict"][-1], results["graft"][-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.markdown:
        networks = f" --networks {' '.join(arguments.networks)}" if arguments.networks != list(NETWORKS) else ""
        command = f"python benchmarks/export.py --photos FOLDER{networks} --rounds {arguments.rounds}"
        arguments.markdown.write_text(markdown(results, command))


if __name__ == "__main__":
    main()
