"""The parity gate: compares what an exported file answers for a run's images with the torch classifier's answers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from featx.features import cosines, difference
from featx.files import write_atomic
from featx.head import MULTILABEL, Head
from featx.pixels.preprocess import CLOSE, GPU
from featx.runs import Run
from featx.shipping import graph
from featx.shipping.deployed import open_session
from featx.shipping.gate import Images, batches

if TYPE_CHECKING:
    from onnx import ModelProto

# Through the file's own resize, whose pixels are up to 1 level from Pillow's. Features: see
# `resized_difference`. Measured with SqueezeNet's real weights, the worst image of 397 photographs was 0.004
# off, the worst of 50 dark ones (a twelfth of the brightness) 0.013, of 50 thumbnails of 64 x 48 pixels 0.011. At
# least half of the photographs were off by 0.15 without antialiasing, 0.11 with the other interpolation, 0.13 for one
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

Outputs = dict[str, np.ndarray]
"""What a session gave, by the names of the values."""


@dataclass(frozen=True, eq=False)
class ThreeWays:
    """The features of the same images, computed three ways. `float32 [M, D]` each."""

    same: np.ndarray
    """By the file's backbone, from the pixels that the head was trained on."""
    torch: np.ndarray
    """By torch, from these pixels."""
    resized: np.ndarray | None = None
    """By the file, from the decoded image, through its own resize; None where it has none."""


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
    images before; only the head was run, on the features found then."""
    accuracy: float | None
    """The file's; where an image may have several labels, all must be right. None where the head may have
    learned from these images (`Images.known`)."""
    torch_accuracy: float | None
    equal_labels: int
    """Images for which the file's answer is the torch classifier's."""
    ties: list[str] = field(default_factory=list)
    """Ids of images with another answer, where torch gives both answers nearly the same probability."""
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
        scores = "no accuracy: the data have changed since the fit, and the head may have learned from these images"
        if self.accuracy is not None:
            scores = f"accuracy of the file {self.accuracy:.4f}, of the torch classifier {self.torch_accuracy:.4f}"
        equal = f"equal answers {self.equal_labels} of {self.images}"
        lines = [f"compared with the torch classifier on {self.images} images, {how}", scores, equal]
        width = max(len(check.name) for check in self.checks)
        lines += [f"  {check.name:<{width}}  {check.value:.2e}  (limit {check.limit:.0e})" for check in self.checks]
        return "\n".join(lines)

    def failures(self) -> str:
        """What exceeds its limit and which answers differ, for a message."""
        text = "; ".join(f"{c.name} {c.value:.3g} (limit {c.limit:.3g})" for c in self.missed) + "."
        if self.differing:
            more = " ..." if len(self.differing) > 3 else ""
            text += f" Answers differ for {len(self.differing)}: {', '.join(self.differing[:3])}{more}."
        return text


def verify(
    run: Run,
    model: ModelProto,
    images: Images,
    *,
    tolerance: float = PROBABILITIES,
    parts: dict[str, str] | None = None,
) -> Parity:
    """Compare a file with the torch classifier on these images.

    tolerance: see `compare`. parts: the file's `graph.part_digests`, where its backbone counts as verified if these
    parts passed on the same images before: then the head alone is run, without torch.
    """
    kept = rows_path(run, images, parts) if parts else None
    if model.graph.input[0].name == "features":
        rows: ThreeWays | None = ThreeWays(images.cached, images.cached)
    else:
        rows = load_rows(kept) if kept else None
    if rows is not None:
        file, same = run_head(run.head, rows, images)
        return compare(images, run.head, rows, file, same, method="head", tolerance=tolerance)

    rows, file, same = run_file(run, model, images)
    found = compare(images, run.head, rows, file, same, method="file", tolerance=tolerance)
    if kept and found.passed:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next export a full comparison
            save_rows(kept, rows)
    return found


def run_file(run: Run, model: ModelProto, images: Images) -> tuple[ThreeWays, Outputs, Outputs]:
    """Every image through the file and through torch.

    Returns the features, then what the file gave for each decoded image, and what it gave for its crop. The two are
    one where the file takes crops.
    """
    from featx.classifier import load

    names, classifier = graph.INNER, load(run)
    by_crop = open_session(graph.opened_up(model, pixels=True))
    by_image = open_session(graph.opened_up(model)) if graph.resizes(model) else None
    same: list[list[np.ndarray]] = []
    file: list[list[np.ndarray]] = []
    reference: list[np.ndarray] = []

    with tqdm(None, "parity", len(images.source), unit=" images", disable=None) as progress:
        for batch in batches(images):
            crops = np.stack([crop for _, crop in batch])
            same.append(by_crop.run(names, {graph.PIXELS: crops}))
            reference.append(classifier.features(crops))
            if by_image is not None:
                file += [by_image.run(names, {"images": image[None]}) for image, _ in batch]
            progress.update(len(batch))

    same_outputs = _joined(same)
    outputs = _joined(file) if file else same_outputs
    resized = outputs[graph.FEATURES_VALUE] if file else None
    return ThreeWays(same_outputs[graph.FEATURES_VALUE], np.concatenate(reference), resized), outputs, same_outputs


def _joined(parts: list[list[np.ndarray]]) -> Outputs:
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(graph.INNER)}


def run_head(head: Head, rows: ThreeWays, images: Images) -> tuple[Outputs, Outputs]:
    """What the head alone gives for features found before: through the file's resize, and from the same pixels."""
    names = ("probabilities", "logits")
    model = graph.build(None, head, images.spec.preprocess, input="features", outputs=names)
    session = open_session(model.SerializeToString(), threads=1)
    same = dict(zip(names, session.run(names, {"features": rows.same}), strict=True))
    if rows.resized is None:
        return same, same
    return dict(zip(names, session.run(names, {"features": rows.resized}), strict=True)), same


def compare(
    images: Images,
    head: Head,
    rows: ThreeWays,
    file: Outputs,
    same: Outputs,
    *,
    method: str,
    tolerance: float = PROBABILITIES,
) -> Parity:
    """Compare what a file gave with the torch classifier.

    tolerance: on the probabilities through the file's own resize, in [0, 1], and on the features where it is above
    their limit. An answer may differ only where torch's own two probabilities are nearer to each other than twice
    the tolerance, so that either of them could win.
    """
    logits, own = head(rows.torch), head(rows.same)
    probabilities = head.probabilities(logits)
    size = float((np.abs(rows.torch) @ np.abs(head.weight.T) + np.abs(head.bias)).max())

    # Features have a limit of their own; if a head with large weights magnifies a difference within it, that is
    # not the file's fault. A sigmoid or softmax is at most half as steep as its logits.
    exact = max(SAME_PROBABILITIES, _far(head.probabilities(own), probabilities) + SAME_SUM * size / 2)

    mine, theirs = head.answers(file["probabilities"]), head.answers(probabilities)
    differs = mine != theirs
    others = np.flatnonzero(differs.any(axis=1)).tolist()
    gap = 2 * (exact if rows.resized is None else tolerance)
    tied = [i for i in others if _apart(head, probabilities[i, differs[i]]) <= gap]

    checks = [Check("labels", float(len(others) - len(tied)), 0.0)]
    if rows.resized is not None:
        checks += [
            Check("features", resized_difference(rows.resized, rows.torch), max(FEATURES, tolerance)),
            Check("probabilities", _far(file["probabilities"], probabilities), tolerance),
        ]
    checks += [
        Check("same-pixel features", difference(rows.same, rows.torch), SAME_FEATURES),
        Check("same-feature logits", _far(same["logits"], own), SAME_SUM * size),
        Check("same-pixel probabilities", _far(same["probabilities"], probabilities), exact),
        _cached(images, rows),
    ]

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
        max_logit_difference=_far(file["logits"], logits),
        checks=checks,
    )


def _far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def _apart(head: Head, p: np.ndarray) -> float:
    """How far the probabilities of the classes that two answers differ in are from either answer."""
    return float(2 * np.abs(p - MULTILABEL).max() if head.activation == "sigmoid" else np.ptp(p))


def resized_difference(rows: np.ndarray, reference: np.ndarray) -> float:
    """The worst image's distance between its two rows, `[N, D]` each, relative to the length of its reference.

    A reference shorter than the median one (an almost black image's, say) counts as long as that.
    """
    lengths = np.linalg.norm(reference, axis=1)
    scale = np.maximum(np.maximum(lengths, np.median(lengths)), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(rows - reference, axis=1) / scale).max())


def _cached(images: Images, rows: ThreeWays) -> Check:
    """The features that the head was fitted on, against torch's from Pillow's pixels, which an application has.

    Features of GPU-decoded pixels differ by as much as the extraction allows, so their cosine is compared.
    """
    if images.spec.preprocess.pixels == GPU:
        return Check("cached features, 1 - cosine", 1 - float(cosines(images.cached, rows.torch).min()), 1 - CLOSE)
    return Check("cached features", difference(images.cached, rows.torch), CACHED[images.spec.precision])


def rows_path(run: Run, images: Images, parts: dict[str, str]) -> Path:
    """Where the rows of these images and this backbone are kept once they passed. parts: `graph.part_digests`."""
    import onnxruntime

    identity = [images.spec.digest, parts["preprocess"], parts["backbone"], onnxruntime.__version__]
    identity.append(images.keys.tobytes().hex())
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Path(run.config.cache) / "engines" / f"{digest[:32]}.verified.npz"


def save_rows(path: Path, rows: ThreeWays) -> None:
    """Keep rows that passed, so that the next head is compared without running the backbone."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in vars(rows).items() if array is not None})
    write_atomic(path, buffer.getvalue())


def load_rows(path: Path) -> ThreeWays | None:
    """What `save_rows` kept; None where there is nothing, or it is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return ThreeWays(**file)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
