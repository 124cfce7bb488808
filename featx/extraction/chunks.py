"""Parts of one extraction, for several processes: `--chunk 17/200`, and what a cluster hands out."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx.cache.writing import Writer
from featx.devices import processor
from featx.engines.engine import Engine
from featx.errors import FeatxError, SourceError, StoreError
from featx.extraction.computing import compute
from featx.extraction.job import Backbone, Data, Job, prepare
from featx.extraction.keys import KeyTable
from featx.extraction.report import Chunk, ExtractionReport, describe
from featx.options import Options, complete, fits
from featx.records import convert, read_record, write_record
from featx.state import ordinary
from featx.text import printable

# A chunk's rows take at least so many bytes, so that they make few shards.
CHUNK_BYTES = 16 << 20
# Each worker gets at least so many chunks, so that all end at about the same time.
CHUNKS_A_WORKER = 4


@dataclass(frozen=True)
class ChunkReport:
    """What extracting one chunk did; `to_dict` is what `--json` prints."""

    number: int
    """From 0 to `chunks` - 1."""
    chunks: int
    start: int
    """Its first image, counted in the listing from 0."""
    stop: int
    """The image after its last one."""
    images: int
    """In the whole listing."""
    report: ExtractionReport

    @property
    def exit_code(self) -> int:
        return self.report.exit_code

    def to_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "report"}
        return {"chunk": own, **self.report.to_dict()}

    def text(self) -> str:
        which = f"images {self.start:,} to {self.stop - 1:,}" if self.stop > self.start else "no image"
        return f"chunk {self.number}/{self.chunks}: {which} of {self.images:,}\n{self.report.text()}"


@dataclass(frozen=True)
class Prepared:
    """What `--prepare` has made sure of; chunks of another listing are refused."""

    uri: str
    """The data set, as it was given."""
    images: int
    listing: str
    """SHA-256, in hex, of the images' ids in their order."""
    engine: str
    """What computes the rows; a backbone that runs on a CPU is exported by now."""
    kind: str
    """What a row's last bits depend on, see `kind_of`."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def text(self) -> str:
        return (
            f"{self.images:,} images are listed, and the backbone is ready ({self.engine}). Run each chunk, from "
            "--chunk 0/N to --chunk N-1/N, with the same options; then the command without --chunk, for the report"
        )


def parse_chunk(text: str) -> tuple[int, int]:
    """`17/200` -> (17, 200). Raises `FeatxError` for any other text, and for a number that is out of range."""
    found = re.fullmatch(r"(\d{1,12})/(\d{1,12})", text, re.ASCII)
    if not found:
        raise FeatxError(f"a chunk is its number and how many there are, such as 17/200, not {text!r}")
    return _checked(*map(int, found.groups()))


def _checked(number: Any, chunks: Any) -> tuple[int, int]:
    if not (fits(number, int) and fits(chunks, int) and 0 <= number < chunks):
        raise FeatxError(f"there is no chunk {number}/{chunks}: N chunks are numbered from 0/N to N-1/N")
    return number, chunks


@ordinary()
def prepare_chunks(
    data: Data, backbone: Backbone = "resnet18", *, engine: Engine | None = None, **options: Unpack[Options]
) -> Prepared:
    """Do once what all chunks need: list the images, resolve the backbone, export it; arguments as for `featx.extract`.

    The listing's digest is recorded in the cache: from then on `extract_chunk` refuses other listings with this
    backbone and these options, unless they were prepared as well.
    """
    job = prepare(data, backbone, _here(complete(options, function=prepare_chunks)), engine)
    stores = job.light_stores()
    opened = engine or job.open_engine(stores)
    done = Prepared(job.source.uri, len(job.source), job.source.digest, opened.name, kind_of(opened.name))
    if engine is None:
        opened.close()
    place = hashlib.sha256(os.fsencode(os.path.abspath(job.source.uri))).hexdigest()
    try:
        write_record(job.cache / "plans" / f"{job.specs[0].digest[:32]}.{place[:32]}.json", done.to_dict())
    except OSError as error:
        raise StoreError(f"cannot write to the cache {job.cache} ({error.strerror}); give another --cache") from error
    return done


@ordinary()
def extract_chunk(
    data: Data,
    number: int,
    chunks: int,
    backbone: Backbone = "resnet18",
    *,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> ChunkReport:
    """Compute what the cache lacks of chunk `number` of `chunks`, counted from 0; the rest as for `featx.extract`.

    It holds the images `number * N // chunks` to `(number + 1) * N // chunks` of the listing, each end moved to
    the next start of a container. So processes agree without talking, whatever is cached already. An empty chunk,
    and one in which no image can be read, is a result as well. Raises `FeatxError` for a number out of range,
    `SourceError` for another listing than `prepare_chunks` recorded.
    """
    number, chunks = _checked(number, chunks)
    begin = time.perf_counter()
    job = prepare(data, backbone, _here(complete(options, function=extract_chunk)), engine)
    plan = _plan_of(job)
    start, stop = bounds(len(job.source), number, chunks, job.source.starts)
    part = replace(job, source=job.source.take(np.arange(start, stop)), seconds=0.0)

    table, stores = KeyTable(part.source, part.cache), part.light_stores()
    chunk = Chunk(listing=time.perf_counter() - begin)
    stored = work(part, table, stores, chunk, engine)
    engine_name = stores[0].engine
    if chunk.extracted and plan and engine_name == plan.engine and (kind := kind_of(engine_name)) != plan.kind:
        chunk.notes.append(f"computed on {kind}; --prepare ran on {plan.kind}: rows may differ in their last bits")
    report = describe(part, table.findings(stored), stores, chunk, time.perf_counter() - begin)
    return ChunkReport(number, chunks, start, stop, len(job.source), report)


def work(job: Job, table: KeyTable, stores: Sequence[Writer], chunk: Chunk, engine: Engine | None) -> np.ndarray:
    """Compute what light `stores` lack of a job's images; which of them are stored then, `bool [N]`.

    A light store says of a few images that they are stored where they are not: those are computed in a second round.
    """
    stored = table.stored(stores)
    for second in (False, True):
        usable = np.ones(len(stored), bool)
        usable[list(table.errors)] = False
        missing = np.flatnonzero(~stored & usable)
        if not len(missing):
            break
        if second and len(stores) > 1:  # some of their views are stored by now, and counted
            some = np.logical_or.reduce([store.confirm(table.keys[missing]) for store in stores])
            chunk.extracted -= int(some.sum())
        compute(job, table, stores, missing, chunk, engine)
        stored = table.stored(stores)
    return stored


def bounds(images: int, number: int, chunks: int, starts: np.ndarray | None = None) -> tuple[int, int]:
    """The first image of a chunk, and the one after its last; `starts`, ascending, are where containers begin."""
    ends = [number * images // chunks, (number + 1) * images // chunks]
    if starts is not None:
        edges = np.unique([0, *starts, images])
        ends = [int(edges[np.searchsorted(edges, end)]) for end in ends]
    return ends[0], ends[1]


def cut(
    numbers: np.ndarray, row_bytes: int, workers: int, starts: np.ndarray | None = None, least: int = CHUNK_BYTES
) -> list[np.ndarray]:
    """Ascending image numbers, `int [M]`, in chunks of at least `least` bytes of rows; smaller ones where each worker
    would get fewer than four. None ends inside a container.
    """
    size = min(-(-least // row_bytes), -(-len(numbers) // (CHUNKS_A_WORKER * workers)))
    ends = np.arange(max(1, size), len(numbers), max(1, size))
    if starts is not None:
        container = np.searchsorted(starts, numbers, "right")
        ends = np.unique(np.searchsorted(container, container[ends - 1], "right"))
    return [part for part in np.split(numbers, ends) if len(part)]


def kind_of(engine: str) -> str:
    """What the last bits of an engine's rows depend on: the processor, or GPU, and the version of what multiplies."""
    if engine == "torch-cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    package = engine.partition("-")[0]
    with suppress(PackageNotFoundError):
        return f"{processor()}, {package} {version(package)}"
    return processor()


def _here(options: dict[str, Any]) -> dict[str, Any]:
    """The options. Raises `FeatxError` where a cluster is asked for as well."""
    if options["on"] or options["address"]:
        raise FeatxError("a chunk is computed where it is called; leave out --on and --address")
    return options


def _read_plan(path: Path) -> Prepared:
    try:
        return convert(read_record(path)[0], Prepared)
    except (OSError, ValueError) as error:
        raise FeatxError(f"{path} cannot be read ({error}); remove it, then run --prepare again") from error


def _plan_of(job: Job) -> Prepared | None:
    """What `--prepare` recorded of this listing. Raises `SourceError` where it recorded others alone."""
    found = (job.cache / "plans").glob(f"{job.specs[0].digest[:32]}.*.json")
    plans = [_read_plan(path) for path in sorted(found)]
    same = [plan for plan in plans if plan.listing == job.source.digest]
    if plans and not same:
        uri = printable(job.source.uri)
        before = next((plan for plan in plans if os.path.abspath(plan.uri) == os.path.abspath(job.source.uri)), None)
        known = ", ".join(f"{printable(plan.uri)} ({plan.images:,} images)" for plan in plans[:3])
        what = f"{uri} ({len(job.source):,} images) was not prepared, but {known} was"
        if before:
            what = f"the images of {uri} are others than at --prepare ({before.images:,} then, {len(job.source):,} now)"
        raise SourceError(f"{what}: chunks of two listings do not fit together; run --prepare on it, then all chunks")
    return same[0] if same else None
