"""The main path, read first: a data set's images -> content keys -> pixels -> features, each only once."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.memo import KeyMemo
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.devices import available_threads, check_device, choose_device, decoding_device
from featx.engines.engine import Engine
from featx.engines.opening import open_engine
from featx.errors import FeatxError, ImageError, SourceError
from featx.extraction.gpu import Decoder, stacked
from featx.extraction.loader import Loader
from featx.extraction.timing import Stages, remember_rate
from featx.features import Features, assign_splits, content_key, groups, labelled
from featx.pixels.preprocess import DECODERS, GPU
from featx.pixels.views import view_names
from featx.sources.opening import open_source
from featx.sources.source import Source
from featx.text import near, printable

if TYPE_CHECKING:
    from featx.extraction.loader import Pixels

# From so many images on, a run's rate is remembered for the next dry run.
RATE_IMAGES = 128
# A batch on its way through the engine: what waits for its rows, their keys, their view numbers.
Running = tuple[Callable[[], np.ndarray], np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Extraction:
    """A data set whose features are all in the cache. No feature is read before `features` is called."""

    source: Source
    request: BackboneRequest
    info: BackboneInfo
    cache: Path
    stores: list[FeatureStore]
    """One for the centre crop, then one for each augmented view."""
    rows: np.ndarray
    """`int64 [N]`: the images that have features, as row numbers of `source`."""
    keys: np.ndarray
    """`uint8 [N, 32]`: their content keys."""
    report: dict[str, Any]

    def features(self, view: int = 0, *, memory: float = float("inf")) -> Features:
        """The features of one view (0: the centre crop), with today's labels and splits.

        memory: bytes; features that take more stay in the cache, and are read by slices. By default none do.
        """
        source, store, rows = self.source, self.stores[view], self.rows.tolist()
        labels = [source.labels[i] if source.labels else "" for i in rows]
        y, class_names = labelled(labels, source.multilabel)
        given = np.array([source.splits[i] if source.splits else "" for i in rows], dtype="U5")
        splits, notes = assign_splits(self.keys, y, given, class_names)
        return Features(
            rows=StoredRows(store, self.keys) if self.exceeds(memory, len(self.keys)) else store.read(self.keys),
            y=y,
            ids=[source.ids[i] for i in rows],
            class_names=class_names,
            splits=splits,
            keys=self.keys,
            spec=store.spec,
            report=self.report | {"notes": [*self.report["notes"], *notes]},
            given=given,
        )

    def views(self, keys: np.ndarray, *, memory: float = float("inf")) -> list[np.ndarray | StoredRows]:
        """The rows of these keys, `uint8 [M, 32]`, in every view: in memory, or read by slices where the rows of
        all views together take more than `memory` bytes.
        """
        if self.exceeds(memory, len(keys) * len(self.stores)):
            return [StoredRows(store, keys) for store in self.stores]
        return [store.read(keys, mapped=False) for store in self.stores]

    def exceeds(self, memory: float, rows: int) -> bool:
        """Whether so many rows of features take more than `memory` bytes."""
        form = self.stores[0].form
        assert form is not None
        return rows * form.row_bytes > memory


def extract(data: str | Path | Source, backbone: str | BackboneRequest = "resnet18", **options: Any) -> Features:
    """The features of every readable image of `data`, computed at most once; options as for `sync`."""
    return sync(data, backbone, **options).features()


def sync(
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
) -> Extraction:
    """Bring the cache up to date with a data set: run the frozen backbone on the images it lacks.

    data: a folder, a manifest or a `Source`. backbone, weights, layer, seed: see `BackboneRequest`.
    device: `auto`, `cpu`, `cuda` or `cuda:1`. precision: `fp32`, `bf16` or `fp16`. dtype: `float32` or
    `float16`, as stored. workers: decoding threads, by default one a core. views: augmented views of
    every image beside its centre crop, seeded by `seed`. decode: `exact`; `fast`, which decodes large
    JPEGs at a smaller scale; or `gpu`, which decodes them on the GPU. The features of these two differ a
    little and are cached apart; `gpu` compares some of them with `exact` ones first.

    A row's key is the SHA-256 of the image's bytes: a second run computes nothing, nor does one after
    renaming, moving, relabelling or duplicating images. An image that cannot be read or decoded is
    counted, named and skipped. A run that is interrupted keeps what it has computed.

    The report's `found` = `cached` + `extracted` + `duplicate` + `skipped`, where `duplicate` counts the
    images with the same bytes as an earlier one of this data set; `ignored` counts files that are no images.
    """
    begin = time.perf_counter()
    check_device(device)
    check_numbers(seed, views, workers, batch_size)
    cache = Path(cache)
    source = data if isinstance(data, Source) else open_source(data)
    request = requested(backbone, weights, layer, seed, decode)
    check_place(request, cache, device)
    info = resolve(request, cache)
    specs = [info.spec(view=v, precision=precision, dtype=dtype) for v in view_names(seed, views)]
    stores = [FeatureStore(cache, spec) for spec in specs]
    keys, known = np.zeros((len(source), 32), np.uint8), np.zeros(len(source), bool)
    if source.stats is not None:
        memo = KeyMemo(cache, source.root)
        keys, known = memo.lookup(source.ids, source.stats)
    todo = np.flatnonzero(~(known & _stored(stores, keys)))
    seconds = {"list": time.perf_counter() - begin}
    opening = 0.0, 0.0
    cores = available_threads()
    stages = Stages(workers or cores, cores)
    errors: dict[int, str] = {}
    extracted = 0
    decoder: Decoder | None = None

    def named(key: np.ndarray) -> str:
        return source.ids[int(np.flatnonzero((keys == key).all(axis=1))[0])]

    if len(todo):
        loader = Loader(source, info.preprocess, stores, stages.workers)
        if info.preprocess.pixels == GPU:
            decoder, stages.by_gpu = Decoder(loader, device), True
        engine: Engine | None = None
        batch: list[tuple[int, bytes, Pixels]] = []
        running: deque[Running] = deque()
        with ExitStack() as stack:  # left in reverse: threads end, rows are committed, keys remembered
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")  # notes on odd EXIF, once an image
            if source.stats is not None:
                stack.callback(memo.record, source.ids, source.stats, keys, known)
            for store in stores:
                stack.enter_context(store)
            bar = stack.enter_context(tqdm(total=len(todo), desc="extract", unit=" images", disable=None))
            loaded = stack.enter_context(closing(decoder(todo) if decoder else loader(todo)))
            for image in stages.waiting(loaded):
                bar.update()
                if image.key:
                    keys[image.row] = np.frombuffer(image.key, np.uint8)
                known[image.row] = bool(image.key)
                if image.error:
                    errors[image.row] = image.error
                extracted += bool(image.views)
                if image.views and engine is None:
                    begun, before = time.perf_counter(), loader.counted()
                    engine = open_engine(
                        request,
                        info,
                        cache=cache,
                        device=device,
                        precision=precision,
                        batch_size=batch_size,
                        engine=recorded_engine(stores),
                    )
                    stack.callback(engine.close)
                    for store in stores:
                        store.computed_by(engine.name)
                    opening = begun, time.perf_counter()
                    stages.begin(loader, before, gpu=engine.name == "torch-cuda")
                if decoder and engine:
                    decoder.hold(engine)
                for view, pixels in image.views:
                    assert engine is not None
                    batch.append((view, image.key, pixels))
                    if len(batch) == engine.batch_size:
                        running.append(_submit(engine, batch))
                        batch = []
                    if len(running) > 1:  # the engine works on one batch while the rows of the last are stored
                        _keep(running.popleft(), stores, stages, named)
                        bar.set_postfix_str(stages.update(loader).brief(), refresh=False)
            if engine and batch:
                running.append(_submit(engine, batch))
            while running:
                _keep(running.popleft(), stores, stages, named)
            stages.update(loader)
    seconds["start"] = _covered(opening, decoder.opening if decoder else (0.0, 0.0))
    seconds["total"] = time.perf_counter() - begin
    report = _report(source, keys, known, _stored(stores, keys), errors, extracted, seconds, stages)
    report["notes"] += [note for store in stores for note in store.notes]
    report["decoded_on_gpu"] = decoder.decoded if decoder else 0
    report["decode_cosine"] = decoder.cosine if decoder else None
    if decoder and extracted and not decoder.decoded:
        report["notes"].append("no image was decoded on the GPU: none was a baseline JPEG, or it refused them")
    rows = report.pop("rows")
    if extracted >= RATE_IMAGES:
        remember_rate(cache, specs, stages.workers, device, report["images_per_second"])
    keys = keys if len(rows) == len(keys) else keys[rows]
    return Extraction(source, request, info, cache, stores, rows, keys, report)


def content_keys(data: str | Path | Source, cache: str | Path, *, whole: bool = False) -> np.ndarray:
    """`uint8 [N, 32]`: the keys of a data set's readable files; only those that changed are read.

    whole: raise `SourceError` where one cannot be read now, rather than leave it out.
    """
    source = data if isinstance(data, Source) else open_source(data)
    assert source.stats is not None
    memo = KeyMemo(Path(cache), source.root)
    keys, known = memo.lookup(source.ids, source.stats)
    for row in np.flatnonzero(~known).tolist():
        try:
            keys[row] = np.frombuffer(content_key(source.read(row)), np.uint8)
        except ImageError as error:
            if whole:
                raise SourceError(
                    f"{source.ids[row]} cannot be read now ({error}), so its row would be lost"
                ) from error
            continue
        known[row] = True
    memo.record(source.ids, source.stats, keys, known)
    return keys[known]


def requested(backbone: str | BackboneRequest, weights: str, layer: str, seed: int, decode: str) -> BackboneRequest:
    """The backbone that `sync`'s options ask for."""
    if isinstance(backbone, str):
        backbone = BackboneRequest(name=backbone, weights=weights, layer=layer, seed=seed)
    if decode not in DECODERS:
        raise FeatxError(f"decode is one of {', '.join(DECODERS)}, not {decode!r}.{near(decode, DECODERS)}")
    if decode != "exact":
        others = [pair for pair in backbone.preprocess if pair[0] != "pixels"]
        backbone = replace(backbone, preprocess=(*others, ("pixels", DECODERS[decode])))
    return backbone


def check_numbers(seed: int, views: int, workers: int | None, batch_size: int | None) -> None:
    """Raise `FeatxError` for what `sync` cannot count with."""
    given = (("seed", seed, 0), ("views", views, 0), ("workers", workers, 1), ("batch_size", batch_size, 1))
    for name, value, least in given:
        if value is not None and value < least:
            raise FeatxError(f"{name} is {least} or more, not {value}")
    if seed >= 2**63:  # what numpy and torch both take
        raise FeatxError(f"seed is less than 2**63, not {seed}")


def check_place(request: BackboneRequest, cache: Path, device: str) -> None:
    """Raise `FeatxError` for a GPU that is not here, before weights are loaded; a filled cache may need none."""
    if not (cache / "features").exists():
        if ("pixels", GPU) in request.preprocess:
            decoding_device(device)
        else:
            choose_device(device)


def recorded_engine(stores: list[FeatureStore]) -> str | None:
    """What computed the rows that are there; None where there are none. Raises `StoreError` where two engines did."""
    engine = next((store.engine for store in stores if store.engine), None)
    if engine:
        for store in stores:
            store.computed_by(engine)
    return engine


def _submit(engine: Engine, batch: list[tuple[int, bytes, Pixels]]) -> Running:
    """Start the engine on one batch of (view, key, pixels)."""
    result = engine.submit(stacked([pixels for _, _, pixels in batch], engine))
    keys = np.frombuffer(b"".join(key for _, key, _ in batch), np.uint8).reshape(-1, 32)
    return result, keys, np.array([view for view, _, _ in batch])


def _keep(running: Running, stores: list[FeatureStore], stages: Stages, named: Callable[[np.ndarray], str]) -> None:
    """Wait for a batch's rows and hand them to the stores they belong to; raise `FeatxError` if one is not finite.

    Once cached, such a row would come back however often it is extracted again. named: an image's id by its key.
    """
    result, keys, views = running
    begin = time.perf_counter()
    rows = result()
    middle = time.perf_counter()
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
        reduced = stores[0].spec.precision != "fp32"
        remedy = "use --precision fp32" if reduced else "its weights are damaged or another network's, so use others"
        raise FeatxError(
            f"the backbone gives NaN or infinity for {printable(named(keys[bad[0]]))} ({len(bad)} of the "
            f"{len(rows)} images in its batch, which is not stored); {remedy}"
        )
    for view in np.unique(views):
        stores[view].append(keys[views == view], rows[views == view])
    stages.waited += middle - begin
    stages.work["store"] += time.perf_counter() - middle


def _covered(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Seconds that either of two spans of time takes, each from its begin to its end."""
    both = min(one[1], other[1]) - max(one[0], other[0])
    return one[1] - one[0] + other[1] - other[0] - max(0.0, both)


def _stored(stores: list[FeatureStore], keys: np.ndarray) -> np.ndarray:
    """`bool [N]`: which keys have a row in every store."""
    return np.logical_and.reduce([store.contains(keys) for store in stores])


def _report(
    source: Source,
    keys: np.ndarray,
    known: np.ndarray,
    stored: np.ndarray,
    errors: dict[int, str],
    extracted: int,
    seconds: dict[str, float],
    stages: Stages,
) -> dict[str, Any]:
    """Count and name what happened; `rows` are the images that have features."""
    usable = known & stored
    rows = np.flatnonzero(usable)
    if not len(rows):
        first = "; ".join(f"{source.ids[i]}: {why}" for i, why in list(errors.items())[:3])
        raise SourceError(f"none of the {len(source)} images in {source.uri} could be read ({first})")
    by_key = {keys[row].tobytes(): why for row, why in errors.items()}
    skipped = [
        {"id": source.ids[i], "reason": errors.get(i) or by_key[keys[i].tobytes()]}
        for i in np.flatnonzero(~usable).tolist()
    ]
    distinct = len(np.unique(keys[rows, :8].copy().view(np.uint64)))
    twins: list[list[str]] = []
    conflicts: list[dict[str, str]] = []
    if distinct < len(rows):  # equal first bytes: compare whole keys
        number = groups(keys[rows])
        order = np.argsort(number, kind="stable")
        runs = np.split(rows[order], np.flatnonzero(np.diff(number[order])) + 1)
        distinct = len(runs)
        for run in (r.tolist() for r in runs if len(r) > 1):
            twins.append([source.ids[i] for i in run])
            if source.labels and len({source.labels[i] for i in run}) > 1:
                conflicts.append({source.ids[i]: source.labels[i] for i in run})
    notes = list(source.notes)
    if conflicts:
        notes.append(f"{len(conflicts)} images appear with the same bytes under several labels")
    busy = seconds["total"] - seconds["list"] - seconds["start"] + stages.meanwhile
    return {
        "rows": rows,
        "found": len(source),
        "ignored": len(source.ignored),
        "cached": distinct - extracted,
        "extracted": extracted,
        "duplicate": len(rows) - distinct,
        "skipped": len(skipped),
        "images_per_second": round(extracted / busy, 1) if extracted else None,
        "seconds": {name: round(value, 3) for name, value in (stages.work | seconds).items()},
        "shares": stages.shares,
        "used": round(stages.used, 3),
        "advice": stages.advice(),
        "ignored_files": source.ignored,
        "skipped_images": skipped,
        "duplicates": twins,
        "conflicts": conflicts,
        "notes": notes,
    }
