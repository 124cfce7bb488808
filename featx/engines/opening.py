"""Chooses what runs a backbone here, and opens it; imports no torch to choose."""

from __future__ import annotations

import warnings
from pathlib import Path

from featx.backbones.loading import loaded
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import choose_device
from featx.engines.engine import CPU_BATCH, ENGINES, Engine
from featx.errors import FeatxError
from featx.features import TOLERANCE


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
    """Open what runs this backbone here: a rule, not a measurement, since it decides a row's last bits.

    On a GPU torch; on a CPU onnxruntime for fp32, torch for bf16 and where the export fails.

    device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:1`. precision: `fp32`, `bf16`, or
    `fp16` on a GPU. batch_size: 32 on a CPU; on a GPU the largest of 256, 128, ... that fits its memory.
    engine: the one of `ENGINES` that filled a store; where it is not what would run here, `FeatxError` is
    raised before anything is opened. threads: of the arithmetic on a CPU, by default one a core.
    """
    if precision not in TOLERANCE:
        raise FeatxError(f"precision is one of {', '.join(TOLERANCE)}, not {precision!r}")
    if engine is not None and engine not in ENGINES:
        raise FeatxError(f"engine is one of {', '.join(ENGINES)}, not {engine!r}")
    if batch_size is not None and batch_size < 1:
        raise FeatxError(f"a batch has at least one image, not {batch_size}")
    by_cpu = device == "auto" and engine in ("onnxruntime", "torch-cpu")
    place = "cpu" if by_cpu else choose_device(device)
    if place != "cpu":
        name = "torch-cuda"
    elif precision == "fp16":
        raise FeatxError("fp16 is for GPUs and slow on a CPU; use bf16 or fp32")
    else:
        name = "torch-cpu" if precision == "bf16" or engine == "torch-cpu" else "onnxruntime"
    if engine not in (None, name):
        raise FeatxError(_other(engine, name, "a GPU" if engine == "torch-cuda" else "--device cpu"))
    if name == "onnxruntime":
        return _onnx_or_torch(request, info, cache, batch_size, threads, only=engine is not None)
    from featx.engines.torch import CpuEngine, CudaEngine

    backbone = loaded(request, info)
    if name == "torch-cuda":
        return CudaEngine(backbone, place, precision, batch_size)
    return CpuEngine(backbone, precision, batch_size or CPU_BATCH, threads)


def _other(engine: str | None, name: str, needs: str) -> str:
    return (
        f"the features in the cache come from the engine {engine}, and here {name} would run, whose rows differ in "
        f"their last bits; use {needs}, another --cache, or remove these features first (featx cache remove)"
    )


def backbone_onnx(request: BackboneRequest, info: BackboneInfo, cache: Path) -> Path:
    """The exported backbone, in `cache/engines/`: made when it is not there, and then without torch.

    Input `images`, `uint8 [N, 3, crop, crop]`; output `features`, `float32 [N, *row_shape]`; opset 18, one
    file, any N. Raises `ExportError` where the network cannot be exported.
    """
    from featx.engines.onnx import exported

    return exported(request, info, Path(cache))


def _onnx_or_torch(
    request: BackboneRequest,
    info: BackboneInfo,
    cache: Path,
    batch_size: int | None,
    threads: int | None,
    *,
    only: bool,
) -> Engine:
    """only: where the export fails, raise `FeatxError` instead of going on with torch."""
    from featx.engines.onnx import OnnxEngine, accelerated
    from featx.errors import ExportError

    try:
        return OnnxEngine(accelerated(backbone_onnx(request, info, cache)), batch_size, threads)
    except ExportError as error:
        if only:
            raise FeatxError(
                f"{error}; {_other('onnxruntime', 'torch-cpu', 'the versions that exported it')}"
            ) from error
        warnings.warn(f"{error}; torch runs it instead, slower", RuntimeWarning, stacklevel=3)
    from featx.engines.torch import CpuEngine

    return CpuEngine(loaded(request, info), "fp32", batch_size or CPU_BATCH, threads)
