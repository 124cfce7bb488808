"""The parity gate: compares what an exported file answers for a run's images with the torch classifier's answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from featx import metrics
from featx.errors import ParityError
from featx.features import cosines, difference, distances
from featx.files import MOST_NETWORK_BYTES, read_plain, write_atomic
from featx.head import MULTILABEL, Head, columns
from featx.pixels.preprocess import CLOSE, GPU
from featx.records import TENSOR_SEAL, convert, tensor_metadata
from featx.runs import Run
from featx.seals import seal
from featx.shipping import graph
from featx.shipping.deployed import open_session
from featx.shipping.gate import CHANGED, Images, allowed_images, batches
from featx.text import some

if TYPE_CHECKING:
    from onnx import ModelProto

# Through the file's own resize. Levels: see `Preprocess.render`; a bilinear resize to 256 differs by 1 on photographs,
# to 232 or 480 by 2, and so do bicubic ones and noise; none of 1,900 images differed by more.
LEVELS = 2
# Features: see `distances`. Measured with SqueezeNet's real weights, the worst image of 397 photographs was 0.004
# off, the worst of 50 dark ones (a twelfth of the brightness) 0.013, of 50 thumbnails of 64 x 48 pixels 0.011. At
# least half of the photographs were off by 0.15 without antialiasing, 0.11 with the other interpolation, 0.13 for one
# pixel in the resize to 256, and 0.55 with red and blue exchanged.
FEATURES = 3e-2
# Probabilities: of SqueezeNet's own 1,000 classes the worst image of 396 photographs was 0.006 off, of dark ones 0.011,
# of thumbnails 0.015; of two classes, by heads of any regularisation, 0.009. Of 50 photographs 0.34 without
# antialiasing, 0.19 with the other interpolation, 0.28 for 257.
PROBABILITIES = 5e-2
# From identical pixels; single precision alone differs. A logit is a sum of products, and is known to a
# few units in the last place of the sum of their sizes, which is what large weights scale the limit by. A softmax or
# sigmoid is at most half as steep as its logits, so this limit ends where rounding moves a probability by `ROUNDING`.
SAME_FEATURES = 1e-5
SAME_PROBABILITIES = 1e-5
SAME_SUM = 1e-6
ROUNDING = 5e-3
# Cached features against torch's.
CACHED = 2e-3
# The same in less than fp32, where the worst image says little: of 100 photographs the median was 0.009 off in bf16
# with SqueezeNet and 0.040 with EfficientNet-Lite0, the worst 0.013 and 0.109 (see `distances`), which is as far as
# wrong pixels are. So the answers decide, and the median, which wrong pixels move by 0.11 or more.
CACHED_MEDIAN = 0.1


Outputs = dict[str, np.ndarray]
"""What a session gave, by the names of the values."""


@dataclass(frozen=True, eq=False)
class ThreeWays:
    """The features of the same images, computed three ways. `float32 [M, D]` each."""

    exported: np.ndarray
    """By the file: from the decoded image where it resizes by itself, otherwise from Pillow's pixels."""
    same: np.ndarray
    """By torch, from the pixels that the file's backbone saw."""
    torch: np.ndarray
    """By torch, from Pillow's pixels, which the head was trained on."""
    levels: np.ndarray | None = None
    """`uint8 [M + 1]`: how far the pixels of the file's own resize are from Pillow's, at most, of each image and one of
    noise; None where it has none."""


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
    """What was compared, and the result: `parity.json`. The metadata of the file have it in short."""

    images: int
    method: str
    """`file`: every image went through the file and through torch. `head`: the backbone was verified on the same
    images before; only the head was run, on the features found then. `cached`: an int8 run's file, compared with the
    head's answers for the cached features."""
    accuracy: float | None
    """The file's; where an image may have several labels, all must be right. None where the head may have
    learned from these images (`Images.known`)."""
    torch_accuracy: float | None
    """The torch classifier's; an int8 run's, by its cached features."""
    equal_labels: int
    """Images for which the file's answer is the torch classifier's."""
    ties: list[str] = field(default_factory=list)
    """Ids of images with another answer that the file's resize alone explains: torch gives it for the same pixels,
    or, to single precision, both answers the same probability."""
    differing: list[str] = field(default_factory=list)
    """Ids of all other images with another answer."""
    max_logit_difference: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def missed(self) -> list[Check]:
        """Checks that exceed their limits."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        return not self.missed

    def to_dict(self) -> dict[str, Any]:
        checks = {c.name: {"value": c.value, "limit": c.limit} for c in self.checks}
        return {"passed": self.passed, **asdict(self), "checks": checks}

    def text(self) -> str:
        """For people."""
        how = "the head alone, its backbone being verified" if self.method == "head" else "from file to label"
        other = "int8 features in the cache" if self.method == "cached" else "torch classifier"
        scores = "no accuracy: the data have changed since the fit, and the head may have learned from these images"
        if self.accuracy is not None:
            scores = f"accuracy of the file {self.accuracy:.4f}, of the {other} {self.torch_accuracy:.4f}"
        equal = f"equal answers {self.equal_labels} of {self.images}"
        lines = [f"compared with the {other} on {self.images} images, {how}", scores, equal]
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            value, limit = (
                f"{x:.0f}" if x.is_integer() else f"{x:{form}}"
                for x, form in ((check.value, ".2e"), (check.limit, ".0e"))
            )
            lines.append(f"  {check.name:<{width}}  {value:<8}  (limit {limit})")
        return "\n".join(lines)

    def failures(self) -> str:
        """What exceeds its limit and which answers differ, for a message."""
        text = "; ".join(f"{c.name} {c.value:.3g} (limit {c.limit:.3g})" for c in self.missed) + "."
        if self.differing:
            text += f" Answers differ for {len(self.differing)}: {some(self.differing)}."
        return text


def verify(
    run: Run, model: ModelProto, images: Images, *, tolerance: float | None = None, parts: dict[str, str] | None = None
) -> Parity:
    """Compare a file with the torch classifier on these images.

    tolerance: see `compare`. parts: the file's `graph.part_digests`, where its backbone counts as verified if these
    parts passed on the same images before: then the head alone is run, without torch.
    """
    kept = rows_path(run, images, parts) if parts else None
    if [value.name for value in model.graph.input] == ["features"]:
        rows: ThreeWays | None = ThreeWays(images.cached, images.cached, images.cached)
    else:
        rows = load_rows(kept) if kept else None
    method = "file" if rows is None else "head"
    if rows is None:
        rows, file = run_file(run, model, images)
    else:
        file = run_head(run.head, rows, images)

    found = compare(images, run.head, rows, file, method=method, tolerance=tolerance)
    if kept and method == "file" and found.passed:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next export a full comparison
            save_rows(kept, rows)
    return found


def run_file(run: Run, model: ModelProto, images: Images) -> tuple[ThreeWays, Outputs]:
    """Every image through the file and through torch: the features, and what the file gave for each image."""
    from featx.classifier import load

    classifier, whole = load(run), open_session(graph.opened_up(model))
    # beside the whole file, whose optimised graph stays as it ships
    resize = open_session(graph.resize_alone(model)) if graph.resizes(model) else None
    file: list[list[np.ndarray]] = []
    same: list[np.ndarray] = []
    reference: list[np.ndarray] = []
    levels: list[np.ndarray] = []

    with tqdm(None, "parity", len(images.source), unit=" images", disable=None) as progress:
        for batch in batches(images):
            crops = np.stack([crop for _, crop in batch])
            reference.append(classifier.features(crops))
            feeds = [{"images": crops}] if resize is None else [{"images": image[None]} for image, _ in batch]
            file += [whole.run(graph.INNER, feed) for feed in feeds]
            if resize is not None:
                own = np.concatenate([resize.run([graph.PIXELS], feed)[0] for feed in feeds])
                same.append(classifier.features(own))
                levels.append(_levels(own, crops))
            progress.update(len(batch))
    if resize is not None:  # all images may be smaller than what they are resized to, where antialiasing does nothing
        preprocess = images.spec.preprocess
        noise = np.random.default_rng(0).integers(0, 256, (3 * preprocess.resize, 2 * preprocess.resize, 3), np.uint8)
        levels.append(_levels(resize.run([graph.PIXELS], {"images": noise[None]})[0], preprocess(noise)[None]))

    outputs = {name: np.concatenate([part[k] for part in file]) for k, name in enumerate(graph.INNER)}
    torch = np.concatenate(reference)
    if resize is None:
        return ThreeWays(outputs[graph.FEATURES_VALUE], torch, torch), outputs
    return ThreeWays(outputs[graph.FEATURES_VALUE], np.concatenate(same), torch, np.concatenate(levels)), outputs


def _levels(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.asarray((np.maximum(pixels, others) - np.minimum(pixels, others)).max(axis=(1, 2, 3)))


def run_head(head: Head, rows: ThreeWays, images: Images) -> Outputs:
    """What the head alone gives for the file's features found before."""
    names = ("probabilities", "logits")
    model = graph.build(None, head, images.spec.preprocess, input="features", outputs=names)
    session = open_session(model.SerializeToString(), threads=1)
    return dict(zip(names, session.run(names, {"features": rows.exported}), strict=True))


def compare(
    images: Images, head: Head, rows: ThreeWays, file: Outputs, *, method: str, tolerance: float | None = None
) -> Parity:
    """Compare what a file gave with the torch classifier.

    From the pixels that the file saw, torch must answer as the file does, to single precision; so what is left of the
    difference from its answers to Pillow's pixels is the resize's doing. tolerance: the limit of this difference in
    probabilities, in [0, 1], instead of `PROBABILITIES`, and that in features where it is above `FEATURES`. Raises
    `ParityError` for weights so large that single precision cannot give their answers.
    """
    size = sum_of_sizes(head, rows.torch)
    logits, own = head(rows.torch), head(rows.exported)
    probabilities, same = head.probabilities(logits), head.probabilities(head(rows.same))
    # Features have a limit of their own; if a head with large weights magnifies a difference within it, that is
    # not the file's fault.
    exact = min(ROUNDING, max(SAME_PROBABILITIES, far(head.probabilities(own), same) + SAME_SUM * size / 2))

    mine, theirs, alike = (head.answers(p) for p in (file["probabilities"], probabilities, same))
    others = np.flatnonzero((mine != theirs).any(axis=1)).tolist()
    differs = mine != alike
    tied = [i for i in others if not differs[i].any() or _apart(head, same[i, differs[i]]) <= 2 * exact]

    most = PROBABILITIES if tolerance is None else tolerance
    checks = [Check("labels", float(len(others) - len(tied)), 0.0)]
    if rows.levels is not None:
        checks += [
            Check("pixels", float(rows.levels.max()), float(LEVELS)),
            Check("features", float(distances(rows.exported, rows.torch).max()), max(FEATURES, tolerance or 0.0)),
            Check("probabilities", far(file["probabilities"], probabilities), most),
        ]
    checks += [
        Check("same-pixel features", difference(rows.exported, rows.same), SAME_FEATURES),
        Check("same-feature logits", far(file["logits"], own), SAME_SUM * size),
        Check("same-pixel probabilities", far(file["probabilities"], same), exact),
        *_cached(images, head, rows),
    ]
    # a cache that was emptied may hold another engine's features today
    checks += as_reported(images, head, far(head(images.cached), logits) + SAME_FEATURES * size)

    right = [float(images.right(head.class_names, answers).mean()) for answers in (mine, theirs)]
    ids = images.source.ids
    return Parity(
        images=len(ids),
        method=method,
        accuracy=right[0] if images.known else None,
        torch_accuracy=right[1] if images.known else None,
        equal_labels=len(ids) - len(others),
        ties=[ids[i] for i in tied],
        differing=[ids[i] for i in others if i not in tied],
        max_logit_difference=far(file["logits"], logits),
        checks=checks,
    )


def sum_of_sizes(head: Head, rows: np.ndarray) -> float:
    """What the sizes of a logit's terms add up to, the largest of all logits."""
    with np.errstate(over="ignore"):
        size = float((np.abs(rows) @ np.abs(head.weight.T) + np.abs(head.bias)).max())
    if size > 2 * ROUNDING / SAME_SUM:
        raise ParityError(
            f"the head's weights are too large for single precision: the terms of a logit add up to {size:.0e}, and "
            f"above {2 * ROUNDING / SAME_SUM:.0e} their rounding can move a probability by {ROUNDING:g}. "
            "head.safetensors is damaged, or its fit did not converge: fit again"
        )
    return size


def as_reported(images: Images, head: Head, apart: float) -> list[Check]:
    """The accuracy and the log-loss of the cached features, measured as by `fit`, against `report.json`'s.

    apart: how far two computations of a logit may be from each other, and so decide near ties.
    """
    logits, y, column = head(images.cached), images.y, columns(images.labels, head.class_names)
    checks, count, several = [], len(logits), head.activation == "sigmoid"
    if (accuracy := images.stated.get("accuracy")) is not None:
        margins = np.abs(logits).min(axis=1) if several else np.ptp(np.sort(logits, axis=1)[:, -2:], axis=1) / 2
        wrong = abs(round(head.accuracy(images.cached, y, images.labels) * count) - round(accuracy * count))
        checks.append(Check("reported accuracy", wrong / count, int((margins <= apart).sum()) / count))
    if (stated := images.stated.get("log_loss")) is not None:
        if several:
            losses = metrics.binary_losses(logits[:, column[column >= 0]], y[:, column >= 0] > 0)
        else:
            known = column[y] >= 0
            losses = metrics.losses(logits[known], column[y[known]])
        checks.append(Check("reported log-loss", abs(float(losses.mean()) - stated), 2 * apart))
    return checks


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def _apart(head: Head, p: np.ndarray) -> float:
    """How far the probabilities of the classes that two answers differ in are from either answer."""
    return float(2 * np.abs(p - MULTILABEL).max() if head.activation == "sigmoid" else np.ptp(p))


def _cached(images: Images, head: Head, rows: ThreeWays) -> list[Check]:
    """The features that the head was fitted on, against torch's from Pillow's pixels, which an application has.

    Features of GPU-decoded pixels differ by as much as the extraction allows, so their cosine is compared. Those of
    less than fp32 may change few answers.
    """
    if images.spec.precision != "fp32":
        known, now = (head.answers(head.probabilities(head(each))) for each in (images.cached, rows.torch))
        changed, most = (known != now).any(axis=1).sum(), allowed_images(len(known), CHANGED)
        apart = float(np.median(distances(images.cached, rows.torch)))
        return [
            Check("answers from cached features", float(changed), float(most)),
            Check("cached features, median", apart, CACHED_MEDIAN),
        ]
    if images.spec.preprocess.pixels == GPU:
        return [Check("cached features, 1 - cosine", 1 - float(cosines(images.cached, rows.torch).min()), 1 - CLOSE)]
    return [Check("cached features", difference(images.cached, rows.torch), CACHED)]


def rows_path(run: Run, images: Images, parts: dict[str, str]) -> Path:
    """Where the rows of these images and this backbone are kept once they passed. parts: `graph.part_digests`."""
    import onnxruntime

    identity = [images.spec.digest, parts["preprocess"], parts["backbone"], onnxruntime.__version__]
    identity.append(images.keys.tobytes().hex())
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Path(run.config.cache) / "engines" / f"{digest[:32]}.verified.safetensors"


def save_rows(path: Path, rows: ThreeWays) -> None:
    """Keep rows that passed, so that the next head is compared without running the backbone."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in vars(rows).items() if array is not None}
    write_atomic(path, seal(save(arrays, TENSOR_SEAL)))


def load_rows(path: Path) -> ThreeWays | None:
    """What `save_rows` kept; None where there is nothing, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with contextlib.suppress(OSError, ValueError, SafetensorError):
        data = read_plain(path, MOST_NETWORK_BYTES)
        return convert(load(data), ThreeWays) if tensor_metadata(data)[1] else None
    return None
