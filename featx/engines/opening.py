"""Choose the engine that runs a backbone here, and open it; torch and OpenVINO are imported only to run."""

from __future__ import annotations

import warnings
from pathlib import Path

from featx.backbones.loading import loaded
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import arithmetic, choose_device
from featx.engines.engine import CPU_BATCH, Engine
from featx.engines.int8 import calibrated
from featx.engines.onnx import OnnxEngine, accelerated, backbone_onnx
from featx.engines.openvino import OpenVinoEngine, installed
from featx.errors import ExportError, FeatxError
from featx.options import fields_of
from featx.state import ordinary

# The engines of each precision on a CPU, the first that can run it here for new features.
ON_CPU = {"fp32": ("onnxruntime", "torch-cpu"), "bf16": ("openvino", "torch-cpu"), "int8": ("openvino", "onnxruntime")}
NEEDS = {
    "torch-cuda": "a GPU",
    "torch-cpu": "--device cpu",
    "onnxruntime": "--device cpu",
    "openvino": 'OpenVINO (pip install "featx[openvino]") and --device cpu',
}


@ordinary()
def open_engine(
    request: BackboneRequest,
    info: BackboneInfo,
    *,
    cache: Path,
    device: str = "auto",
    precision: str = "fp32",
    calibration: str = "",
    batch_size: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
    images: int = 0,
    native: frozenset[str] | None = None,
) -> Engine:
    """Open the engine that runs this backbone here. A fixed rule chooses it, since it decides a row's last bits.

    On a GPU torch. On a CPU onnxruntime for fp32, OpenVINO for bf16 where it is installed; torch for bf16 otherwise,
    and where the export fails.

    device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:1`. precision: `fp32`, `bf16`, `int8` on a CPU
    or `fp16` on a GPU. calibration: for int8, the SHA-256 of the quantised backbone. batch_size: 32 on a CPU; on a GPU
    the largest of 256, 128, ... that fits its memory. engine: the name of the one that filled a store, or, for int8,
    that its spec names. threads: for the arithmetic on a CPU, by default one per core.
    images: how many it will run, if known: for many, a network that only torch can run on a CPU is compiled first.
    native: what the processor multiplies, in place of `featx.devices.arithmetic()`.

    Raises `FeatxError` for an unknown precision, fp16 on a CPU, bf16 on a CPU that does not multiply it (unless torch
    began the store), a device or an engine that is not here, and where another engine than `engine` would run.
    """
    fields_of()["precision"].check(precision)
    place = "cpu" if device == "auto" and engine in NEEDS and engine != "torch-cuda" else choose_device(device)
    name = choose_engine(place, precision, engine, arithmetic() if native is None else native, installed())

    if name in ("onnxruntime", "openvino"):
        try:
            model = calibrated(cache, calibration) if calibration else backbone_onnx(request, info, cache)
            if name == "openvino":
                return OpenVinoEngine(model, precision, batch_size, threads)
            return OnnxEngine(model if calibration else accelerated(model), batch_size, threads)
        except ExportError as error:
            if engine is not None:
                mismatch = _mismatch(engine, "torch-cpu", "the versions that exported it")
                raise FeatxError(f"{error}; {mismatch}") from error
            warnings.warn(f"{error}; torch runs it instead, slower", RuntimeWarning, stacklevel=2)
    from featx.engines.torch import PAYS, CpuEngine, CudaEngine

    backbone = loaded(request, info)
    if name == "torch-cuda":
        return CudaEngine(backbone, place, precision, batch_size)
    cpu = CpuEngine(backbone, precision, batch_size or CPU_BATCH, threads)
    if precision == "fp32" and images >= PAYS * cpu.threads:
        cpu.compile(cache / "engines", images)
    return cpu


def choose_engine(place: str, precision: str, recorded: str | None, native: frozenset[str], has_openvino: bool) -> str:
    """The engine of a precision on a CPU or a GPU (`place`), where `recorded` computed the rows that are stored.

    native: see `featx.devices.arithmetic`. Raises `FeatxError` where none can run, or another than `recorded` would.
    """
    if place == "cpu" and precision not in ON_CPU:
        raise FeatxError(f"{precision} is for GPUs and slow on a CPU; use bf16 or fp32")
    possible = ON_CPU[precision] if place == "cpu" else ("torch-cuda",)
    if recorded is not None and recorded in possible:
        if recorded == "openvino" and not has_openvino:
            other = "--runtime onnxruntime for features of their own" if precision == "int8" else "use another --cache"
            raise FeatxError(
                "the features in the cache come from OpenVINO, which is not installed; "
                f'pip install "featx[openvino]", or {other}'
            )
        return recorded
    name = next(name for name in possible if name != "openvino" or has_openvino)
    if recorded is not None:
        raise FeatxError(_mismatch(recorded, name, NEEDS.get(recorded, "that engine")))
    if place == "cpu" and precision == "bf16" and precision not in native:
        raise FeatxError(
            "this processor has no bf16 arithmetic (AMX or AVX512-BF16), so bf16 would be slower than fp32; "
            "use --precision fp32, or a machine that has it"
        )
    return name


def _mismatch(engine: str, name: str, needs: str) -> str:
    return (
        f"the features in the cache come from the engine {engine}, and here {name} would run, whose rows differ in "
        f"their last bits; use {needs}, another --cache, or remove these features first (featx cache remove)"
    )
