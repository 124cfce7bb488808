"""Owns the dry run: how many images an extraction would compute, how long it takes, how much disk it needs."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.cache.index import KEY_BYTES, distinct
from featx.cache.memo import KeyMemo
from featx.cache.store import FeatureStore
from featx.devices import available_threads, decoding_device
from featx.engines.engine import Engine
from featx.engines.opening import open_engine
from featx.errors import ImageError
from featx.extraction.gpu import Decoder, stacked
from featx.extraction.loader import Loaded, Loader
from featx.extraction.pipeline import check_numbers, check_place, recorded_engine, requested
from featx.extraction.timing import recall_rate
from featx.features import content_key
from featx.pixels.preprocess import GPU
from featx.pixels.views import view_names
from featx.sources.opening import open_source
from featx.sources.source import Source

if TYPE_CHECKING:
    from featx.extraction.loader import Pixels

# Files whose content is not known yet are read to know it, up to so many bytes; the rest counts as missing.
READ_BYTES = 1 << 30
SAMPLE = 64


def plan(
    data: str | Path | Source,
    backbone: str | BackboneRequest = "resnet18",
    *,
    weights: str = "pretrained",
    layer: str = "features",
    seed: int = 0,
    cache: str | Path = "cache",
    device: str = "auto",
    precision: str = "fp32",
    dtype: str = "float32",
    batch_size: int | None = None,
    workers: int | None = None,
    views: int = 0,
    decode: str = "exact",
) -> dict[str, Any]:
    """What `featx.extraction.sync` with these options would do; no feature is written.

    The answer: `found` = `cached` + `missing` + `duplicate` images; `unread` of the missing were not
    looked into, and may be cached or duplicates after all; `ignored` files that are no images. `seconds`
    for the missing at `images_per_second`, and `basis`, which says where that rate is from: the last
    run of this kind here, else a measurement now on a sample (that opens, and so may export, the
    backbone, in `exported_bytes` that stay in the cache). `bytes` the features will take, `free` bytes on the
    cache's disk, and `enough`.
    """
    check_numbers(seed, views, workers, batch_size)
    cache = Path(cache)
    source = data if isinstance(data, Source) else open_source(data)
    request = requested(backbone, weights, layer, seed, decode)
    check_place(request, cache, device)
    info = resolve(request, cache)
    specs = [info.spec(view=v, precision=precision, dtype=dtype) for v in view_names(seed, views)]
    stores = [FeatureStore(cache, spec) for spec in specs]
    workers = workers or available_threads()
    keys, known = _keys(source, cache)
    stored = np.logical_and.reduce([store.contains(keys) for store in stores]) & known
    first = np.zeros(len(source), bool)
    first[np.flatnonzero(known)[distinct(keys[known])]] = True
    missing = np.flatnonzero(~stored & (first | ~known))
    rate, basis = recall_rate(cache, specs, workers, device), "the last run of this kind on this machine"
    start, exported = 0.0, 0
    if rate is None and len(missing):
        recorded = recorded_engine(stores)
        if info.preprocess.pixels == GPU:
            decoding_device(device)
        options: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
        begin, before = time.perf_counter(), _engine_bytes(cache)
        engine = open_engine(request, info, cache=cache, engine=recorded, **options)
        exported = _engine_bytes(cache) - before
        if exported:  # the run itself will find what this one has exported
            engine.close()
            begin = time.perf_counter()
            engine = open_engine(request, info, cache=cache, engine=recorded, **options)
        with closing(engine):
            start = time.perf_counter() - begin
            size = min(len(missing), max(SAMPLE, 2 * engine.batch_size))
            sample = missing[np.linspace(0, len(missing) - 1, size).astype(int)]
            loader = Loader(source, info.preprocess, stores, workers)
            images = Decoder(loader, device)(sample) if info.preprocess.pixels == GPU else loader(sample)
            rate = _measured(images, engine, size)
        basis = f"measured now on {size} of the missing images"
    row_bytes = int(np.prod(info.row_shape)) * np.dtype(dtype).itemsize + KEY_BYTES
    needed = len(missing) * len(stores) * row_bytes
    there = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    return {
        "found": len(source),
        "ignored": len(source.ignored),
        "cached": int((stored & first).sum()),
        "missing": len(missing),
        "duplicate": len(source) - int((stored & first).sum()) - len(missing),
        "unread": int((~known).sum()),
        "images_per_second": None if rate is None else round(rate, 1),
        "seconds": None if rate is None else round(len(missing) / rate + start, 1),
        "basis": basis if rate is not None else "",
        "bytes": needed,
        "exported_bytes": exported,
        "free": free,
        "enough": needed < free,
        "backbone": info.name,
        "row_shape": list(info.row_shape),
        "notes": list(source.notes),
    }


def _engine_bytes(cache: Path) -> int:
    """What the cache's exported backbones take."""
    return sum(path.stat().st_size for path in (cache / "engines").glob("*.onnx"))


def _keys(source: Source, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Content keys `uint8 [N, 32]` and which are known, `bool [N]`: from the memo, and from reading a few files."""
    keys, known = np.zeros((len(source), KEY_BYTES), np.uint8), np.zeros(len(source), bool)
    if source.stats is not None:
        keys, known = KeyMemo(cache, source.root).lookup(source.ids, source.stats)
    room = READ_BYTES
    for row in np.flatnonzero(~known).tolist():
        try:
            data = source.read(row)
        except ImageError:
            continue  # the run itself will name it
        keys[row], known[row] = np.frombuffer(content_key(data), np.uint8), True
        room -= len(data)
        if room < 0:
            break
    return keys, known


def _measured(images: Generator[Loaded], engine: Engine, count: int) -> float:
    """Images per second from file to features, one batch decoded while the last is computed."""
    batch: list[Pixels] = []
    running: deque[Callable[[], np.ndarray]] = deque()
    begin = time.perf_counter()
    with closing(images) as loaded:
        for image in loaded:
            for _, pixels in image.views:
                batch.append(pixels)
                if len(batch) == engine.batch_size:
                    running.append(engine.submit(stacked(batch, engine)))
                    batch = []
                if len(running) > 1:
                    running.popleft()()
    if batch:
        running.append(engine.submit(stacked(batch, engine)))
    while running:
        running.popleft()()
    return count / (time.perf_counter() - begin)
