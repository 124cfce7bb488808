"""What each engine costs beside its speed: the peak memory of an extraction, and the seconds to open it.

    python benchmarks/engines.py PHOTOS [--networks resnet18 ...] [--page docs/benchmarks/engines.md]

Each engine runs in a process of its own, by turns, over an exported backbone that is at hand: onnxruntime in fp32, and
OpenVINO in bf16, or in fp32 where the processor has no bf16.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from featx.backbones.request import BackboneRequest
from featx.devices import arithmetic
from featx.engines.engine import Engine
from featx.engines.onnx import OnnxEngine, accelerated, backbone_onnx
from featx.engines.openvino import OpenVinoEngine
from featx.extraction.job import Job, prepare
from featx.extraction.pipeline import run
from featx.options import complete

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


def measure(pickled: Path, engine: str) -> None:
    """One extraction in this process, without torch; prints its peak and the seconds that opening took."""
    job: Job = pickle.loads(pickled.read_bytes())
    model = backbone_onnx(job.request, job.info, job.cache)
    begin = time.perf_counter()
    opened: Engine = OnnxEngine(accelerated(model)) if engine == "onnxruntime" else OpenVinoEngine(model, OPENVINO)
    seconds = time.perf_counter() - begin
    run(job, opened)
    assert "torch" not in sys.modules
    # not getrusage, whose peak counts the process that started this one
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"peak": peak, "opening": seconds}))


def rows(photos: Path, name: str, rounds: int) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {"onnxruntime": [], "openvino": []}
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "job"
        job = prepare(photos, BackboneRequest(name, weights="random"), complete({"cache": folder}))
        pickled.write_bytes(pickle.dumps(job))
        accelerated(backbone_onnx(job.request, job.info, job.cache))
        for _ in range(rounds):
            for engine, values in found.items():
                shutil.rmtree(job.cache / "features", ignore_errors=True)
                command = [sys.executable, __file__, str(photos), "--one", engine, str(pickled)]
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
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        measure(Path(options.one[1]), options.one[0])
        return
    from extraction import machine, say  # which imports torch

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
