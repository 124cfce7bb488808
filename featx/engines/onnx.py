"""Owns the exported backbone and the onnxruntime session that runs it; torch only where it is not exported yet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from featx.backbones.loading import loaded
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import available_threads
from featx.engines.engine import CPU_BATCH
from featx.errors import ExportError, StoreError
from featx.features import TOLERANCE, difference
from featx.files import sweep, write_atomic

OPSET = 18
WEIGHTS_PER_IMAGE = 16 << 20  # bytes of weights that one more image in a piece pays for
MOST_BYTES = 2_000_000_000  # of weights; protobuf ends at 2**31
LARGE_BYTES = 300_000_000  # of weights, from which on copying them costs more than capturing the program
EXPORT_VERSION = 2  # raised when the exported graph changes
WINOGRAD_REVISION = 1  # raised when `featx.engines.winograd` makes another graph


class OnnxEngine:
    """onnxruntime on the CPU. Rows do not depend on the batch they are in, nor on the number of threads.

    A batch is cut into pieces, each run by one thread from the first layer to the last. Against all
    threads on one batch, as onnxruntime does it by itself, no thread waits for another after every
    layer and a piece's activations stay in the cache: 1.45 times the images/s with SqueezeNet 1.1 and
    MobileNetV2, 1.1 times with ResNet-18, the same with VGG-16 and AlexNet (two cores).

    model: an exported backbone; `accelerated` tells which form of it to run.
    """

    name = "onnxruntime"

    def __init__(self, model: Path, batch_size: int | None = None, threads: int | None = None) -> None:
        threads = threads or available_threads()
        self.batch_size = batch_size or max(CPU_BATCH, 4 * threads)
        # each piece reads all weights once: the larger they are, the more images have to share that
        most = min(max(2, model.stat().st_size // WEIGHTS_PER_IMAGE), 16, -(-self.batch_size // threads))
        self.piece = -(-self.batch_size // -(-self.batch_size // most))  # no batch ends with a small one
        self.session = session(model, 1)
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="featx-embed")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]` -> `float32 [B, *row_shape]`."""
        return self.submit(images)()

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Queue the batch's pieces; what is returned waits for their rows."""
        pieces = [
            self.executor.submit(self._run, images[start : start + self.piece])
            for start in range(0, len(images), self.piece)
        ]
        return lambda: np.concatenate([piece.result() for piece in pieces])

    def close(self) -> None:
        """End the threads; pieces that have not begun are dropped."""
        self.executor.shutdown(cancel_futures=True)

    def _run(self, images: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self.session.run(None, {"images": images})[0]
        return rows


def session(model: Path | bytes, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU; `threads` does the arithmetic, by default one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exported(request: BackboneRequest, info: BackboneInfo, cache: Path) -> Path:
    """See `featx.engines.opening.backbone_onnx`. What failed once is remembered until a library changes.

    The file is taken only while its bytes are the ones written: a flipped bit would be in every feature.
    """
    graph = {
        "backbone": info.name,
        "weights": info.weights_digest,
        "layer": info.layer,
        "crop": info.preprocess.crop,
        "mean": info.preprocess.mean,
        "std": info.preprocess.std,
        "opset": OPSET,
        "version": EXPORT_VERSION,
    }
    digest = hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()
    path = cache / "engines" / f"{digest}.onnx"
    libraries = {name: metadata.version(name) for name in ("torch", "torchvision", "onnxscript", "onnxruntime")}
    known = _known(path)
    if _intact(path, known):
        return path
    if "error" in known and known.get("libraries") == libraries:
        raise ExportError(known["error"])
    known = {"graph": graph, "libraries": libraries}
    backbone = loaded(request, info)
    try:
        data = to_onnx(backbone.module, info)
    except ExportError as error:
        with contextlib.suppress(OSError):  # only costs the next run another try
            write_atomic(_record(path), json.dumps(known | {"error": str(error)}, indent=1).encode())
        raise
    try:
        _keep(path, data, known)
    except OSError as error:
        raise StoreError(
            f"the exported backbone cannot be written to {path.parent} ({error}); give another folder by --cache"
        ) from error
    return path


def accelerated(model: Path) -> Path:
    """The form of an exported backbone that is run: a file beside it with fewer multiplications, where that pays.

    Made once, like the export, and held to it on three images of noise: rows may differ by half of the
    tolerance, so that with the export's own difference from torch they keep within it. What ships is never this.
    """
    path = model.with_name(f"{model.stem}.winograd{WINOGRAD_REVISION}.onnx")
    made_of = {
        "of": _known(model).get("sha256") or _sha256(model),
        "libraries": {name: metadata.version(name) for name in ("onnx", "onnxruntime")},
    }
    known = _known(path)
    if known == made_of | {"plain": True}:
        return model
    if known.get("of") == made_of["of"] and _intact(path, known):
        return path
    with contextlib.suppress(OSError):  # no room, or read-only: the export is run, and the next run tries again
        data = _rewritten(model)
        for old in model.parent.glob(f"{model.stem}.winograd*"):  # of other revisions: they are large
            if old.stem != path.stem:
                old.unlink()
        if data and _alike(model, data):
            _keep(path, data, made_of)
            return path
        write_atomic(_record(path), json.dumps(made_of | {"plain": True}, indent=1).encode())
    return model


def _rewritten(model: Path) -> bytes:
    """The graph with fewer multiplications; empty where that gains nothing."""
    import onnx

    from featx.engines.winograd import rewritten

    new = rewritten(onnx.load(model), MOST_BYTES)
    return b"" if new is None else bytes(new.SerializeToString())


def _alike(model: Path, data: bytes) -> bool:
    """Whether a rewritten graph gives the rows that the exported one gives."""
    try:
        reference, rows = (_noise_rows(graph) for graph in (model, data))  # one session at a time
        return difference(rows, reference) <= TOLERANCE["fp32"] / 2
    except MemoryError:
        raise
    except Exception:  # a graph of a kind that was not thought of runs as it was exported
        return False


def _noise_rows(graph: Path | bytes) -> np.ndarray:
    opened = session(graph)
    images = np.random.default_rng(0).integers(0, 256, (3, *opened.get_inputs()[0].shape[1:]), dtype=np.uint8)
    rows: np.ndarray = opened.run(None, {"images": images})[0]
    return rows


def _record(path: Path) -> Path:
    """What is known of an export is written beside it."""
    return path.with_suffix(".json")


def _intact(path: Path, known: dict[str, Any]) -> bool:
    return "sha256" in known and path.is_file() and _sha256(path) == known["sha256"]


def _keep(path: Path, data: bytes, known: dict[str, Any]) -> None:
    """Write a graph, and then its record: without one it is made again. Raises `OSError`."""
    with contextlib.suppress(OSError):  # what a killed run left aside is large
        sweep(path.parent)
    write_atomic(path, data)
    known = known | {"sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(_record(path), json.dumps(known, indent=1).encode())


def _known(path: Path) -> dict[str, Any]:
    """What is known of an export; nothing, where its record is absent or damaged."""
    try:
        known = json.loads(_record(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_onnx(module: Any, info: BackboneInfo) -> bytes:
    """Export a backbone's `module` and hold it to torch on three images of noise. Raises `ExportError`.

    By torch's tracing exporter, which takes 0.3 s for ResNet-18 and 1.9 s for DenseNet-161; where that fails,
    or is not in torch any more, by the one that captures the program, which takes 2.3 s and 10.2 s. Tracing
    copies the weights more often: for VGG-16 it takes 6.7 s, capturing 2.2 s, so large ones go the other way
    round. Traced on two images, so a graph that only works for that number fails the comparison.
    """
    import torch

    size = 4 * sum(tensor.numel() for tensor in module.state_dict().values())
    if size > MOST_BYTES:
        raise ExportError(f"{info.name} is larger than the 2 GB that one ONNX file holds")
    crop = info.preprocess.crop
    noise = np.random.default_rng(0).integers(0, 256, (3, 3, crop, crop), dtype=np.uint8)
    images = torch.from_numpy(noise)
    with torch.inference_mode():
        reference = module(images).numpy()
    reasons = []
    for export in (_traced, _captured) if size < LARGE_BYTES else (_captured, _traced):
        try:
            with _quiet():
                model = export(module, images[:2])
            strip(model)
            data: bytes = model.SerializeToString()
            apart = difference(session(data).run(None, {"images": noise})[0], reference)
        except Exception as error:  # the exporters let through what any of their stages raises
            reasons.append(_reason(error))
            continue
        if apart <= TOLERANCE["fp32"]:
            return data
        reasons.append(f"its rows differ from torch's by {apart:.1e}, more than {TOLERANCE['fp32']:g}")
    raise ExportError(f"{info.name} cannot be exported to ONNX ({'; or, by another way: '.join(reasons)})")


def _traced(module: Any, images: Any) -> Any:
    import onnx
    import torch

    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (images,),
        buffer,  # type: ignore[arg-type]
        dynamo=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_axes={"images": {0: "N"}, "features": {0: "N"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def _captured(module: Any, images: Any) -> Any:
    import torch

    program = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        external_data=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        verbose=False,
    )
    assert program is not None  # only dynamo=False gives None
    return program.model_proto


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line: an exporter wraps its own advice, in colours, around the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return ": ".join([type(error).__name__, *[line for line in lines if line][:1]])


def strip(model: Any) -> None:
    """Remove what an exporter noted about its own machine and code: stack traces, class names, paths.

    An empty text stays as a field: the digests of a file's parts (`featx.shipping.graph`) count it.
    """
    graph = model.graph
    for entry in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del entry.metadata_props[:]
        entry.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, advice and deprecation notes off the terminal."""
    import logging
    import warnings

    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
