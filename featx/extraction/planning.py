"""The dry run: how many images an extraction would compute, how long it takes, how much disk it needs."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx.cache.index import KEY_BYTES
from featx.cache.writing import Writer
from featx.devices import decoding_device
from featx.engines.engine import Engine
from featx.extraction.embedding import embed
from featx.extraction.fidelity import faster, rates_path
from featx.extraction.job import Backbone, Data, Job, prepare
from featx.extraction.keys import KeyTable
from featx.extraction.loader import Loader
from featx.extraction.report import ExtractionReport
from featx.options import Options, complete
from featx.pixels.preprocess import GPU
from featx.records import read_record, write_record
from featx.state import ordinary

# Files with unknown keys are read, up to so many bytes; the rest count as missing.
READ_BYTES = 1 << 30
SAMPLE = 64
# From so many images on, a run's rate is remembered for the next dry run.
RATE_IMAGES = 128


@dataclass(frozen=True)
class Plan:
    """What an extraction would do: `found` = `cached` + `missing` + `duplicate` images."""

    found: int
    ignored: int
    """Files that are not images."""
    cached: int
    missing: int
    duplicate: int
    unread: int
    """Missing images that were not read: they may be cached or duplicates after all."""
    images_per_second: float | None
    seconds: float | None
    """For the missing images, opening the backbone included."""
    basis: str
    """Where the rate is from: the last run of this kind here, else a measurement now on a sample."""
    bytes: int
    """Disk space for the missing features."""
    exported_bytes: int
    """Size of the backbone that the measurement exported; it stays in the cache."""
    free: int
    """Bytes on the cache's disk."""
    enough: bool
    backbone: str
    row_shape: list[int]
    notes: list[str]
    advice: str = ""
    """What other arithmetic would save here, from a measurement; empty where nothing."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people."""
        counts = ("found", "ignored", "cached", "missing", "duplicate")
        lines = ["  ".join(f"{name} {getattr(self, name)}" for name in counts)]
        if self.missing and self.images_per_second:
            rate = f"{self.images_per_second:.0f} images/s ({self.basis})"
            lines.append(f"about {self.seconds:.0f} s at {rate}, {self.bytes / 1e6:.1f} MB of features")
        if self.exported_bytes:
            lines.append(f"the backbone is exported now: {self.exported_bytes / 1e6:.1f} MB in the cache, once")
        lines += [self.advice] if self.advice else []
        if not self.enough:
            lines.append(f"the disk has {self.free / 1e6:.0f} MB free, which is not enough")
        return "\n".join(lines)


@ordinary()
def plan(
    data: Data, backbone: Backbone = "resnet18", *, engine: Engine | None = None, **options: Unpack[Options]
) -> Plan:
    """What `featx.extraction.pipeline.sync` would do with the same arguments; no feature is written.

    Where no run of this kind is remembered, a sample is measured: that opens, and so may export, the backbone.
    """
    job = prepare(data, backbone, complete(options, function=plan), engine)
    table, stores = KeyTable(job.source, job.cache), job.open_stores()
    table.read_missing(READ_BYTES)

    stored, first = table.stored(stores), table.first()
    cached = int((stored & first).sum())
    missing = np.flatnonzero(~stored & (first | ~table.known))
    rate, start, exported = recall_rate(job), 0.0, 0
    basis = "the last run of this kind on this machine"
    if rate is None and len(missing):
        rate, start, exported, size = _measure(job, stores, missing, engine)
        basis = f"measured now on {size} of the missing images"

    needed = len(missing) * (job.row_bytes + len(stores) * KEY_BYTES)
    there = next(folder for folder in (job.cache.absolute(), *job.cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    return Plan(
        found=len(job.source),
        ignored=len(job.source.ignored),
        cached=cached,
        missing=len(missing),
        duplicate=len(job.source) - cached - len(missing),
        unread=int((~table.known).sum()),
        images_per_second=None if rate is None else round(rate, 1),
        seconds=None if rate is None else round(len(missing) / rate + start, 1),
        basis=basis if rate is not None else "",
        bytes=needed,
        exported_bytes=exported,
        free=free,
        enough=needed < free,
        backbone=job.info.name,
        row_shape=list(job.info.row_shape),
        notes=list(job.source.notes),
        # in another arithmetic, what is cached would be computed again
        advice=faster(job, rate) if len(missing) > cached and engine is None else "",
    )


def _measure(
    job: Job, stores: Sequence[Writer], missing: np.ndarray, given: Engine | None
) -> tuple[float, float, int, int]:
    """Images per second from file to features on a sample, seconds to open the engine, bytes exported, sample size."""
    if job.info.preprocess.pixels == GPU:
        decoding_device(job.device)
    begin, before = time.perf_counter(), _engine_bytes(job.cache)
    engine = given or job.open_engine(stores, len(missing))
    exported = _engine_bytes(job.cache) - before
    if exported and given is None:  # the run itself will find what this one has exported
        engine.close()
        begin = time.perf_counter()
        engine = job.open_engine(stores, len(missing))

    with nullcontext() if given else closing(engine):
        start = time.perf_counter() - begin
        size = min(len(missing), max(SAMPLE, 2 * engine.batch_size))
        sample = missing[np.linspace(0, len(missing) - 1, size).astype(int)]
        loader = Loader(job.source, job.info.preprocess, stores, job.threads)
        begin = time.perf_counter()
        with closing(job.load(loader, sample, engine)) as images:
            for _ in embed(images, engine):
                pass
    return size / (time.perf_counter() - begin), start, exported, size


def _engine_bytes(cache: Path) -> int:
    """The size of the cache's exported backbones."""
    return sum(path.stat().st_size for path in (cache / "engines").glob("*.onnx"))


def remember_rate(job: Job, report: ExtractionReport) -> None:
    """Keep a run's images per second in `cache/rates/`, for the next dry run on this machine."""
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the dry run a measurement
        write_record(_rate_path(job), {"images_per_second": report.images_per_second})


def recall_rate(job: Job) -> float | None:
    """The images per second of the last run of this kind on this machine; None where there was none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        rate = read_record(_rate_path(job), dict[str, float])[0]["images_per_second"]
        return float(rate) if rate > 0 else None
    return None


def _rate_path(job: Job) -> Path:
    return rates_path(job, "run", job.threads, job.device)
