"""Owns answers from an exported file: onnxruntime, numpy and Pillow alone, for one image or a million."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.devices import available_threads
from featx.errors import ExportError, ImageError, SourceError
from featx.head import answers
from featx.shipping.deployed import Model
from featx.sources.source import EXTENSIONS, read_image
from featx.text import printable

Image = str | Path | bytes | np.ndarray


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one image, or the reason why there is none."""

    id: str
    """The file's path as it was given; `image 7` (counted from 0) for bytes and arrays."""
    probabilities: np.ndarray | None = None
    """`float32 [C]` in [0, 1], in the order of `Model.class_names`; None with an error."""
    top: tuple[tuple[str, float], ...] = ()
    """The `top_k` most probable classes, best first."""
    labels: tuple[str, ...] = ()
    """The answer: one class (softmax), or every class that is probable enough (sigmoid)."""
    accepted: bool | None = None
    """False where the best probability is below the head's threshold; None where it has none."""
    features: np.ndarray | None = None
    """`float32 [D]` where they were asked for."""
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Of `label`, in [0, 1]."""
        return self.top[0][1] if self.top else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: one line of `--json`."""
        if self.error is not None:
            return {"image": self.id, "error": self.error}
        row: dict[str, Any] = {"image": self.id, "label": self.label, "probability": self.probability}
        if self.labels != (self.label,):
            row["labels"] = list(self.labels)
        if self.accepted is not None:
            row["accepted"] = self.accepted
        row["top"] = [{"label": name, "probability": p} for name, p in self.top]
        if self.features is not None:
            row["features"] = [float(x) for x in self.features]
        return row


def predict(
    model: str | Path | Model,
    images: Image | Iterable[Image],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int | None = None,
    features: bool = False,
    **options: Any,
) -> Iterator[Prediction]:
    """One `Prediction` an image, in order, as soon as its batch is done.

    images: a file, a folder (with the folders in it), a glob (`photos/**/*.jpg`), an image file's bytes,
    `uint8 [H, W, 3]` RGB, or an iterable of these, which is read as it is needed: memory does not grow
    with it. workers: decoding threads, by default one a core; they decode the next images while
    onnxruntime computes. options: as for `Model`, where `model` is a path.

    An image that cannot be used gives a prediction with an `error`, and the others go on. Raises
    `ExportError` for a file that featx did not export, `SourceError` for a folder without images.
    """
    if batch_size < 1 or top_k < 1:
        raise ExportError(f"batch_size and top_k start at 1; got {batch_size} and {top_k}")
    opened = model if isinstance(model, Model) else Model(model, **options)
    if features and "features" not in opened.outputs:
        raise ExportError(f"{opened.path} gives {', '.join(opened.outputs)}, and no features")
    return _predict(opened, images, top_k, batch_size, workers or available_threads(), features)


def _predict(
    model: Model, images: Image | Iterable[Image], top_k: int, batch_size: int, workers: int, features: bool
) -> Iterator[Prediction]:
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    todo = enumerate(expand(images))
    executor = ThreadPoolExecutor(workers, thread_name_prefix="featx-decode")
    try:
        while True:
            # one batch to compute now, one to decode meanwhile
            for number, image in islice(todo, 2 * batch_size + workers - len(waiting)):
                name = os.fspath(image) if isinstance(image, str | Path) else f"image {number}"
                waiting.append((name, executor.submit(pixels, model, image)))
            if not waiting:
                return
            yield from _batch(model, waiting, top_k, batch_size, features)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _batch(
    model: Model, waiting: deque[tuple[str, Future[np.ndarray]]], top_k: int, batch_size: int, features: bool
) -> list[Prediction]:
    """Take up to `batch_size` images from the front of the queue and answer them."""
    names: list[str] = []
    errors: dict[int, str] = {}
    arrays: list[np.ndarray] = []
    while waiting and len(names) < batch_size:
        name, future = waiting.popleft()
        try:
            arrays.append(future.result())
        except ImageError as error:
            errors[len(names)] = str(error)
        names.append(name)
    outputs = model(np.stack(arrays), features=features) if arrays else {}
    rows = iter(range(len(arrays)))
    predictions = []
    for i, name in enumerate(names):
        if i in errors:
            predictions.append(Prediction(name, error=errors[i]))
            continue
        row = next(rows)
        vector = outputs["features"][row].copy() if features else None
        # copies: a prediction that is kept does not keep its whole batch
        predictions.append(answer(model, name, outputs["probabilities"][row].copy(), top_k=top_k, features=vector))
    return predictions


def pixels(model: Model, image: Image) -> np.ndarray:
    """What the file takes for one image, and so that images of any size share a batch.

    `uint8 [resize, resize, 3]` around the crop, which the graph's own resize leaves as it is; or
    `uint8 [3, crop, crop]` where the file takes that. Raises `ImageError`.
    """
    data = read_image(image) if isinstance(image, str | Path) else image
    if model.input == "tensor":
        return model.preprocess(data)
    return model.preprocess.square(model.preprocess.decode(data), model.preprocess.resize)


def answer(
    model: Model, id: str, probabilities: np.ndarray, *, top_k: int = 5, features: np.ndarray | None = None
) -> Prediction:
    """What one row of probabilities, `float32 [C]`, says."""
    names = model.class_names
    order = np.argsort(-probabilities, kind="stable")
    top = tuple((names[i], float(probabilities[i])) for i in order[:top_k])
    said = answers(probabilities[None], model.activation)[0]
    labels = tuple(names[i] for i in order if said[i])
    accepted = None
    if model.threshold is not None:  # in single precision, as the graph compares
        accepted = bool(probabilities[order[0]] >= np.float32(model.threshold))
    return Prediction(id, probabilities, top, labels, accepted, features)


def expand(images: Image | Iterable[Image]) -> Iterator[Image]:
    """Single images out of what `predict` takes: folders are walked in order, globs filled in.

    In a folder, images are told by their names, as in class folders; files named one by one may be anything
    that decodes. Raises `SourceError` for a folder or a glob without images.
    """
    if isinstance(images, str | Path | bytes | np.ndarray):
        images = [images]
    for image in images:
        text = os.fspath(image) if isinstance(image, str | Path) else None
        if text is None:
            yield image
        elif os.path.isdir(text):
            yield from _some(_walk(text), f"{printable(text)} has no image in it ({', '.join(EXTENSIONS)})")
        elif glob.has_magic(text) and not os.path.lexists(text):
            found = (path for path in sorted(glob.glob(text, recursive=True)) if not os.path.isdir(path))
            yield from _some(found, f"no file matches {printable(text)}")
        else:
            yield text


def _some(paths: Iterable[str], otherwise: str) -> Iterator[str]:
    empty = True
    for path in paths:
        empty = False
        yield path
    if empty:
        raise SourceError(otherwise)


def _walk(folder: str) -> Iterator[str]:
    """The images in a folder and the folders in it, sorted; hidden ones are left out. Each place is walked once,
    so that links to folders cannot lead round. Raises `SourceError` for a folder that cannot be listed."""
    places: set[str] = set()
    tops = [folder]

    def refuse(error: OSError) -> None:
        raise SourceError(f"{printable(str(error.filename))} cannot be listed ({error.strerror})") from error

    for top in tops:  # links come after all that is really there, which keeps its own names
        for here, folders, files in os.walk(top, onerror=refuse):
            if os.path.realpath(here) in places:
                folders.clear()
                continue
            places.add(os.path.realpath(here))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            for name in sorted(files):
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    yield os.path.join(here, name)


def csv_lines(predictions: Iterable[Prediction], top_k: int) -> Iterator[str]:
    """`--csv`: a header, then a record an image, RFC 4180 but for the line end; every record is as long as the header.

    top_k: as for `predict`, and at most the model's number of classes, or columns stay empty.
    """
    names = ["image", "label", "probability", "accepted", "error"]
    names += [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("label", "probability")]

    def line(values: list[Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\r\n").writerow(values)  # quotes what holds a character of its line end
        return buffer.getvalue().removesuffix("\r\n")

    yield line(names)
    for p in predictions:
        accepted = "" if p.accepted is None else str(p.accepted).lower()
        others = [value for pair in p.top[1:top_k] for value in pair]
        values = [p.id, p.label, p.probability, accepted, p.error, *others]
        yield line(values + [None] * (len(names) - len(values)))


def json_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """`--json`: a JSON object a line, `error` in those without an answer."""
    for p in predictions:
        yield json.dumps(p.to_dict(), ensure_ascii=False)


def table_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """For people: the image, then the classes with their probabilities, best first."""
    for p in predictions:
        if p.error is not None:
            yield f"{printable(p.id)}  {printable(p.error)}"
            continue
        answer = "  ".join(f"{printable(name)} {probability:.3f}" for name, probability in p.top)
        yield f"{printable(p.id)}  {answer}{'  (rejected)' if p.accepted is False else ''}"
