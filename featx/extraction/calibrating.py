"""int8 features: which calibration they are computed with, by what; a calibration that the cache lacks is made."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import arithmetic, available_threads
from featx.engines import int8
from featx.engines.engine import Engine
from featx.engines.onnx import backbone_onnx
from featx.engines.opening import ON_CPU
from featx.engines.openvino import installed
from featx.errors import ExportError, FeatxError, ImageError, SourceError
from featx.extraction.keys import KeyTable
from featx.features import joined
from featx.pixels.preprocess import GPU, Preprocess
from featx.sources.source import Source
from featx.threads import ahead

IMAGES = 512
"""Images that a calibration is made of, at most."""
CANDIDATES = 10_000
"""Images that these are chosen from, at most: their content has to be read for that."""


def int8_fields(
    source: Source,
    request: BackboneRequest,
    info: BackboneInfo,
    cache: Path,
    options: dict[str, Any],
    engine: Engine | None,
) -> dict[str, Any]:
    """The fields of a spec that say how its int8 features are computed: `calibration` and `engine`.

    engine: what the caller has brought to run the int8 backbone. Rows that one engine began are continued by it.
    Raises `FeatxError` before any image is read where int8 cannot be computed here (features that are in the cache can
    be read anywhere), and `StoreError` where the calibration that was asked for is not in the cache.
    """
    if info.preprocess.pixels == GPU or options["device"].startswith("cuda"):
        raise FeatxError("int8 is for CPUs; leave out --device cuda and --decode gpu, or use --precision bf16 or fp16")
    name = engine.name if engine else options["runtime"]
    possible = ON_CPU["int8"] if name == "auto" else (name,)
    digest = int8.find(cache, info, options["calibration"])
    for begun in possible if digest else ():
        spec = info.spec(precision="int8", dtype=options["dtype"], calibration=digest, engine=begun)
        if (cache / "features" / spec.folder_name).exists():
            return {"calibration": digest, "engine": begun}

    if name == "openvino" and not installed():
        raise FeatxError('OpenVINO is not installed; pip install "featx[openvino]", or leave out --runtime openvino')
    name = next(each for each in possible if each != "openvino" or installed())
    if engine is None and "int8" not in arithmetic():
        raise FeatxError(
            "this processor has no integer dot product (AMX, AVX-VNNI, AVX512-VNNI, or Arm's), without which int8 is "
            "not worth its rounding; use --precision fp32, or a machine that has one"
        )
    if digest is None:
        try:
            backbone = backbone_onnx(request, info, cache)
        except ExportError as error:
            raise ExportError(f"{error}; int8 needs the exported backbone: use --precision fp32 or bf16") from error
        images = examples(source, info.preprocess, cache)
        digest = int8.calibrate(cache, info, backbone, images, options["calibration"])
    return {"calibration": digest, "engine": name}


def examples(source: Source, preprocess: Preprocess, cache: Path, most: int = IMAGES) -> dict[str, np.ndarray]:
    """Up to `most` training images, or images of any kind where none is labelled: those with the smallest content keys.

    By key, in hex: `uint8 [3, crop, crop]`. Raises `SourceError` where none can be used.
    """
    if len(source) > CANDIDATES:  # evenly over the listing, and so over the classes
        source = source.take(np.linspace(0, len(source) - 1, CANDIDATES).astype(int))
    table = KeyTable(source, cache)
    table.read_missing()
    table.record()

    numbers = np.flatnonzero(table.first())
    if source.labels:
        labels = [source.labels[i] for i in numbers.tolist()]
        given = np.array([source.splits[i] if source.splits else "" for i in numbers.tolist()], dtype="U5")
        splits = joined(labels, source.multilabel, table.keys[numbers], given)[2]
        numbers = numbers[splits == "train"] if (splits == "train").any() else numbers
    by_key = {table.keys[i].tobytes().hex(): i for i in numbers.tolist()}

    def load(key: str) -> tuple[str, np.ndarray | None]:
        try:
            return key, preprocess(source.read(by_key[key]))
        except ImageError:  # the extraction counts and names it
            return key, None

    threads = available_threads()
    with closing(ahead(load, sorted(by_key), threads=threads, window=2 * threads, name="featx-calibrate")) as loaded:
        crops = dict(islice(((key, crop) for key, crop in loaded if crop is not None), most))
    if not crops:
        raise SourceError(f"no image of {source.uri} can be read, so there is nothing to calibrate int8 on")
    return crops
