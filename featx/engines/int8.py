"""int8: a backbone quantised once; the calibration is an artefact of its own, `cache/calibrations/<SHA-256>.onnx`.

Rows in int8 depend on the images that the ranges were taken from, so a calibration is made once, named by its bytes,
and then kept: for the data set as it grows, and for others with the same backbone and preprocessing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from featx.backbones.request import BackboneInfo
from featx.engines.onnx import intact, keep, session, strip
from featx.errors import StoreError
from featx.features import difference
from featx.options import plain
from featx.records import read_record
from featx.state import one_at_a_time, ordinary

if TYPE_CHECKING:
    from onnx import ModelProto

METHOD = "static QDQ, MinMax, activations uint8, weights int7 per channel"
BATCH = 32


class Record(TypedDict):
    """`<SHA-256>.json`, beside the graph."""

    backbone: dict[str, Any]
    """What the fp32 graph computes, as `identity` says it."""
    of: str
    """The SHA-256 of the fp32 graph."""
    images: list[str]
    """Content keys, in hex, of the images that it was calibrated on."""
    method: str
    libraries: dict[str, str]
    distance: float
    """From the fp32 graph's rows, on up to 32 of these images: `featx.features.difference`."""
    made: float
    """Seconds since 1970."""
    sha256: str


def identity(info: BackboneInfo) -> dict[str, Any]:
    """What a calibration is good for, as JSON gives it back: one backbone, and one preprocessing."""
    preprocess = plain(info.preprocess.to_dict())
    return {"name": info.name, "weights": info.weights_digest, "layer": info.layer, "preprocess": preprocess}


def find(cache: Path, info: BackboneInfo, asked: str) -> str | None:
    """The SHA-256 of a backbone's calibration in this cache: the newest for `auto` (None where there is none, and for
    `new`), or the one that starts with `asked`. Reads records alone. Raises `StoreError` where that is not there, and
    for `auto` where a record is damaged, which may be the newest's.
    """
    if asked == "new":
        return None
    known = {path.stem: _recorded(path) for path in sorted(_folder(cache).glob("*.json"))}
    mine = {digest: record for digest, record in known.items() if record.get("backbone") == identity(info)}
    damaged = [digest for digest, record in known.items() if not record]
    if asked == "auto" and not damaged:
        return max(mine, key=lambda digest: mine[digest]["made"], default=None)
    if len(asked) == 64 and not known.get(asked):
        return asked  # as runs ask, which know that it is theirs; `calibrated` checks the graph where it is needed

    found = [digest for digest in mine if digest.startswith(asked)]
    if len(found) != 1:
        if damaged:
            others = ", ".join(digest[:12] for digest in mine) or "none"
            raise StoreError(
                f"{_folder(cache) / damaged[0]}.json is damaged; choose a calibration by --calibration (there are "
                f"{others}), have --calibration new make one, or remove that file. Runs find theirs all the same"
            )
        what = f"{len(found)} calibrations start with" if found else f"{info.name} has no calibration"
        listed = ", ".join(digest[:12] for digest in mine) or "none"
        raise StoreError(
            f"{what} {asked!r} in {_folder(cache)}; there are {listed}. Bring the folder from where the features were "
            "computed, or make another one by --calibration new, whose features are cached apart"
        )
    return found[0]


def calibrated(cache: Path, digest: str) -> Path:
    """The backbone in int8 that this SHA-256 names. Raises `StoreError` where it is missing or damaged."""
    path = _folder(cache) / f"{digest}.onnx"
    if not intact(path, {"sha256": digest}):
        what = "is damaged" if path.exists() else "is missing"
        raise StoreError(
            f"the calibration {path} {what}; bring the same file from another cache or a backup, or make "
            "another one by --calibration new, whose features are cached apart and need heads of their own"
        )
    return path


@one_at_a_time()
@ordinary()
def calibrate(
    cache: Path, info: BackboneInfo, backbone: Path, images: dict[str, np.ndarray], asked: str = "new"
) -> str:
    """Quantise an exported backbone, keep it in the cache, and return its SHA-256.

    images: by content key, in hex, `uint8 [3, crop, crop]`. asked: for `auto`, one that another process has kept
    meanwhile is returned instead, so that data sets that begin at once have one calibration, as in turns. Two
    processes that make the same one at once write the same bytes; one that ends before its record is written leaves
    none. Raises `StoreError` where it cannot be written.
    """
    crops = list(images.values())
    try:
        data = quantized(backbone, (np.stack(crops[i : i + BATCH]) for i in range(0, len(crops), BATCH)))
    except OSError as error:
        raise StoreError(
            f"int8 needs some room in {tempfile.gettempdir()} while it is made ({error}); make room, or set TMPDIR"
        ) from error
    sample, digest = {"images": np.stack(crops[:BATCH])}, hashlib.sha256(data).hexdigest()
    rows, reference = (session(graph).run(None, sample)[0] for graph in (data, backbone))
    record = {
        "backbone": identity(info),
        "of": hashlib.sha256(backbone.read_bytes()).hexdigest(),
        "images": list(images),
        "method": METHOD,
        "libraries": {name: metadata.version(name) for name in ("onnx", "onnxruntime")},
        "distance": difference(rows, reference),
        "made": time.time(),
    }
    if asked == "auto" and (other := find(cache, info, asked)):
        return other
    path = _folder(cache) / f"{digest}.onnx"
    try:
        keep(path, data, record)
    except OSError as error:
        raise StoreError(
            f"the calibration cannot be written to {path.parent} ({error}); give another folder by --cache"
        ) from error
    return digest


def quantized(backbone: Path, batches: Iterable[np.ndarray]) -> bytes:
    """A backbone in int8: weights per channel, activations by their range over batches of `uint8 [B, 3, crop, crop]`.

    Static QDQ. Activations are unsigned and weights signed, the pair that x86 processors multiply fastest. Weights
    have 7 bits: of 8 bits, the sum of two products does not fit into the 16 bits that processors without VNNI have
    for it, and the file would answer otherwise there (with SqueezeNet, for 11 of 153 photographs instead of 2). Heads
    fitted on rows of 8 bits are not measurably better (docs/benchmarks/int8.md).
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = ({"images": batch} for batch in batches)
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))
    with tempfile.TemporaryDirectory(prefix="featx-int8-") as folder:
        prepared, result = os.path.join(folder, "prepared.onnx"), os.path.join(folder, "int8.onnx")
        quant_pre_process(str(backbone), prepared, skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        form = {"quant_format": QuantFormat.QDQ, "per_channel": True, "reduce_range": True}
        sizes = arithmetic_of_sizes(onnx.load(prepared))
        quantize_static(prepared, result, reader, nodes_to_exclude=sizes, **form, **types)
        model = onnx.load(result)
    strip(model)
    return bytes(model.SerializeToString(deterministic=True))


def arithmetic_of_sizes(model: ModelProto) -> list[str]:
    """The nodes that compute from shapes alone, such as how far to pad an image of this size.

    In int8 their results may be off by one: EfficientNet-Lite0 then gets a map of 27 x 27 for one of 28 x 28, and
    its rows are 0.52 of their largest entry off fp32's, at the median, instead of 0.21.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    sizes: set[str] = set()
    found = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name and name not in constant]
        if node.op_type == "Constant":
            constant.update(node.output)
        elif node.op_type in ("Shape", "Size") or (inputs and sizes.issuperset(inputs)):
            sizes.update(node.output)
            found.append(node.name)
    return found


def _folder(cache: Path) -> Path:
    return Path(cache) / "calibrations"


def _recorded(path: Path) -> dict[str, Any]:
    """A calibration's record; empty where it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_record(path, Record)[0]
    return {}
