"""Owns the parity gate: what an exported file answers for a run's images, held to the torch classifier."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featx.devices import available_threads
from featx.errors import ExportError, ImageError
from featx.extraction.result import Extraction
from featx.features import Features, content_key, cosines, difference
from featx.files import write_atomic
from featx.head import MULTILABEL, Head
from featx.head import answers as answered
from featx.pixels.preprocess import CLOSE, EXACT, GPU, Preprocess
from featx.shipping.graph import FEATURES_VALUE, PIXELS

IMAGES = 2000
"""Images that the gate looks at, at most."""
# Through the file's own resize, whose pixels are up to 1 level from Pillow's. Features: see
# `resized_difference`. Measured with SqueezeNet's real weights, the worst image of 397 photographs was 0.004
# off, of 50 at a twelfth of their brightness 0.013, of 50 thumbnails of 64 x 48 pixels 0.011. Half of the
# photographs or more were off by 0.15 without antialiasing, 0.11 with the other interpolation, 0.13 for one
# pixel in the resize to 256, and 0.55 with red and blue exchanged.
FEATURES = 3e-2
PROBABILITIES = 5e-3
# From identical pixels; single precision alone differs. A logit is a sum of products, and is known to a
# few units in the last place of the sum of their sizes, which is what large weights scale the limit by.
SAME_FEATURES = 1e-5
SAME_PROBABILITIES = 1e-5
SAME_SUM = 1e-6
# Cached features against torch's, by the precision they were computed in.
CACHED = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 5e-2}
BATCH = 32
NAMES = ["probabilities", "logits", FEATURES_VALUE]

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a run that the gate looks at."""

    ids: list[str]
    labels: list[tuple[str, ...]]
    """Their true classes: one each, or any number."""
    keys: np.ndarray
    """`uint8 [M, 32]`, in the order of their hashes, distinct."""
    cached: np.ndarray
    """`float32 [M, D]`: the features that the head was fitted and measured on."""
    precision: str
    """That these were computed in."""
    spec_digest: str
    """Of what they are: two decoders give other pixels to one graph."""
    read: Callable[[int], bytes]
    """The bytes of image i."""
    pixels: str = EXACT
    """What the cached features were decoded by."""
    split: str | None = None
    """Which of the run's splits they are; None where its data are others now, whose splits are not the run's."""
    unseen: bool = False
    """In that case, whether the head is known to have learned from none of them."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The features of the same images, three ways. `float32 [M, D]` each."""

    file: np.ndarray | None
    """By the file, from the decoded image, through its own resize; None where it has none."""
    same: np.ndarray
    """By the file's backbone, from the pixels that the head was trained on."""
    torch: np.ndarray
    """By torch, from these pixels."""


@dataclass(frozen=True)
class Check:
    """One number and the limit that it must not exceed."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN does not


@dataclass(frozen=True)
class Parity:
    """What the gate found; `parity.json`, and the short of it in the file's metadata."""

    images: int
    method: str
    """`file`: every image went through the file and through torch. `head`: the backbone part is the one that
    was verified on the same images before, and the head alone was run, on the features found then."""
    accuracy: float | None
    """Of the file; all of an image's labels right, where it may have several. None where the images are no split
    of the run's, and the head may have learned from them."""
    torch_accuracy: float | None
    equal_labels: int
    """Images whose answer is the torch classifier's."""
    ties: list[str] = field(default_factory=list)
    """Ids of images with another answer that torch holds as good as equally probable."""
    differing: list[str] = field(default_factory=list)
    """Ids of images with another answer for no such reason."""
    max_logit_difference: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["checks"] = {c.name: {"value": c.value, "limit": c.limit} for c in self.checks}
        return {"passed": self.passed, **values}

    def failures(self) -> str:
        """What exceeds its limit, for a message."""
        return "; ".join(f"{c.name} {c.value:.3g} (limit {c.limit:.3g})" for c in self.checks if not c.passed)


def choose(extraction: Extraction, features: Features, split: str, limit: int) -> Images:
    """Up to `limit` distinct labelled images of a split, those with the smallest content hashes.

    Raises `ExportError` where there are none.
    """
    rows = np.flatnonzero((features.splits == split) & features.labelled)
    if not len(rows):
        counts = {name: int((features.splits == name).sum()) for name in ("train", "val", "test")}
        there = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ExportError(
            f"the run has no {split} images to hold the file to ({there}); check against others with "
            "--split train, or --data FOLDER of other labelled images"
        )
    keys = np.ascontiguousarray(features.keys[rows])
    _, first = np.unique(keys.view("V32").ravel(), return_index=True)
    order = np.lexsort(keys[first].T[::-1])[:limit]
    rows = rows[first[order]]
    names = features.class_names
    if features.y.ndim == 2:
        labels = [tuple(names[c] for c in np.flatnonzero(features.y[i])) for i in rows]
    else:
        labels = [(names[features.y[i]],) for i in rows]
    numbers = extraction.numbers[rows].tolist()
    return Images(
        ids=[features.ids[i] for i in rows],
        labels=labels,
        keys=features.keys[rows],
        cached=np.asarray(features.take(rows).X, np.float32),
        precision=features.spec.precision,
        spec_digest=features.spec.digest,
        read=lambda i: extraction.source.read(numbers[i]),
        pixels=features.spec.preprocess.pixels,
        split=split,
    )


def batches(images: Images, preprocess: Preprocess) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Of every image, in order: `uint8 [H, W, 3]` as decoded, and `uint8 [3, crop, crop]` as trained on."""

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            data = images.read(i)
            if content_key(data) != images.keys[i].tobytes():
                raise ImageError("has changed since it was listed")
            image = preprocess.decode(data)
            return np.asarray(image), preprocess(image)
        except ImageError as error:
            raise ExportError(f"{images.ids[i]}, which the file is to be held to: {error}") from error

    numbers = range(len(images.ids))
    with ThreadPoolExecutor(available_threads()) as executor:
        for start in range(0, len(numbers), BATCH):
            yield list(executor.map(load, numbers[start : start + BATCH]))


def run_file(
    images: Images, preprocess: Preprocess, file: Any, same: Any, torch: Callable[[np.ndarray], np.ndarray]
) -> tuple[Rows, Outputs, Outputs]:
    """Every image through the file and through torch.

    file: an onnxruntime session that takes each image in its own size; None for a file that takes pixels
    already cropped. same: one that enters at `graph.PIXELS`. Both give `NAMES`. torch: `uint8 [B, 3, crop,
    crop]` -> `float32 [B, D]`. Returns the features, and what the two sessions gave.
    """
    through: list[list[np.ndarray]] = []
    cropped: list[list[np.ndarray]] = []
    reference: list[np.ndarray] = []
    with tqdm(None, "parity", len(images.ids), unit=" images", disable=None) as progress:
        for batch in batches(images, preprocess):
            crops = np.stack([crop for _, crop in batch])
            cropped.append(same.run(NAMES, {PIXELS: crops}))
            reference.append(torch(crops))
            if file is not None:
                through += [file.run(NAMES, {"images": image[None]}) for image, _ in batch]
            progress.update(len(batch))
    same_outputs = _joined(cropped)
    outputs = _joined(through) if file is not None else same_outputs
    resized = outputs[FEATURES_VALUE] if file is not None else None
    return Rows(resized, same_outputs[FEATURES_VALUE], np.concatenate(reference)), outputs, same_outputs


def run_head(rows: Rows, session: Any) -> tuple[Outputs, Outputs]:
    """What a head alone gives for features found before: through the file's resize, and from the same pixels."""
    names = NAMES[:2]
    same = dict(zip(names, session.run(names, {"features": rows.same}), strict=True))
    if rows.file is None:
        return same, same
    return dict(zip(names, session.run(names, {"features": rows.file}), strict=True)), same


def _joined(parts: list[list[np.ndarray]]) -> Outputs:
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(NAMES)}


def compare(
    images: Images,
    head: Head,
    rows: Rows,
    file: Outputs,
    same: Outputs,
    *,
    class_names: list[str],
    method: str,
    tolerance: float = PROBABILITIES,
) -> Parity:
    """Hold what a file gave to the torch classifier.

    class_names: as the file names its outputs; answers are compared by name. tolerance: on the
    probabilities through the file's own resize, in [0, 1], and on the features where it is above their limit.
    An answer may differ only where torch's own two probabilities are nearer to each other than twice the
    tolerance, so that either of them could win.
    """
    logits = head(rows.torch)
    probabilities = head.probabilities(logits)
    size = float((np.abs(rows.torch) @ np.abs(head.weight.T) + np.abs(head.bias)).max())

    # Features have a limit of their own; what a head with large weights makes of a difference within it is
    # no fault of the file. A sigmoid or softmax is at most half as steep as its logits.
    own = head(rows.same)
    exact = max(SAME_PROBABILITIES, _far(head.probabilities(own), probabilities) + SAME_SUM * size / 2)

    mine = answers(file["probabilities"], class_names, head.activation)
    theirs = answers(probabilities, list(head.class_names), head.activation)
    others = np.flatnonzero([a != b for a, b in zip(mine, theirs, strict=True)]).tolist()
    gap = 2 * (exact if rows.file is None else tolerance)
    tied = {i for i in others if _apart(head, probabilities[i], set(mine[i]) ^ set(theirs[i])) <= gap}

    checks = [Check("labels", float(len(others) - len(tied)), 0.0)]
    if rows.file is not None:
        checks += [
            Check("features", resized_difference(rows.file, rows.torch), max(FEATURES, tolerance)),
            Check("probabilities", _far(file["probabilities"], probabilities), tolerance),
        ]
    checks += [
        Check("same-pixel features", difference(rows.same, rows.torch), SAME_FEATURES),
        Check("same-feature logits", _far(same["logits"], own), SAME_SUM * size),
        Check("same-pixel probabilities", _far(same["probabilities"], probabilities), exact),
        _cached(images, rows),
    ]

    truth = [tuple(sorted(label)) for label in images.labels]
    right = [float(np.mean([a == b for a, b in zip(given, truth, strict=True)])) for given in (mine, theirs)]
    known = images.split is not None or images.unseen
    return Parity(
        images=len(images.ids),
        method=method,
        accuracy=right[0] if known else None,
        torch_accuracy=right[1] if known else None,
        equal_labels=len(images.ids) - len(others),
        ties=[images.ids[i] for i in others if i in tied],
        differing=[images.ids[i] for i in others if i not in tied],
        max_logit_difference=_far(file["logits"], logits),
        checks=checks,
    )


def _far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def _apart(head: Head, probabilities: np.ndarray, names: set[str]) -> float:
    """How far one image's `[C]` lie from giving these classes to either of two answers; infinity for unknown ones."""
    if not names <= set(head.class_names):
        return math.inf
    p = [float(probabilities[head.class_names.index(name)]) for name in names]
    return max(abs(x - MULTILABEL) * 2 for x in p) if head.activation == "sigmoid" else max(p) - min(p)


def resized_difference(rows: np.ndarray, reference: np.ndarray) -> float:
    """The worst image's distance between its two rows, `[N, D]` each, relative to the length of its reference.

    A row that is shorter than half of all are (an almost black image's, say) counts as long as the median one.
    """
    lengths = np.linalg.norm(reference, axis=1)
    scale = np.maximum(np.maximum(lengths, np.median(lengths)), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(rows - reference, axis=1) / scale).max())


def _cached(images: Images, rows: Rows) -> Check:
    """The features that the head was fitted on, held to torch's from Pillow's pixels, which an application has.

    From a GPU's pixels they are others by as much as the extraction allows, which a cosine says.
    """
    if images.pixels == GPU:
        return Check("cached features, 1 - cosine", 1 - float(cosines(images.cached, rows.torch).min()), 1 - CLOSE)
    return Check("cached features", difference(images.cached, rows.torch), CACHED[images.precision])


def answers(probabilities: np.ndarray, names: list[str], activation: str) -> list[tuple[str, ...]]:
    """What each row of probabilities `[N, C]` says: one class, or the sorted classes that are probable enough."""
    return [tuple(sorted(names[i] for i in np.flatnonzero(row))) for row in answered(probabilities, activation)]


def verified_path(cache: Path, images: Images, parts: dict[str, str]) -> Path:
    """Where the rows of these images and this backbone part are kept once they passed the gate."""
    import onnxruntime

    identity = [images.spec_digest, parts["preprocess"], parts["backbone"], onnxruntime.__version__]
    identity.append(images.keys.tobytes().hex())
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return cache / "engines" / f"{digest[:32]}.verified.npz"


def save_rows(path: Path, images: Images, rows: Rows) -> None:
    """Keep rows that passed, so that the next head is held to them without running the backbone."""
    buffer = io.BytesIO()
    arrays = {"keys": images.keys, "same": rows.same, "torch": rows.torch}
    if rows.file is not None:
        arrays["resized"] = rows.file
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def load_rows(path: Path, images: Images) -> Rows | None:
    """The rows that `save_rows` kept for these images; None where there are none, or not these."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    rows = [arrays[name] for name in ("resized", "same", "torch") if name in arrays]
    if any(a.shape != images.cached.shape or a.dtype != np.float32 for a in rows):
        return None
    if not {"keys", "same", "torch"} <= set(arrays) or not np.array_equal(arrays["keys"], images.keys):
        return None
    return Rows(arrays.get("resized"), arrays["same"], arrays["torch"])
