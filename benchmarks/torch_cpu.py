"""Networks that only torch can run, on a CPU: what compiling them brings, what it costs, from how many images it pays.

    python benchmarks/torch_cpu.py [--networks resnet18 ...] [--rounds 5] [--page docs/benchmarks/torch-cpu.md]

Ordinary networks stand in for those that cannot be exported. Random weights, noise for pixels. Each way is prepared
in turn, its seconds until the first rows counted; then all take turns. A C++ compiler must be there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extraction import machine, say
from peers import BATCH
from torch import nn

from featx.backbones.loading import load_backbone
from featx.backbones.request import BackboneRequest
from featx.devices import available_threads
from featx.engines.torch import CpuEngine
from featx.features import difference
from featx.state import ordinary

BRANCHING = "resnet18 with a branch"
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1", "densenet121", BRANCHING)
TODAY = "as a short run has it"
TEXT = """\
# Torch on a CPU: does compiling pay?

Written by `python benchmarks/torch_cpu.py`. Where a network cannot be exported, torch runs it, channels-last and with
batch norm folded, and compiled in a long run ([featx/engines/torch.py](../../featx/engines/torch.py)). Here networks
that can be exported stand in for those, on fixed batches of {batch}, fp32, medians of {rounds} rounds in turns. *start*
has the seconds until the first rows; *pays from* is the number of images whose saving equals what the start costs more.

{told}

| network | way | images/s | times as fast | start | pays from | features differ |
|---|---|---|---|---|---|---|
{rows}

## What follows

From 1,000 images per thread on, featx compiles such a network with frozen weights, in fp32 (`CpuEngine.compile`). That
is about twice the number from which it paid here; more threads make the images faster, but not the compiler. It needs a
C++ compiler. Where there is none, where compiling fails, or where rows would differ by more than 1e-5, a warning says
why and the network runs as before. What the compiler writes lies aside in `cache/engines` and is gone when the engine
is open, so each run compiles anew. Rows of short and long runs differ in their last bits, within the tolerance of the
cache. TorchScript and plain `torch.compile` bring less. Compiling in bf16 was not measured and is not done.
"""


def compiled(engine: CpuEngine) -> None:
    """torch.compile of the prepared module, for batches of one size."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(fx_graph_cache=False):
        engine.module = torch.compile(engine.module, dynamic=False)
        engine(np.zeros((1, *engine.images.shape[1:]), np.uint8))


def constants(engine: CpuEngine) -> None:
    """torch.compile with frozen weights, as featx does it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="error"):
        engine.compile(Path(folder))


def frozen(engine: CpuEngine) -> None:
    """TorchScript, frozen and prepared for inference: weights packed for oneDNN."""
    with torch.inference_mode(False), torch.no_grad():
        traced = torch.jit.trace(engine.module, engine.images)  # type: ignore[no-untyped-call]
        engine.module = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        for _ in range(3):  # it optimises itself in the first calls
            engine.module(engine.images)


WAYS: dict[str, Callable[[CpuEngine], None]] = {
    TODAY: lambda engine: None,
    "torch.compile": compiled,
    "torch.compile, frozen weights": constants,
    "TorchScript, frozen": frozen,
}


class Branch(nn.Module):
    """Asks for values on the way: what keeps real networks from being exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.mean() > -1e30) else -x


@ordinary()
def rows(name: str, rounds: int) -> list[str]:
    backbone = load_backbone(BackboneRequest(name.split()[0], weights="random"))
    if name == BRANCHING:
        network: Any = backbone.module.network
        network.layer2.append(Branch())
    crop = backbone.info.preprocess.crop
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 3, crop, crop), dtype=np.uint8)
    with torch.inference_mode():
        eager = backbone.module(torch.from_numpy(images)).numpy()

    engines: dict[str, CpuEngine] = {}
    starts, apart, lines = {}, {}, []
    for way, prepare in WAYS.items():
        say(f"{name}: {way}")
        begin = time.perf_counter()
        try:
            engine = CpuEngine(backbone, "fp32", BATCH, available_threads())
            prepare(engine)
            engines[way], found = engine, engine(images)
            starts[way], apart[way] = time.perf_counter() - begin, difference(found, eager)
        except Exception as error:  # reported, not measured
            lines.append(f"| {name} | {way} | does not run: {type(error).__name__} | | | | |")

    seconds: dict[str, list[float]] = {way: [] for way in engines}
    for _ in range(rounds):
        for way, engine in engines.items():
            begin = time.perf_counter()
            engine(images)
            seconds[way].append(time.perf_counter() - begin)
    one = {way: statistics.median(times) / BATCH for way, times in seconds.items()}
    for way in engines:
        gain = statistics.median(a / b for a, b in zip(seconds[TODAY], seconds[way], strict=True))
        saved, cost = one[TODAY] - one[way], starts[way] - starts[TODAY]
        pays = "" if way == TODAY else f"{max(0, cost) / saved:,.0f}" if saved > 0 else "never"
        lines.append(
            f"| {name} | {way} | {1 / one[way]:.1f} | {gain:.2f} | {starts[way]:.1f} s | {pays} | {apart[way]:.1e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    told = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    lines = []
    for name in options.networks:
        lines += rows(name, options.rounds)
        say("\n".join(lines))
    text = TEXT.format(batch=BATCH, rounds=options.rounds, told=told, rows="\n".join(lines))
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
