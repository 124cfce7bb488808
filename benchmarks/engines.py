"""What each engine costs beside its speed: the peak memory of an extraction, and the seconds to open it.

    python benchmarks/engines.py PHOTOS [--networks resnet18 ...] [--page docs/benchmarks/engines.md]

Each engine runs in a process of its own, by turns, over an exported backbone that is at hand: onnxruntime in fp32, and
OpenVINO in bf16, or in fp32 where the processor has no bf16.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from extraction import machine, say

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.devices import arithmetic
from featx.engines.engine import Engine
from featx.engines.onnx import OnnxEngine, accelerated, backbone_onnx
from featx.engines.openvino import OpenVinoEngine
from featx.extraction.pipeline import sync

OPENVINO = "bf16" if "bf16" in arithmetic() else "fp32"
TEXT = """\
# Engines: memory and start-up

Written by `python benchmarks/engines.py`: an extraction of {images} photographs in a process of its own, medians of
{rounds} rounds by turns; random weights, the exported backbone at hand. Nothing of OpenVINO's compiled model is kept:
reading it back takes as long as compiling.

{told}

| network | engine | peak memory | of onnxruntime's | opened in |
|---|---|---|---|---|
{rows}
"""


def measure(photos: Path, name: str, cache: Path, engine: str) -> None:
    """One extraction in this process; prints its peak and the seconds that opening took."""
    request = BackboneRequest(name, weights="random")
    model = backbone_onnx(request, resolve(request, cache), cache)
    begin = time.perf_counter()
    opened: Engine = OnnxEngine(accelerated(model)) if engine == "onnxruntime" else OpenVinoEngine(model, OPENVINO)
    seconds = time.perf_counter() - begin
    sync(photos, request, cache=cache, engine=opened)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": peak, "opening": seconds}))


def rows(photos: Path, name: str, rounds: int) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {"onnxruntime": [], "openvino": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        request = BackboneRequest(name, weights="random")
        accelerated(backbone_onnx(request, resolve(request, cache), cache))
        for _ in range(rounds):
            for engine, values in found.items():
                shutil.rmtree(cache / "features", ignore_errors=True)
                command = [sys.executable, __file__, str(photos), "--networks", name, "--one", engine, str(cache)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                values.append(json.loads(done.stdout.splitlines()[-1]))

    peaks, openings = (
        {engine: statistics.median(value[what] for value in values) for engine, values in found.items()}
        for what in ("peak", "opening")
    )
    return [
        f"| {name} | {engine}, {'fp32' if engine == 'onnxruntime' else OPENVINO} | {peak:.0f} MiB | "
        f"{peak / peaks['onnxruntime']:.2f} | {openings[engine]:.2f} s |"
        for engine, peak in peaks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="*", default=["resnet18", "resnet50", "squeezenet1_1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        measure(options.photos, options.networks[0], Path(options.one[1]), options.one[0])
        return
    lines: list[str] = []
    for name in options.networks:
        say(name)
        lines += rows(options.photos, name, options.rounds)
    told = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    images = sum(1 for path in options.photos.rglob("*") if path.is_file())
    text = TEXT.format(images=images, rounds=options.rounds, told=told, rows="\n".join(lines))
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
