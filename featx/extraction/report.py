"""`ExtractionReport`: what an extraction did, counted, timed and named; `Chunk`: what computing a part of it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from featx.backbones.request import ASSUMED
from featx.cache.store import FeatureStore
from featx.errors import SourceError
from featx.extraction.job import Job
from featx.extraction.keys import KeyTable
from featx.extraction.timing import STAGES, Timing
from featx.pixels.preprocess import GPU
from featx.sources.source import left_out
from featx.text import printable

COUNTS = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")
LISTED = 10
DONE, SKIPPED = 0, 3


class Skipped(TypedDict):
    id: str
    reason: str


@dataclass(frozen=True, eq=False)
class ExtractionReport:
    """`found` = `cached` + `extracted` + `duplicate` + `skipped` images; `to_dict` is what `--json` prints."""

    found: int
    ignored: int
    """Files that are not images."""
    cached: int
    extracted: int
    duplicate: int
    """Images with the same bytes as an earlier one of this data set."""
    skipped: int
    images_per_second: float | None = None
    """Extraction rate without the time for listing and opening; None where nothing was extracted."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Work of each stage, and wall time of `list`, `start` and `total`."""
    shares: dict[str, float] = field(default_factory=dict)
    """Each stage's part of the work, in [0, 1]."""
    used: float = 0.0
    """The part of the cores' time that was used, in [0, 1]."""
    advice: str = ""
    """What bounds the run, and what would make it faster."""
    ignored_files: list[str] = field(default_factory=list)
    skipped_images: list[Skipped] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    """Ids with the same bytes."""
    conflicts: list[dict[str, str]] = field(default_factory=list)
    """Id -> label, where the same bytes have several labels."""
    notes: list[str] = field(default_factory=list)
    decoded_on_gpu: int = 0
    decode_cosine: float | None = None
    """Least cosine between features from the GPU's pixels and from Pillow's; None where none were compared."""

    @property
    def exit_code(self) -> int:
        return SKIPPED if self.skipped else DONE

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: the counts, then what is behind them."""
        lines = ["  ".join(f"{name} {getattr(self, name)}" for name in COUNTS)]
        named = {
            "ignored": [f"{printable(name)} ({left_out(name) or 'not an image'})" for name in self.ignored_files],
            "skipped": [f"{printable(image['id'])}: {image['reason']}" for image in self.skipped_images],
            "same bytes, several labels": [
                ", ".join(f"{printable(name)} ({printable(label)})" for name, label in conflict.items())
                for conflict in self.conflicts
            ],
            "note": self.notes,
        }
        for what, names in named.items():
            lines += [f"{what}: {name}" for name in names[:LISTED]]
            if len(names) > LISTED:
                lines.append(f"{what}: {len(names) - LISTED} more, all of them with --json")

        if self.extracted:
            shares = ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items())
            lines.append(f"{self.images_per_second} images/s" + (f"; work: {shares}" if shares else ""))
            lines += [self.advice] if self.advice else []
        if self.decode_cosine is not None:
            lines.append(
                f"{self.decoded_on_gpu} images decoded on the GPU; features of a sample against Pillow's: "
                f"cosine {self.decode_cosine:.5f} or more"
            )
        return "\n".join(lines)


@dataclass
class Chunk:
    """What computing some images of a data set did."""

    listing: float = 0.0
    """Seconds that listing the images and looking up their keys took."""
    timing: Timing | None = None
    """Where the time went; None where nothing was missing."""
    extracted: int = 0
    opening: float = 0.0
    """Seconds that opening the engine took."""
    decoded_on_gpu: int = 0
    decode_cosine: float | None = None
    notes: list[str] = field(default_factory=list)
    advice: str = ""
    """What other arithmetic would save here."""


def require_some(job: Job, table: KeyTable, stored: np.ndarray) -> None:
    """Raise `SourceError` where no image has features. stored: `bool [N]`, those that have."""
    if not stored.any():
        first = "; ".join(f"{job.source.ids[i]}: {why}" for i, why in list(table.errors.items())[:3])
        raise SourceError(f"none of the {len(stored)} images in {job.source.uri} could be read ({first})")


def describe(
    job: Job, table: KeyTable, stores: list[FeatureStore], stored: np.ndarray, chunk: Chunk, total: float
) -> ExtractionReport:
    """Count and name what happened. stored: `bool [N]`, the images that have features; total: seconds of all of it."""
    source, keys, timing = job.source, table.keys, chunk.timing
    numbers = np.flatnonzero(stored)
    by_key = {keys[i].tobytes(): why for i, why in table.errors.items()}
    skipped: list[Skipped] = [
        {"id": source.ids[i], "reason": table.errors.get(i) or by_key[keys[i].tobytes()]}
        for i in np.flatnonzero(~stored).tolist()
    ]

    copies = table.copies(numbers)
    distinct = len(numbers) - sum(len(same) - 1 for same in copies)
    labels = source.labels or []
    conflicts = [
        {source.ids[i]: labels[i] for i in same} for same in copies if labels and len({labels[i] for i in same}) > 1
    ]

    notes, note, preprocess = list(source.notes), job.info.weights_note, job.info.preprocess
    if ASSUMED in note:
        notes.append(
            f"{note} (resize {preprocess.resize}, crop {preprocess.crop}, {preprocess.interpolation}), which is "
            "assumed; --size, --crop-pct, --crop-mode, --interpolation, --mean and --std say otherwise"
        )
    if conflicts:
        notes.append(f"{len(conflicts)} images appear with the same bytes under several labels")
    notes += [note for store in stores for note in store.notes] + [note for note in chunk.notes if note]
    if job.info.preprocess.pixels == GPU and chunk.extracted and not chunk.decoded_on_gpu:
        notes.append("no image was decoded on the GPU: none was a baseline JPEG, or it refused them")

    work = timing.work if timing else dict.fromkeys(STAGES, 0.0)
    seconds = {**work, "list": chunk.listing, "start": chunk.opening, "total": total}
    busy = total - chunk.listing - chunk.opening
    return ExtractionReport(
        found=len(stored),
        ignored=len(source.ignored),
        cached=distinct - chunk.extracted,
        extracted=chunk.extracted,
        duplicate=len(numbers) - distinct,
        skipped=len(skipped),
        images_per_second=round(chunk.extracted / busy, 1) if chunk.extracted else None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        shares=timing.shares if timing else {},
        used=round(timing.used, 3) if timing else 0.0,
        advice="; ".join(text for text in (timing.advice() if timing else "", chunk.advice) if text),
        ignored_files=source.ignored,
        skipped_images=skipped,
        duplicates=[[source.ids[i] for i in same] for same in copies],
        conflicts=conflicts,
        notes=notes,
        decoded_on_gpu=chunk.decoded_on_gpu,
        decode_cosine=chunk.decode_cosine,
    )
