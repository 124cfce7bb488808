"""Choose the engine that runs a backbone here, and open it; torch is imported only to run."""

from __future__ import annotations

import warnings
from pathlib import Path

from featx.backbones.loading import loaded
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import choose_device
from featx.engines.engine import CPU_BATCH, Engine
from featx.engines.onnx import OnnxEngine, accelerated, backbone_onnx
from featx.errors import ExportError, FeatxError
from featx.features import TOLERANCE
from featx.state import ordinary


@ordinary()
def open_engine(
    request: BackboneRequest,
    info: BackboneInfo,
    *,
    cache: Path,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open the engine that runs this backbone here. A fixed rule chooses it, since it decides a row's last bits.

    On a GPU torch; on a CPU onnxruntime for fp32, torch for bf16 and where the export fails.

    device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:1`. precision: `fp32`, `bf16`, or
    `fp16` on a GPU. batch_size: 32 on a CPU; on a GPU the largest of 256, 128, ... that fits its memory.
    engine: the name of the one that filled a store. threads: for the arithmetic on a CPU, by default one per core.

    Raises `FeatxError` for an unknown precision, fp16 on a CPU, a device that is not here, and where another
    engine than `engine` would run.
    """
    if precision not in TOLERANCE:
        raise FeatxError(f"precision is one of {', '.join(TOLERANCE)}, not {precision!r}")

    by_cpu = device == "auto" and engine in ("onnxruntime", "torch-cpu")
    place = "cpu" if by_cpu else choose_device(device)
    if place == "cpu" and precision == "fp16":
        raise FeatxError("fp16 is for GPUs and slow on a CPU; use bf16 or fp32")
    torch_cpu = precision == "bf16" or engine == "torch-cpu"
    name = "torch-cuda" if place != "cpu" else "torch-cpu" if torch_cpu else "onnxruntime"
    if engine is not None and engine != name:
        needs = {"torch-cuda": "a GPU", "torch-cpu": "--device cpu", "onnxruntime": "--device cpu"}
        raise FeatxError(_mismatch(engine, name, needs.get(engine, "that engine")))

    if name == "onnxruntime":
        try:
            return OnnxEngine(accelerated(backbone_onnx(request, info, cache)), batch_size, threads)
        except ExportError as error:
            if engine is not None:
                mismatch = _mismatch(engine, "torch-cpu", "the versions that exported it")
                raise FeatxError(f"{error}; {mismatch}") from error
            warnings.warn(f"{error}; torch runs it instead, slower", RuntimeWarning, stacklevel=2)
    from featx.engines.torch import CpuEngine, CudaEngine

    backbone = loaded(request, info)
    if name == "torch-cuda":
        return CudaEngine(backbone, place, precision, batch_size)
    return CpuEngine(backbone, precision, batch_size or CPU_BATCH, threads)


def _mismatch(engine: str, name: str, needs: str) -> str:
    return (
        f"the features in the cache come from the engine {engine}, and here {name} would run, whose rows differ in "
        f"their last bits; use {needs}, another --cache, or remove these features first (featx cache remove)"
    )
