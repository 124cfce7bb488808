"""The main path, read first: list -> look up keys -> compute -> report, each image only once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack

import numpy as np

from featx.engines.engine import Engine
from featx.errors import FeatxError
from featx.extraction import cluster
from featx.extraction.chunks import CHUNK_BYTES
from featx.extraction.computing import compute
from featx.extraction.job import Backbone, Data, Job, prepare
from featx.extraction.keys import KeyTable
from featx.extraction.nodes import require_answer
from featx.extraction.planning import RATE_IMAGES, remember_rate
from featx.extraction.report import Chunk, describe, require_some
from featx.extraction.result import Extraction
from featx.features import Features
from featx.options import Options, complete
from featx.state import ordinary


def extract(
    data: Data, backbone: Backbone = "resnet18", *, engine: Engine | None = None, **options: Unpack[Options]
) -> Features:
    """The features of every readable image of `data`, each computed at most once; arguments as for `sync`."""
    return sync(data, backbone, engine=engine, **options).features()


def sync(
    data: Data, backbone: Backbone = "resnet18", *, engine: Engine | None = None, **options: Unpack[Options]
) -> Extraction:
    """Bring the cache up to date with a data set: run the frozen backbone on the images it lacks.

    data: a folder, a manifest or a `Source`. backbone: its name or a `BackboneRequest`, or the `BackboneInfo` that
    it was resolved to. engine: what runs it; by default a rule chooses (`featx.engines.opening`). options: see
    `featx.options`; the features of `--decode fast` and `gpu` differ a little and are cached apart.

    A row's key is the SHA-256 of the image's bytes: a second run computes nothing, nor does one after renaming,
    moving, relabelling or duplicating images. An image that cannot be read or decoded is counted, named and skipped.
    An interrupted run keeps what it has computed. Raises `FeatxError` for invalid options, `SourceError`
    where no image can be read, `BackboneError`, `StoreError`.
    """
    asked = complete(options, function=sync)
    if asked["address"] and not asked["on"]:
        raise FeatxError(f"address {asked['address']} is a Ray cluster's; add --on ray")
    if asked["address"] and not (Path(asked["cache"]) / "features").exists():
        require_answer(asked["address"])  # before a backbone is loaded; a filled cache may need no cluster
    return run(prepare(data, backbone, asked, engine), engine, asked["on"], asked["address"])


@ordinary()
def run(
    job: Job,
    engine: Engine | None = None,
    on: str | None = None,
    address: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Extraction:
    """What `sync` does once it knows the images and the backbone: in this process, or on a Ray cluster.

    chunk_bytes: of rows, that a task of the cluster computes at least, see `featx.extraction.chunks.cut`.
    """
    begin = time.perf_counter() - job.seconds
    table, stores = KeyTable(job.source, job.cache), job.open_stores()
    stored = table.stored(stores)
    chunk = Chunk(listing=time.perf_counter() - begin)

    if not stored.all():
        missing = np.flatnonzero(~stored)
        if on is None:
            compute(job, table, stores, missing, chunk, engine)
        else:
            cluster.compute(job, table, stores, missing, chunk, engine, address=address, chunk_bytes=chunk_bytes)
        stored = table.stored(stores)

    findings = table.findings(stored)
    require_some(job, table, stored)
    numbers = np.flatnonzero(stored)
    keys = table.keys if len(numbers) == len(table.keys) else table.keys[numbers]
    report = describe(job, findings, stores, chunk, time.perf_counter() - begin)
    if report.extracted >= RATE_IMAGES and on is None:  # a cluster's rate says nothing about this machine
        remember_rate(job, report)
    return Extraction(job.source, job.request, job.info, job.cache, stores, numbers, keys, report, findings)
