"""The unit of work: load, embed and store some images of a job, each only once, whoever else works beside."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from featx.cache.store import FeatureStore
from featx.engines.engine import Engine
from featx.extraction.embedding import embed, keep
from featx.extraction.fidelity import faster, fidelity
from featx.extraction.job import Job
from featx.extraction.keys import KeyTable
from featx.extraction.loader import Loaded, Loader
from featx.extraction.report import Chunk
from featx.extraction.timing import Timing
from featx.state import FILTERS

LONG = 20.0  # seconds of work, from which on a run may measure for some more what would have saved time


def compute(
    job: Job,
    table: KeyTable,
    stores: list[FeatureStore],
    numbers: np.ndarray,
    chunk: Chunk,
    engine: Engine | None = None,
) -> None:
    """Load, embed and store images, `numbers` `int [M]` of the source, as far as the stores lack them; fill in `chunk`.

    The unit of work: repeated, or done by several processes at once, it stores each row once. engine: by default
    the job's own, which is not opened for images that turn out to be stored already.
    """
    timing = chunk.timing = Timing(job.threads, job.available)
    loader = Loader(job.source, job.info.preprocess, stores, job.threads)

    with ExitStack() as stack:  # left in reverse: threads end, rows are committed, keys are remembered
        stack.enter_context(FILTERS)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")  # notes on odd EXIF, once an image
        stack.callback(table.record)
        for store in stores:
            stack.enter_context(store)
        bar = stack.enter_context(tqdm(total=len(numbers), desc="extract", unit=" images", disable=None))

        if engine is None:  # opening one takes seconds
            numbers = skip_stored(job, table, stores, numbers, bar)
            if not len(numbers):
                return
        begin = time.perf_counter()
        given, empty = engine, all(store.empty for store in stores)
        engine = engine or stack.enter_context(closing(job.open_engine(stores, len(numbers))))
        for store in stores:
            store.computed_by(engine.name)
        if empty and given is None and job.specs[0].precision != "fp32" and engine.name != "torch-cuda":
            chunk.notes.append(fidelity(job, engine, stores, numbers))
        chunk.opening = time.perf_counter() - begin

        timing.begin(loader, gpu=engine.name == "torch-cuda")
        loaded = stack.enter_context(closing(job.load(loader, numbers, engine)))
        images = noted(timing.waiting(loaded), table, bar)
        for batch in embed(images, engine):
            timing.waited += batch.waited
            with timing.storing():
                keep(batch, stores, job.source)
            chunk.extracted += batch.images
            bar.set_postfix_str(timing.update(loader).brief(), refresh=False)

        if timing.update(loader).bound()[0] == "embed" and timing.elapsed > LONG and given is None:
            chunk.advice = faster(job, chunk.extracted / timing.elapsed)
    chunk.decoded_on_gpu, chunk.decode_cosine = loader.decoded_on_gpu, loader.cosine


def skip_stored(
    job: Job, table: KeyTable, stores: list[FeatureStore], numbers: np.ndarray, bar: tqdm[NoReturn]
) -> np.ndarray:
    """The numbers from the first image on that needs the engine; those before it are read, and stored or unusable."""
    loader = Loader(job.source, job.info.preprocess, stores, job.threads)
    with closing(loader(numbers)) as images:
        for place, image in enumerate(images):
            if image.views:
                return numbers[place:]
            bar.update()
            table.note(image.number, image.key, image.error)
    return numbers[:0]


def noted(images: Iterable[Loaded], table: KeyTable, bar: tqdm[NoReturn]) -> Iterator[Loaded]:
    """Pass the images through, recording their keys and errors."""
    for image in images:
        bar.update()
        table.note(image.number, image.key, image.error)
        yield image
