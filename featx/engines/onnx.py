"""The exported backbone, and the onnxruntime session that runs it; torch is imported only to export."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from featx.backbones.loading import loaded
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import available_threads, processor
from featx.engines.engine import PiecewiseEngine
from featx.engines.wire import scan
from featx.errors import ExportError, StoreError, UnexportableError
from featx.features import TOLERANCE, difference
from featx.files import MOST_NETWORK_BYTES, read_plain, sweep, write_atomic
from featx.records import read_record, write_record
from featx.state import FILTERS, one_at_a_time, ordinary

OPSET = 18
WEIGHTS_PER_IMAGE = 16 << 20  # bytes of weights that justify one more image per piece
MAX_BYTES = 2_000_000_000  # larger weights do not fit into a protobuf, which ends at 2**31
LARGE_BYTES = 300_000_000  # with larger weights tracing, which copies them, is slower than capturing
EXPORT_VERSION = 2  # raised when the exported graph changes
WINOGRAD_REVISION = 1  # raised when `featx.engines.winograd` makes another graph
WORTH = 1.05  # times as fast that a rewritten graph must be
TIMED = 4  # images for each thread: a whole batch of VGG-16 takes ten seconds
MEASURED_SECONDS = 1.0  # for which both graphs are timed, in turns


class Known(TypedDict, total=False):
    """The record beside a graph."""

    graph: dict[str, Any]
    libraries: dict[str, str]
    sha256: str
    """The graph's file; none where it could not be made."""
    never: str
    """Why it can never be made. Files of older versions have an `error` instead, which may have passed since."""
    of: str
    """The SHA-256 of the graph that this one was made of."""
    plain: bool
    """There is nothing to rewrite: the graph that it would be made of runs."""
    gains: dict[str, float]
    """How many times as fast it is as the one it was made of, by processor and version; 0 where its rows differ."""


class OnnxEngine(PiecewiseEngine):
    """onnxruntime on the CPU. Rows do not depend on the batch they are in, nor on the number of threads.

    Pieces give 1.45 times the images/s with SqueezeNet 1.1 and MobileNetV2, 1.1 times with ResNet-18, the same with
    VGG-16 and AlexNet (two cores).

    model: an exported backbone; `accelerated` chooses which form of it to run.
    """

    name = "onnxruntime"

    def __init__(self, model: Path, batch_size: int | None = None, threads: int | None = None) -> None:
        self.session = session(model, 1)
        # each piece reads all weights once: the larger they are, the more images should share that
        super().__init__(min(max(2, model.stat().st_size // WEIGHTS_PER_IMAGE), 16), batch_size, threads)

    def _run(self, images: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self.session.run(None, {"images": images})[0]
        return rows


def session(model: Path | bytes, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU; `threads` compute, by default one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@one_at_a_time()
@ordinary()
def backbone_onnx(request: BackboneRequest, info: BackboneInfo, cache: Path) -> Path:
    """The exported backbone, in `cache/engines/`; torch exports it where it is missing.

    Input `images`, `uint8 [N, 3, crop, crop]`; output `features`, `float32 [N, *row_shape]`; opset 18, one
    file, any N. The file is used only while it has the SHA-256 it was written with: a flipped bit would be
    in every feature. One thread exports while the others wait. Raises `ExportError` where the export fails, and
    `UnexportableError` where it always will; later calls raise that at once, until a library changes.
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
    path = Path(cache) / "engines" / f"{digest}.onnx"
    libraries = {name: metadata.version(name) for name in ("torch", "torchvision", "onnxscript", "onnxruntime")}
    known = _recorded(path)
    if intact(path, known):
        return path
    if "never" in known and known.get("libraries") == libraries:
        raise UnexportableError(known["never"])

    module = loaded(request, info).module
    known = {"graph": graph, "libraries": libraries}
    try:
        keep(path, to_onnx(module, info), known)
    except UnexportableError as error:
        with contextlib.suppress(OSError):  # without a record the next run tries again
            write_record(path.with_suffix(".json"), {**known, "never": str(error)})
        raise
    except OSError as error:
        raise StoreError(
            f"the exported backbone cannot be written to {path.parent} ({error}); give another folder by --cache"
        ) from error
    return path


@one_at_a_time()
@ordinary()
def accelerated(model: Path, tolerance: float = TOLERANCE / 2, clock: Callable[[], float] = time.perf_counter) -> Path:
    """The file to run for an exported backbone: one beside it with fewer multiplications, where that pays here.

    It is made once, like the export. Each processor that uses the cache compares both, in rows and in speed, and keeps
    its answer in the record. tolerance: how far rows may differ; by default half of what is allowed, since the export
    may differ from torch as well. clock: what measures the speed. Only the export itself is shipped.
    """
    path = model.with_name(f"{model.stem}.winograd{WINOGRAD_REVISION}.onnx")
    made_of: dict[str, Any] = {
        "of": _recorded(model).get("sha256") or hashlib.sha256(model.read_bytes()).hexdigest(),
        "libraries": {name: metadata.version(name) for name in ("onnx", "onnxruntime")},
    }
    known, here = _recorded(path), f"{processor()}, onnxruntime {made_of['libraries']['onnxruntime']}"
    if known == made_of | {"plain": True}:
        return model
    if known.get("of") != made_of["of"]:
        known = {}
    gains = dict(known.get("gains", {}))
    if here in gains and (gains[here] < WORTH or intact(path, known)):
        return path if gains[here] >= WORTH else model

    with contextlib.suppress(OSError):  # disk full or read-only: this run uses the export, and the next tries again
        if not intact(path, known):
            data = _rewritten(model)
            _remove_revisions(model)
            if not data:
                write_record(path.with_suffix(".json"), made_of | {"plain": True})
                return model
            known = keep(path, data, made_of | {"gains": gains})
            del data  # as large as the weights, and both graphs are opened now
        gain = _gain(model, path, tolerance, clock)
        if gain is not None:
            latest = _recorded(path).get("gains", {})  # what another process has decided meanwhile holds for both
            gain = gain if latest.get(here) == gains.get(here) else latest.get(here, gain)
            gains |= latest | {here: gain}
            with contextlib.suppress(OSError):  # others may only read this cache
                if max(gains.values()) < WORTH:  # no processor runs it
                    path.unlink()
                write_record(path.with_suffix(".json"), known | {"gains": gains})
            return path if gain >= WORTH and path.exists() else model
    return model


def _rewritten(model: Path) -> bytes:
    """The graph with fewer multiplications; empty where there is none."""
    import onnx

    from featx.engines.winograd import rewritten

    graph = rewritten(onnx.load(model), MAX_BYTES)
    return b"" if graph is None else bytes(graph.SerializeToString())


def _remove_revisions(model: Path) -> None:
    """Remove the graphs that other revisions made of this one: they are large."""
    for old in model.parent.glob(f"{model.stem}.winograd*"):
        revision = re.fullmatch(r"(\d+)\.(onnx|json)", old.name.removeprefix(f"{model.stem}.winograd"))
        if revision and int(revision[1]) != WINOGRAD_REVISION:
            old.unlink()


def _gain(model: Path, path: Path, tolerance: float, clock: Callable[[], float]) -> float | None:
    """How many times as fast the rewritten graph is here, in turns on a batch that gives every thread a piece; 0 where
    it gives other rows or never runs, and None where it could not be tried.
    """
    try:
        engines = [OnnxEngine(each, TIMED * available_threads()) for each in (model, path)]
        shape = engines[0].session.get_inputs()[0].shape[1:]
        reference, rows = (engine(_noise(3, *shape)) for engine in engines)
        if not difference(rows, reference) <= tolerance:
            return 0.0
        images = _noise(max(engine.threads * engine.piece for engine in engines), *shape)
        ratios: list[float] = []
        begin = clock()
        while not ratios or clock() - begin < MEASURED_SECONDS:
            moments = []
            for engine in engines:
                moments.append(clock())
                engine(images)
            ratios.append((moments[1] - moments[0]) / (clock() - moments[1]))
    except Exception as error:  # a graph that the rewriting does not foresee runs as it was exported
        return 0.0 if _lasting(error) else None
    return round(statistics.median(ratios), 3)


def _noise(*shape: int) -> np.ndarray:
    """Images `[N, 3, crop, crop]`, on which graphs are compared."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _rows_of_noise(graph: Path | bytes) -> np.ndarray:
    opened = session(graph)
    rows: np.ndarray = opened.run(None, {"images": _noise(3, *opened.get_inputs()[0].shape[1:])})[0]
    return rows


def intact(path: Path, known: dict[str, Any]) -> bool:
    """Whether a graph has the SHA-256 of its record, and all its weights."""
    with contextlib.suppress(OSError, ValueError):
        data = read_plain(path, MOST_NETWORK_BYTES)
        return hashlib.sha256(data).hexdigest() == known.get("sha256") and not scan(data).side_files
    return False


def keep(path: Path, data: bytes, known: dict[str, Any]) -> dict[str, Any]:
    """Write a graph, and then its record, without which it is made again; returns the record. Raises `OSError`."""
    with contextlib.suppress(OSError):  # leftovers of a killed run are large
        sweep(path.parent)
    write_atomic(path, data)
    known = known | {"sha256": hashlib.sha256(data).hexdigest()}
    write_record(path.with_suffix(".json"), known)
    return known


def _recorded(path: Path) -> dict[str, Any]:
    """The record of a graph; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_record(path.with_suffix(".json"), Known)[0]
    return {}


def to_onnx(module: Any, info: BackboneInfo) -> bytes:
    """Export a backbone's `module` and compare it with torch on three images of noise. Raises `ExportError`, and
    `UnexportableError` where neither way can ever work.

    torch's tracing exporter takes 0.3 s for ResNet-18 and 1.9 s for DenseNet-161. Where it fails, or is gone
    from torch, the one that captures the program runs, which takes 2.3 s and 10.2 s. Tracing copies the
    weights more often: for VGG-16 it takes 6.7 s, capturing 2.2 s, so large networks are captured first. Both
    get two images, so that a graph that only works for two fails on three.
    """
    import torch

    size = 4 * sum(tensor.numel() for tensor in module.state_dict().values())
    if size > MAX_BYTES:
        raise UnexportableError(f"{info.name} is larger than the 2 GB that one ONNX file holds")
    images = torch.from_numpy(_noise(3, 3, info.preprocess.crop, info.preprocess.crop))
    with torch.inference_mode():
        reference = module(images).numpy()

    reasons, lasting = [], True
    for capture in (False, True) if size < LARGE_BYTES else (True, False):
        try:
            with quiet():
                model = export(module, images[:2], capture)
            strip(model)
            data: bytes = model.SerializeToString()
            apart = difference(_rows_of_noise(data), reference)
        except Exception as error:  # the exporters let any error of their stages through
            reasons.append(reason(error))
            lasting = lasting and _lasting(error)
            continue
        if apart <= TOLERANCE:
            return data
        reasons.append(f"its rows differ from torch's by {apart:.1e}, more than {TOLERANCE:g}")
    kind = UnexportableError if lasting else ExportError
    raise kind(f"{info.name} cannot be exported to ONNX ({'; or, by another way: '.join(reasons)})")


def export(module: Any, images: Any, capture: bool = False) -> Any:
    """A module as `onnx.ModelProto`, by torch's exporter that traces it or by the one that captures its program."""
    import onnx
    import torch

    options: dict[str, Any] = {"opset_version": OPSET, "input_names": ["images"], "output_names": ["features"]}
    if capture:
        shapes = {"images": {0: torch.export.Dim("N")}}
        options |= {"external_data": False, "dynamic_shapes": shapes, "verbose": False}
        program = torch.onnx.export(module, (images,), dynamo=True, **options)
        assert program is not None  # only dynamo=False gives None
        return program.model_proto
    buffer = io.BytesIO()
    options["dynamic_axes"] = {"images": {0: "N"}, "features": {0: "N"}}
    torch.onnx.export(module, (images,), buffer, dynamo=False, **options)  # type: ignore[arg-type]
    return onnx.load_from_string(buffer.getvalue())


def _root(error: BaseException) -> BaseException:
    """The first cause of an error: an exporter wraps its own advice around it."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _lasting(error: BaseException) -> bool:
    """Whether an export that failed with this error will always fail: the exporter does not support the network. Other
    errors, such as a full memory or disk, may not come again.
    """
    kind = type(_root(error))
    of_exporter = kind.__module__.startswith("torch.") and "OutOfMemory" not in kind.__name__
    return of_exporter or kind.__name__ in ("NotImplementedError", "NotImplemented", "InvalidGraph")


def reason(error: BaseException) -> str:
    """The first cause of an error in one line, without colours."""
    error = _root(error)
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return ": ".join([type(error).__name__, *[line for line in lines if line][:1]])


def strip(model: Any) -> None:
    """Remove what an exporter noted about its own machine and code: stack traces, class names, paths.

    An empty text stays as a field, since the digests of a file's parts (`featx.shipping.graph`) include it.
    """
    graph = model.graph
    for entry in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del entry.metadata_props[:]
        entry.doc_string = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress, advice and deprecation notes off the terminal."""
    disabled = logging.root.manager.disable
    with FILTERS, warnings.catch_warnings(action="ignore"):
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
