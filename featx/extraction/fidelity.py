"""Less than fp32, measured here: how far its features are from fp32's, and how much time it would save."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache.writing import Writer
from featx.devices import arithmetic, available_threads, choose_device
from featx.engines.engine import Engine, measure_speed
from featx.engines.onnx import OnnxEngine, accelerated, backbone_onnx
from featx.engines.openvino import X86, OpenVinoEngine, installed
from featx.errors import ExportError, FeatxError
from featx.extraction.job import Job
from featx.extraction.loader import Loader
from featx.features import cosines, distances
from featx.records import read_record, write_record

IMAGES = 16
"""Images that are computed in fp32 as well."""
WORTH = 0.8  # of the time, or less


def fidelity(job: Job, engine: Engine, stores: Sequence[Writer], numbers: np.ndarray) -> str:
    """How far this engine's rows are from fp32's, on the first of these images, as a sentence. numbers: `int [M]`.

    Empty where no image can be read, and for a network that onnxruntime cannot run in fp32.
    """
    loader = Loader(job.source, job.info.preprocess, stores[:1], job.threads)
    with closing(loader(numbers[:IMAGES])) as images:
        pixels = np.array([image.views[0][1] for image in images if image.views])
    if not len(pixels):
        return ""

    try:
        trusted = OnnxEngine(backbone_onnx(job.request, job.info, job.cache))
    except ExportError:
        return ""
    with closing(trusted):
        rows, reference = (
            np.concatenate([run(pixels[i : i + run.batch_size]) for i in range(0, len(pixels), run.batch_size)])
            for run in (engine, trusted)
        )
    apart = distances(rows.reshape(len(rows), -1), reference.reshape(len(rows), -1))
    return (
        f"{job.specs[0].precision} features of {len(rows)} images are {np.median(apart):.2%} of their length from "
        f"fp32's at the median, {apart.max():.2%} at most; smallest cosine {cosines(rows, reference).min():.5f}"
    )


def faster(job: Job, rate: float | None, native: frozenset[str] | None = None) -> str:
    """What bf16 would save on this machine, as a sentence; empty where that is nothing.

    Both engines run for a second, once: the cache remembers it. rate: images per second in fp32, from file to row.
    native: what the processor multiplies, in place of `featx.devices.arithmetic()`.
    """
    native = arithmetic() if native is None else native
    if job.specs[0].precision != "fp32" or not rate or "bf16" not in native or choose_device(job.device) != "cpu":
        return ""
    if not installed():
        said = "this processor multiplies bf16: --precision bf16 may be faster, most of all after"
        return f'{said} pip install "featx[openvino]"' if platform.machine() in X86 else ""
    speeds = _speeds(job, native)
    if not speeds:
        return ""
    rest = max(0.0, 1 / rate - 1 / speeds["fp32"])  # on a CPU the stages' costs add
    share = rate * (rest + 1 / speeds["bf16"])
    if not share < WORTH:
        return ""
    also = "; it multiplies int8, too (--precision int8)" if "int8" in native else ""
    return (
        f"this processor multiplies bf16: --precision bf16 would take about {share:.0%} of the time "
        f"(measured: the backbone runs {speeds['bf16']:.0f} images/s, {speeds['fp32']:.0f} in fp32){also}"
    )


def rates_path(job: Job, *kind: Any) -> Path:
    """Where a rate of this kind is remembered, for this job's features and this machine."""
    known = [*kind, [spec.digest for spec in job.specs], available_threads(), platform.node()]
    return job.cache / "rates" / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.json"


def _speeds(job: Job, native: frozenset[str]) -> dict[str, float]:
    """Images per second of the backbone alone, in `fp32` and `bf16`; empty where either cannot run."""
    path = rates_path(job, "backbone", sorted(native))
    with contextlib.suppress(OSError, ValueError):
        return read_record(path, dict[str, float])[0]
    speeds = {}
    try:
        model = backbone_onnx(job.request, job.info, job.cache)
        for precision in ("fp32", "bf16"):
            engine = OnnxEngine(accelerated(model)) if precision == "fp32" else OpenVinoEngine(model, precision)
            with closing(engine):
                speeds[precision] = measure_speed(engine, job.info.preprocess.crop)
    except FeatxError as error:  # no export, or OpenVINO does not take this processor's bf16
        warnings.warn(f"bf16 is not measured: {error}", RuntimeWarning, stacklevel=2)
        return {}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run a measurement
        write_record(path, speeds)
    return speeds
