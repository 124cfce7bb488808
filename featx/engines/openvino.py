"""OpenVINO on a CPU, for arithmetic that onnxruntime lacks or is slower at: bf16, and int8."""

from __future__ import annotations

import importlib.util
import platform
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from featx.engines.engine import PiecewiseEngine
from featx.errors import FeatxError
from featx.state import HAVE_THREADS, one_at_a_time

# Said to OpenVINO in every case, since by itself it takes bf16 wherever the processor has it. An int8 file says where
# it is int8; what is left of it is float32.
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
# Images in a piece, for the memory of activations: in fp32 an extraction with SqueezeNet takes 1.5 times what it takes
# by onnxruntime, of 8 images 1.75 times. In bf16 and int8 they are half as large, or less.
PIECE = {"fp32": 4, "bf16": 8, "int8": 8}

X86 = "x86_64", "AMD64"


class OpenVinoEngine(PiecewiseEngine):
    """OpenVINO on the CPU. Rows do not depend on the batch they are in, nor on the number of threads.

    model: an exported backbone, or an int8 form of one. precision: `fp32`, `bf16` or `int8`. Nothing is kept of the
    compiled model: reading OpenVINO's own copy of it takes longer than compiling (ResNet-50 0.23 s in both ways,
    ViT-B/16 2.8 s instead of 2.2 s). Raises `FeatxError` where OpenVINO is not installed, and for bf16 that the
    processor would not multiply, where OpenVINO would compute float32 without a word.
    """

    name = "openvino"

    def __init__(
        self, model: Path, precision: str = "bf16", batch_size: int | None = None, threads: int | None = None
    ) -> None:
        self.model, self.hint = model, HINTS[precision]
        super().__init__(PIECE[precision], batch_size, threads)

    @one_at_a_time()
    def _open(self) -> None:
        super()._open()
        core = runtime().Core()
        options = {"NUM_STREAMS": self.threads, "INFERENCE_NUM_THREADS": self.threads}
        self.compiled = core.compile_model(
            core.read_model(self.model), "CPU", options | {"INFERENCE_PRECISION_HINT": self.hint}
        )
        if self.hint == "bf16" and "bfloat16" not in str(self.compiled.get_property("INFERENCE_PRECISION_HINT")):
            raise FeatxError("OpenVINO finds no bf16 arithmetic on this processor; use --precision fp32")
        HAVE_THREADS.add(self.compiled)
        self.requests = threading.local()
        # OpenVINO's module sets itself up in its first call, and two threads in that call wait for each other for ever
        self._run(
            np.zeros((1, *(side.get_length() for side in list(self.compiled.input().partial_shape)[1:])), np.uint8)
        )

    def _run(self, images: np.ndarray) -> np.ndarray:
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        rows: np.ndarray = self.requests.own.infer([images], share_inputs=True)[0]
        return np.array(rows)  # the request's own buffer is written again


def installed() -> bool:
    """Whether OpenVINO is there, on a processor of the kind that it has bf16 for; imports nothing."""
    return platform.machine() in X86 and importlib.util.find_spec("openvino") is not None


def runtime() -> Any:
    """The package. Its converter brings a telemetry that writes to the home folder and sends: while the package is
    imported, that is not to be found.

    Raises `FeatxError` where OpenVINO is not installed.
    """
    if not installed():
        raise FeatxError('OpenVINO is not installed, or this is not an x86 processor; pip install "featx[openvino]"')
    if "openvino" not in sys.modules:
        telemetry = {"openvino_telemetry": None, "openvino_telemetry.backend": None}
        before = {name: sys.modules[name] for name in telemetry if name in sys.modules}
        sys.modules |= telemetry  # type: ignore[arg-type]
        try:
            import openvino  # noqa: F401
        finally:
            for name in telemetry:
                del sys.modules[name]
            sys.modules.update(before)
    return sys.modules["openvino"]
