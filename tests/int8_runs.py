"""int8 on processors without integer dot products: the calibration is made, and its engine handed to featx."""

from __future__ import annotations

from pathlib import Path

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.engines import int8
from featx.engines.onnx import OnnxEngine, backbone_onnx
from featx.extraction.calibrating import IMAGES, examples
from featx.sources.opening import open_source


def calibrate(data: Path, request: BackboneRequest, cache: Path, most: int = IMAGES) -> str:
    """The SHA-256 of a new calibration on this data set's images."""
    info = resolve(request, cache)
    images = examples(open_source(data), info.preprocess, cache, most)
    return int8.calibrate(cache, info, backbone_onnx(request, info, cache), images)


def engine_of(cache: Path, digest: str, threads: int | None = None, batch_size: int | None = None) -> OnnxEngine:
    return OnnxEngine(int8.calibrated(cache, digest), batch_size, threads)
