"""Answers from an exported file, for one image or a million; needs onnxruntime, numpy and Pillow alone."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.devices import available_threads
from featx.errors import ExportError, FeatxWarning, ImageError, SourceError
from featx.files import make_folder, open_plain, sweep, write_chunks
from featx.head import answers
from featx.options import count, home
from featx.shipping.deployed import Model
from featx.sources.memory import MISSING, one_by_one
from featx.sources.own import is_own
from featx.sources.source import EXTENSIONS, left_out, read_image
from featx.text import cell, encodable, printable, some
from featx.threads import ahead

Image = Any
"""What `featx.sources.memory` takes."""
# How a file of answers begins.
_ANSWERS = (codecs.BOM_UTF8 + b"image,label,probability", b"image,label,probability", b'{"image": ')


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
    """`float32 [D]` if requested."""
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`, in [0, 1]."""
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
) -> Iterator[Prediction]:
    """One `Prediction` per image, in order, as soon as its batch is done.

    images: a file, a folder (with the folders in it), a glob (`photos/**/*.jpg`), an image file's bytes, a Pillow
    image, an open file (read from its start), `uint8 [H, W, 3]` RGB, a batch `[N, H, W, 3]`, a column of a table, or
    an iterable of these, which is read as it is needed: memory does not grow with it. workers: decoding threads, by
    default one per core; they decode the next images while onnxruntime computes. model: a path, or a `Model` with
    threads, providers or a head of your choice.

    An image that cannot be used gives a prediction with an `error`, and the others go on. Raises
    `ExportError` for a file that featx did not export, `SourceError` for a folder without images and for what is
    no image, such as a number or a mapping.
    """
    batch_size, top_k = count("batch_size", batch_size), count("top_k", top_k)
    workers = count("workers", workers or available_threads())
    opened = model if isinstance(model, Model) else Model(model)
    if features:
        opened.require_features()
    return _predict(opened, images, top_k, batch_size, workers, features)


def _predict(
    model: Model, images: Image | Iterable[Image], top_k: int, batch_size: int, workers: int, features: bool
) -> Iterator[Prediction]:
    def load(numbered: tuple[int, Image]) -> tuple[str, np.ndarray | ImageError]:
        number, image = numbered
        name = image if isinstance(image, str) else f"image {number}"
        try:
            return name, pixels(model, image)
        except ImageError as error:
            return name, error

    # one batch to compute now, one to decode meanwhile
    window, todo = batch_size + workers, enumerate(expand(images))
    with closing(ahead(load, todo, threads=workers, window=window, name="featx-decode")) as loaded:
        while batch := list(islice(loaded, batch_size)):
            arrays = [found for _, found in batch if not isinstance(found, ImageError)]
            outputs = _together(model, arrays, features) if arrays else {}
            rows = iter(range(len(arrays)))
            for name, found in batch:
                if isinstance(found, ImageError):
                    yield Prediction(name, error=str(found))
                    continue
                row = next(rows)
                vector = outputs["features"][row].copy() if features else None
                # copies: a prediction that is kept does not keep its whole batch
                yield answer(model, name, outputs["probabilities"][row].copy(), top_k=top_k, features=vector)


def _together(model: Model, arrays: list[np.ndarray], features: bool) -> dict[str, np.ndarray]:
    """What the file gives for a batch; one by one where sizes differ, as they do around a crop beyond the image."""
    if len({array.shape for array in arrays}) == 1:
        return model(np.stack(arrays), features=features)
    alone = [model(array[None], features=features) for array in arrays]
    return {name: np.concatenate([found[name] for found in alone]) for name in alone[0]}


def pixels(model: Model, image: Image) -> np.ndarray:
    """What the file takes for one image: `Preprocess.fitted`, which the graph's own resize leaves as it is; or
    `uint8 [3, crop, crop]` where the file takes that. Raises `ImageError`.
    """
    if image is None:
        raise ImageError(MISSING)
    data = read_image(image) if isinstance(image, str | Path) else image
    if model.input == "tensor":
        return model.preprocess(data)
    with model.preprocess.decoded(data) as decoded:
        return model.preprocess.fitted(decoded)


def answer(
    model: Model, id: str, probabilities: np.ndarray, *, top_k: int = 5, features: np.ndarray | None = None
) -> Prediction:
    """The answer that one row of probabilities, `float32 [C]`, gives."""
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

    In a folder, images are recognised by their names, as in class folders; files named one by one may be anything
    that decodes. Raises `SourceError` for a folder or a glob without images, and for values that are not images.
    """
    for text in one_by_one(images):
        if not isinstance(text, str):
            yield text
            continue
        text = os.fspath(home(text))
        found = iter([text])
        if os.path.isdir(text):
            found, lacking = _walk(text), f"{printable(text)} has no image in it ({', '.join(EXTENSIONS)})"
        elif glob.has_magic(text) and not os.path.lexists(text):
            found = (path for path in sorted(glob.glob(text, recursive=True)) if not os.path.isdir(path))
            lacking = f"no file matches {printable(text)}"
        first = next(found, None)
        if first is None:
            raise SourceError(lacking)
        yield first
        yield from found


def _walk(folder: str) -> Iterator[str]:
    """The images in a folder and the folders in it, sorted; hidden ones, and those that featx wrote, are left out.

    Each folder is walked once, so that links cannot go round in circles. Pictures of other kinds are named in a
    warning, at the end. Raises `SourceError` for a folder that cannot be listed.
    """
    places: set[str] = set()
    others: dict[str, list[str]] = {}
    tops = [folder]

    def refuse(error: OSError) -> None:
        raise SourceError(f"{printable(str(error.filename))} cannot be listed ({error.strerror})") from error

    for top in tops:  # links come after all that is really there, which keeps its own names
        for here, folders, files in os.walk(top, onerror=refuse):
            if os.path.realpath(here) in places:
                folders.clear()
                continue
            places.add(os.path.realpath(here))
            found = sorted(name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
            if here != folder and is_own(here, folders, found, files):
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            for name in found:
                yield os.path.join(here, name)
            for name in sorted(set(files) - set(found)):
                if not name.startswith(".") and (why := left_out(name)):
                    others.setdefault(why, []).append(os.path.join(here, name))

    for why, names in others.items():
        warnings.warn(f"left out {some(names)}: {why}", FeatxWarning, stacklevel=1)


def csv_lines(predictions: Iterable[Prediction], top_k: int, several: bool = False) -> Iterator[str]:
    """`--csv`: a header, then a record per image, RFC 4180 without the line end; every record is as long as the header.

    top_k: as for `predict`, and at most the model's number of classes, or columns stay empty. several: of a model that
    gives an image several labels, or none: a column `labels` as in a manifest, `ant|outdoor`, or a lone `|`.
    """
    names = ["image", "label", "probability", *["labels"] * several, "accepted", "error"]
    names += [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("label", "probability")]

    def line(values: list[Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="").writerow(map(cell, values))
        return buffer.getvalue()

    yield line(names)
    for p in predictions:
        accepted = "" if p.accepted is None else str(p.accepted).lower()
        others = [value for pair in p.top[1:top_k] for value in pair]
        labels = ["|".join(p.labels) or ("" if p.error else "|")] * several
        values = [p.id, p.label, p.probability, *labels, accepted, p.error, *others]
        yield line(values + [None] * (len(names) - len(values)))


def json_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """`--json`: a JSON object per image; those without an answer have an `error`."""
    for p in predictions:
        yield json.dumps(p.to_dict(), ensure_ascii=False)


def table_lines(predictions: Iterable[Prediction], several: bool = False) -> Iterator[str]:
    """For people: the image, its labels where there may be `several`, the classes with their probabilities."""
    for p in predictions:
        if p.error is not None:
            yield f"{printable(p.id)}  {printable(p.error)}"
            continue
        answer = "  ".join(f"{printable(name)} {probability:.3f}" for name, probability in p.top)
        labels = f"{'|'.join(map(printable, p.labels)) or 'no label'}  " if several else ""
        yield f"{printable(p.id)}  {labels}{answer}{'  (rejected)' if p.accepted is False else ''}"


def write_lines(path: str | Path, lines: Iterable[str], *, marked: bool = False) -> Path:
    """Write answers as one file, which is there as a whole or not at all; it replaces answers, and nothing else.

    marked: with the byte order mark by which spreadsheets know UTF-8. Raises `ExportError`.
    """
    path = Path(home(path))
    if path.exists():
        with open_plain(path) as file:
            if not file.read(64).startswith(_ANSWERS):
                raise ExportError(
                    f"{path} was not written by featx predict, and is not replaced; give another --output"
                )
    make_folder(path.parent)
    sweep(path.parent)
    mark, data = [codecs.BOM_UTF8] * marked, (f"{encodable(line)}\n".encode() for line in lines)
    return write_chunks(path.parent, chain(mark, data), lambda: path.name)
