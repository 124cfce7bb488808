"""int8 and fp16 files, refused if they are not faster than fp32 here, or lose or change too many answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

import numpy as np

from featx.devices import available_threads
from featx.engines.int8 import quantized
from featx.errors import ExportError
from featx.features import distances
from featx.head import Head
from featx.options import Clustered, Input, Reduced, Split
from featx.runs import Run, open_run
from featx.shipping import graph
from featx.shipping.deployed import open_session
from featx.shipping.exporting import DEFAULT, backbone_path, free_path, metadata, put, require_float
from featx.shipping.gate import BATCH, CHANGED, IMAGES, LOST, Images, allowed_images, batches, gate_images
from featx.state import ordinary

if TYPE_CHECKING:
    from onnx import ModelProto

PRECISIONS = get_args(Reduced)
CALIBRATION = 128
"""Training images that int8 ranges are taken from."""
ROUNDS = 5


@dataclass(frozen=True)
class Reduction:
    """What a smaller file costs and gains compared with fp32, on this machine and the run's images."""

    precision: str
    images: int
    accuracy: float
    fp32_accuracy: float
    lost: int
    """Right answers that fp32 gives and the file does not, less those that only the file gives."""
    allowed: int
    """Right answers that may be lost."""
    equal_labels: int
    allowed_changes: int
    """Images whose answer may differ."""
    max_probability_difference: float
    feature_distance: float
    """How far an image's features are from fp32's, relative to their length: the median."""
    max_feature_distance: float
    images_per_second: float
    """The whole graph after the resize, in batches of `batch`; the best of five rounds."""
    fp32_images_per_second: float
    batch: int
    cores: int

    @property
    def speedup(self) -> float:
        return self.images_per_second / self.fp32_images_per_second

    @property
    def changed(self) -> int:
        """Images with another answer than fp32's, right or wrong."""
        return self.images - self.equal_labels

    @property
    def faults(self) -> list[str]:
        """Why the file is not written; empty where it is."""
        found = {
            "is not faster here": self.speedup <= 1,
            "loses too many answers (--max-loss allows more)": self.lost > self.allowed,
            "changes too many answers (--max-changed allows more)": self.changed > self.allowed_changes,
        }
        return [fault for fault, there in found.items() if there]

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "speedup": self.speedup, "changed": self.changed, **asdict(self)}

    def text(self) -> str:
        """The measurement in a sentence."""
        return (
            f"{self.precision} runs {self.images_per_second:.1f} images/s, fp32 {self.fp32_images_per_second:.1f} "
            f"({self.speedup:.2f} times), and is right on {self.accuracy:.4f} of {self.images} images, fp32 on "
            f"{self.fp32_accuracy:.4f} ({self.lost} right answers lost, {self.allowed} allowed; "
            f"{self.changed} answers changed, {self.allowed_changes} allowed; features {self.feature_distance:.3f} of "
            f"their length off at the median, {self.max_feature_distance:.3f} at most)"
        )


@ordinary()
def export_reduced(
    run: str | Path | Run,
    precision: Reduced,
    *,
    output: str | Path | None = None,
    input: Input = "pixels",
    outputs: tuple[str, ...] | None = None,
    images: int = IMAGES,
    split: Split = "val",
    data: str | Path | None = None,
    max_loss: float = LOST,
    max_changed: float = CHANGED,
    providers: list[str] | None = None,
    factory: str | None = None,
    weights: str | Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **cluster: Unpack[Clustered],
) -> Reduction:
    """Write a run as an ONNX file in `int8` or `fp16`, by default `model-int8.onnx` in its folder.

    The backbone is made smaller, the head stays in float. int8 takes its ranges from up to 128 training
    images. The file is written if it is faster than fp32 on this machine (on `providers`; for fp16 a
    GPU's), loses no more right answers than 2 images or `max_loss` points of them, and changes no more answers than
    2 images or `max_changed` points. Otherwise `ExportError` gives the figures. clock: seconds, to measure speed by.
    Other arguments as for `export`.
    """
    opened = open_run(run, factory, weights)
    if precision not in PRECISIONS:
        raise ExportError(f"precision is {' or '.join(PRECISIONS)}, not {precision!r}")
    require_float(opened)
    if input == "features":
        raise ExportError("a head alone stays in float: there is no backbone to make smaller")
    path = free_path(opened, output, DEFAULT[input].replace(".onnx", f"-{precision}.onnx"))
    chosen = gate_images(opened, images, split, data, **cluster)
    if not chosen.known:
        raise ExportError(
            f"an {precision} file is judged by right answers on images that the head has not seen, and it may "
            f"have learned from these: the images or labels of {data or opened.config.data} are not those that "
            f"{opened.path} was fitted on; give --data FOLDER of others, or fit again"
        )

    head, source = opened.head, backbone_path(opened)
    if precision == "int8":
        ranges = batches(gate_images(opened, CALIBRATION, "train", data))
        small = graph.parse(quantized(source, (np.stack([crop for _, crop in batch]) for batch in ranges)), source)
    else:
        small = halved(graph.load(source))
    model, fp32 = (
        graph.build(backbone, head, chosen.spec.preprocess, input=input, outputs=outputs)
        for backbone in (small, graph.load(source))
    )
    limits = {"max_loss": max_loss, "max_changed": max_changed}
    found = measure(model, fp32, chosen, head, precision=precision, **limits, providers=providers, clock=clock)
    require(found)

    record = found.to_dict() | {"split": chosen.split}
    entries = metadata(opened, model, input, graph.part_digests(model.graph), record, precision)
    put(model, path, entries, record)
    return found


def halved(backbone: ModelProto) -> ModelProto:
    """The backbone in fp16, features in float32. Changes `backbone`."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    small: ModelProto = convert_float_to_float16(backbone, keep_io_types=True)
    return small


def measure(
    model: ModelProto,
    fp32: ModelProto,
    images: Images,
    head: Head,
    *,
    precision: str,
    max_loss: float = LOST,
    max_changed: float = CHANGED,
    providers: list[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Reduction:
    """Run both files on the same images, and time both. max_loss, max_changed: in points; 100 is all images."""
    resizes = graph.resizes(model)
    files = [open_session(graph.opened_up(m, pixels=not resizes), providers=providers) for m in (model, fp32)]
    names = ["probabilities", graph.FEATURES_VALUE]
    found: list[list[list[np.ndarray]]] = [[], []]
    for batch in batches(images):
        for file, rows in zip(files, found, strict=True):
            for image, crop in batch:
                feed = {"images": image[None]} if resizes else {graph.PIXELS: crop[None]}
                rows.append(file.run(names, feed))
    del files

    (small, features), (large, reference) = (map(np.concatenate, zip(*rows, strict=True)) for rows in found)
    apart = distances(features, reference)
    said = [head.answers(probabilities) for probabilities in (small, large)]
    right = [images.right(head.class_names, answers) for answers in said]
    sessions = [open_session(graph.opened_up(m, pixels=True), providers=providers) for m in (model, fp32)]
    speeds = measure_speeds(sessions, images.spec.preprocess.crop, clock)
    return Reduction(
        precision=precision,
        images=len(small),
        accuracy=float(right[0].mean()),
        fp32_accuracy=float(right[1].mean()),
        lost=int(right[1].sum()) - int(right[0].sum()),
        allowed=allowed_images(len(small), max_loss),
        equal_labels=int((said[0] == said[1]).all(axis=1).sum()),
        allowed_changes=allowed_images(len(small), max_changed),
        max_probability_difference=float(np.abs(small - large).max()),
        feature_distance=float(np.median(apart)),
        max_feature_distance=float(apart.max()),
        images_per_second=speeds[0],
        fp32_images_per_second=speeds[1],
        batch=BATCH,
        cores=available_threads(),
    )


def measure_speeds(sessions: list[Any], crop: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Images per second of each session, which take turns, so that other work on the machine slows down all."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 3, crop, crop), dtype=np.uint8)
    best = [float("inf")] * len(sessions)
    for _ in range(ROUNDS):
        for i, session in enumerate(sessions):
            begin = clock()
            session.run(["probabilities"], {graph.PIXELS: pixels})
            best[i] = min(best[i], clock() - begin)
    return [BATCH / seconds for seconds in best]


def require(found: Reduction) -> None:
    """Raise `ExportError` with the figures where a smaller file does not pay."""
    if found.faults:
        why = " and ".join(found.faults)
        raise ExportError(f"{found.precision} {why}: {found.text()}. Nothing was written; use fp32")
