"""`ExtractionReport`: what an extraction did, counted, timed and named; `Chunk`: what computing a part of it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypedDict

import numpy as np

from featx.backbones.request import ASSUMED
from featx.cache.writing import Writer
from featx.errors import SourceError
from featx.extraction.findings import Findings
from featx.extraction.job import Job
from featx.extraction.keys import KeyTable
from featx.extraction.timing import STAGES, Timing
from featx.pixels.preprocess import GPU
from featx.sources.columns import Names
from featx.sources.source import Source, left_out
from featx.text import printable

MOST = 100
"""Images, files and groups that a report names of each kind, and images of a group."""
COUNTS = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")
LISTED = 10
ALL = "all of them with `featx extract DATA --findings FILE`"
DONE, SKIPPED = 0, 3


class Skipped(TypedDict):
    id: str
    reason: str


@dataclass(frozen=True, eq=False)
class ExtractionReport:
    """`found` = `cached` + `extracted` + `duplicate` + `skipped` images; `to_dict` is what `--json` prints.

    Counts are of all images. Lists hold the first 100, `Extraction.findings` gives all.
    """

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
    """Ids with the same bytes, at most 100 of a group."""
    conflicts: list[dict[str, str]] = field(default_factory=list)
    """Id -> label, where the same bytes have several labels; at most 100 of a group, each label among them."""
    duplicate_groups: int = 0
    conflict_groups: int = 0
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
        conflicts = (
            ", ".join(f"{printable(name)} ({printable(label)})" for name, label in conflict.items())
            for conflict in self.conflicts
        )
        ignored = (f"{printable(name)} ({left_out(name) or 'not an image'})" for name in self.ignored_files)
        skipped = (f"{printable(image['id'])}: {image['reason']}" for image in self.skipped_images)
        named = {"ignored": (self.ignored, ignored), "skipped": (self.skipped, skipped)}
        named |= {"same bytes, several labels": (self.conflict_groups, conflicts)}
        for what, (count, sentences) in named.items():
            lines += [f"{what}: {sentence}" for sentence in islice(sentences, LISTED)]
            if count > LISTED:
                lines.append(f"{what}: {count - LISTED:,} more, {ALL}")
        lines += [f"note: {note}" for note in self.notes]

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


def describe(job: Job, findings: Findings, stores: Sequence[Writer], chunk: Chunk, total: float) -> ExtractionReport:
    """Count and name what happened. total: seconds of all of it."""
    source, timing, groups = job.source, chunk.timing, len(findings.begins) - 1
    conflicts = [_conflict(source, findings.group(number)) for number in findings.conflicts[:MOST].tolist()]
    duplicate = len(findings.copies) - groups

    notes, note, preprocess = list(source.notes), job.info.weights_note, job.info.preprocess
    if ASSUMED in note:
        notes.append(
            f"{note} (resize {preprocess.resize}, crop {preprocess.crop}, {preprocess.interpolation}), which is "
            "assumed; --size, --crop-pct, --crop-mode, --interpolation, --mean and --std say otherwise"
        )
    if conflicts:
        notes.append(f"{len(findings.conflicts)} images appear with the same bytes under several labels")
    notes += [note for store in stores for note in store.notes] + [note for note in chunk.notes if note]
    if job.info.preprocess.pixels == GPU and chunk.extracted and not chunk.decoded_on_gpu:
        notes.append("no image was decoded on the GPU: none was a baseline JPEG, or it refused them")

    work = timing.work if timing else dict.fromkeys(STAGES, 0.0)
    seconds = {**work, "list": chunk.listing, "start": chunk.opening, "total": total}
    busy = total - chunk.listing - chunk.opening
    return ExtractionReport(
        found=len(source),
        ignored=len(source.ignored),
        cached=len(source) - len(findings.errors) - duplicate - chunk.extracted,
        extracted=chunk.extracted,
        duplicate=duplicate,
        skipped=len(findings.errors),
        images_per_second=round(chunk.extracted / busy, 1) if chunk.extracted else None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        shares=timing.shares if timing else {},
        used=round(timing.used, 3) if timing else 0.0,
        advice="; ".join(text for text in (timing.advice() if timing else "", chunk.advice) if text),
        ignored_files=[*source.ignored[:MOST]],
        skipped_images=[{"id": source.ids[i], "reason": why} for i, why in islice(findings.errors.items(), MOST)],
        duplicates=[
            [source.ids[i] for i in findings.group(number)[:MOST].tolist()] for number in range(min(MOST, groups))
        ],
        conflicts=conflicts,
        duplicate_groups=groups,
        conflict_groups=len(findings.conflicts),
        notes=notes,
        decoded_on_gpu=chunk.decoded_on_gpu,
        decode_cosine=chunk.decode_cosine,
    )


def _conflict(source: Source, same: np.ndarray) -> dict[str, str]:
    """Id -> label of a group of copies: the first with each label, then others, up to `MOST`, in their order."""
    labels = Names.of(source.labels or ()).codes[same]
    first = np.unique(labels, return_index=True)[1]
    chosen = same[np.sort([*first, *np.setdiff1d(np.arange(len(same)), first)][:MOST])]
    return {source.ids[i]: (source.labels or ())[i] for i in chosen.tolist()}
