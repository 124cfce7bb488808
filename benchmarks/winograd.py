"""What rewriting 3x3 convolutions gains on a CPU: each network as exported and as rewritten, in turns.

    python benchmarks/winograd.py [--networks resnet18 vgg16 ...] [--page docs/benchmarks/winograd.md]

Random weights, noise for pixels: speed depends on neither. Features are compared on the same noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from extraction import machine, say
from peers import BATCH, timed

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.engines.onnx import WORTH, OnnxEngine, accelerated, backbone_onnx
from featx.features import difference
from featx.records import read_record

NETWORKS = ("resnet18", "resnet34", "vgg16", "alexnet", "resnet50", "wide_resnet50_2", "squeezenet1_1", "inception_v3")
TEXT = """\
# Winograd's convolutions on a CPU

Written by `python benchmarks/winograd.py`: onnxruntime on the network as it is exported, and on the graph that featx
makes of it and runs ([featx/engines/winograd.py](../../featx/engines/winograd.py)); batches of {batch}, fp32, medians
of {rounds} rounds in turns. Random weights, noise for pixels. A graph stays as it is where no two convolutions of 3x3,
stride 1 and 128 channels or more are neighbours, and where featx measured less than {worth} times the speed when it
made the graph. *decided* has what it measured then, *took* the seconds of making, comparing and measuring.

{told}

| network | decided | took | as exported, images/s | as run | times as fast | features differ | file | as run |
|---|---|---|---|---|---|---|---|---|
{rows}

The difference of features is relative to their largest entry; 1e-5 is allowed. The first run makes the file, compares
it and measures; later runs read it.

## To whom it is worth its lines

To users of ResNet-18, ResNet-34, VGG and AlexNet at fp32 on processors without matrix instructions: on two idle cores
of an AMD EPYC (AVX2) this script found 1.34, 1.40, 1.55 and 1.12 times the speed. On a Xeon with AMX it found 1.26,
1.25, 1.34 and 1.13 on one day, and 0.91 to 1.11 in five of six comparisons on another. So no list of processors says
where it pays, and each measures it once. For ResNet-18 that takes 2.3 s of processor time on two cores, a second of it
timing; where a batch takes longer than that, one batch is timed.
"""


def row(name: str, rounds: int, folder: Path) -> str:
    request = BackboneRequest(name, weights="random")
    info = resolve(request, folder)
    plain = backbone_onnx(request, info, folder)
    begin = time.perf_counter()
    fast = accelerated(plain)
    took, size = time.perf_counter() - begin, plain.stat().st_size / 1e6
    (record,) = plain.parent.glob(f"{plain.stem}.winograd*.json")
    gain = next(iter(read_record(record)[0].get("gains", {}).values()), None)
    decided = f"| {name} | {'' if gain is None else f'{gain:.2f}'} | {took:.1f} s"
    if fast == plain:
        return f"{decided} | | stays | | | {size:.0f} MB | |"
    crop = info.preprocess.crop
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 3, crop, crop), dtype=np.uint8)
    engines = [OnnxEngine(path, BATCH) for path in (plain, fast)]

    def through(engine: OnnxEngine) -> np.ndarray:
        pieces = [engine.submit(images[i : i + BATCH]) for i in (0, BATCH)]  # as an extraction does: one ahead
        return np.concatenate([piece() for piece in pieces])

    apart = difference(through(engines[1]), through(engines[0]))
    runs = [timed(partial(through, engine)) for engine in engines]
    seconds = [[run() for run in runs] for _ in range(rounds)]
    before, after = (len(images) / statistics.median(times) for times in zip(*seconds, strict=True))
    found = statistics.median(a / b for a, b in seconds)
    return (
        f"{decided} | {before:.1f} | {after:.1f} | {found:.2f} | {apart:.1e} | {size:.0f} MB | "
        f"{fast.stat().st_size / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    rows = []
    told = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    for name in options.networks:
        say(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, options.rounds, Path(folder)))
    text = TEXT.format(batch=BATCH, worth=WORTH, rounds=options.rounds, told=told, rows="\n".join(rows))
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
