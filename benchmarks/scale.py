"""What Ray costs beside the plain engine, what a second worker costs, and the memory of a million rows.

    python benchmarks/scale.py --photos FOLDER --weights FILE [--images 16000] [--pairs 5] [--folder FOLDER]
    python benchmarks/scale.py --part rows [--rows 1000000] [--width 512] [--dtype float32] [--folder FOLDER]

The images are photographs again and again, each with other bytes behind its end: the pixels repeat, the keys do not.
SqueezeNet 1.1 computes them from an empty store, its export at hand: plainly on one core with one decoding thread,
on a local Ray cluster of one core, and on one of two cores. The three take turns, each in a process of its own that
is bound to these cores. CPU seconds are all threads' of the processes that compute, from the moment that the engine
is open and warm to the last row stored. What else Ray keeps running is stated apart. Rows must be equal, byte for byte.

--part rows fills a store with rows of random numbers, opens it for the first time, so that every byte is hashed, and
reads it in slices: all of it, then 80 % of the rows, as a split has them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from store_at_scale import fresh_peak, resident

from featx.cache import shards, writing
from featx.cache.shards import Form
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.devices import processor
from featx.engines.engine import Engine
from featx.extraction import cluster, computing
from featx.extraction.job import Job, prepare
from featx.extraction.keys import KeyTable
from featx.extraction.pipeline import extract
from featx.extraction.report import Chunk
from featx.features import FeatureSpec
from featx.options import complete
from featx.sources.source import Source

BACKBONE = "squeezenet1_1"
LEGS = {"plain": 1, "ray, 1 worker": 1, "ray, 2 workers": 2}
"""What is compared, and on how many cores."""
MARKS = "FEATX_BENCHMARK_MARKS"
"""The variable that names the folder where tasks note their times."""
BESIDE = ("starting the workers, CPU s", "driver, CPU s", "other processes of Ray, CPU s")
"""Counted apart: what is done once, however many images there are."""
SHARD_BYTES = 16 << 20
SLICE = 8192

Figures = dict[str, float]


def make_images(photos: Path, folder: Path, count: int) -> None:
    found = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    for i in range(count):
        place = folder / f"{i // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:07d}.jpg").write_bytes(found[i % len(found)] + b"number" + i.to_bytes(8, "big"))


def warm(engine: Engine, crop: int) -> None:
    for _ in range(2):
        engine(np.zeros((engine.batch_size, 3, crop, crop), np.uint8))


def opened(data: Path, cache: Path, weights: Path, workers: int) -> tuple[Job, KeyTable, list[FeatureStore]]:
    job = prepare(data, BACKBONE, complete({"cache": cache, "weights": str(weights), "workers": workers}))
    return job, KeyTable(job.source, job.cache), job.open_stores()


def plain(data: Path, cache: Path, weights: Path) -> Figures:
    job, table, stores = opened(data, cache, weights, 1)
    engine = job.open_engine(stores)
    warm(engine, job.info.preprocess.crop)
    chunk, numbers = Chunk(), np.arange(len(job.source))
    begin, wall = time.process_time(), time.perf_counter()
    computing.compute(job, table, stores, numbers, chunk, engine)
    used = {"cpu": time.process_time() - begin, "wall": time.perf_counter() - wall}
    assert chunk.extracted == len(job.source)
    return used | {"images": chunk.extracted}


def timed_task(shared: bytes, source: Source) -> Any:
    """`compute_task`, in a process that notes its CPU and wall seconds when it is warm and after each task."""
    from featx.extraction.cluster import _kept, compute_task

    note = Path(os.environ[MARKS]) / str(os.getpid())
    if not note.exists():
        job, _, engine, _ = _kept(shared)
        for _ in range(2):
            engine(np.zeros((engine.batch_size, 3, job.info.preprocess.crop, job.info.preprocess.crop), np.uint8))
        note.write_text(f"{time.process_time()} {time.time()}\n")
    part = compute_task(shared, source)
    with open(note, "a") as file:
        file.write(f"{time.process_time()} {time.time()}\n")
    return part


def on_ray(data: Path, cache: Path, weights: Path, workers: int) -> Figures:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[MARKS] = tempfile.mkdtemp(dir=cache.parent)
    import ray

    begin = time.perf_counter()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = time.perf_counter() - begin
    try:
        job, table, stores = opened(data, cache, weights, 1)
        chunk, numbers = Chunk(), np.arange(len(job.source))
        with mock.patch.object(cluster, "compute_task", timed_task):
            cluster.compute(job, table, stores, numbers, chunk)
        assert chunk.extracted == len(job.source), chunk
        notes = {int(file.name): marks(file) for file in Path(os.environ[MARKS]).iterdir()}
        others = {pid: used for pid, used in descendants(os.getpid()).items() if pid not in notes}
    finally:
        ray.shutdown()
    assert len(notes) == workers, f"{len(notes)} processes computed, not {workers}"
    walls = [wall for times in notes.values() for _, wall in times]
    return {
        "cpu": sum(times[-1][0] - times[0][0] for times in notes.values()),
        "wall": max(walls) - min(walls),
        "images": chunk.extracted,
        "starting the workers, CPU s": sum(times[0][0] for times in notes.values()),
        "driver, CPU s": time.process_time(),
        "other processes of Ray": len(others),
        "other processes of Ray, CPU s": sum(others.values()),
        "starting Ray, wall s": started,
    }


def marks(file: Path) -> list[tuple[float, float]]:
    """CPU and wall seconds, as one process has noted them."""
    lines = (line.split() for line in file.read_text().splitlines())
    return [(float(used), float(wall)) for used, wall in lines]


def descendants(of: int) -> dict[int, float]:
    """CPU seconds of each process that descends from this one; Linux."""
    above, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        above[pid], used[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    below = {of}
    while more := {pid for pid, parent in above.items() if parent in below} - below:
        below |= more
    return {pid: used[pid] for pid in below - {of}}


def leg(name: str, options: argparse.Namespace) -> Figures:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: LEGS[name]])
    data, cache = options.folder / "images", options.folder / "cache"
    if name == "plain":
        return plain(data, cache, options.weights)
    return on_ray(data, cache, options.weights, LEGS[name])


def compare(options: argparse.Namespace) -> list[str]:
    """Legs by turns; the rows of each are compared with the first one's."""
    folder, cache = options.folder, options.folder / "cache"
    make_images(options.photos, folder / "images", options.images)
    few = folder / "few"
    make_images(options.photos, few, 8)
    extract(few, BACKBONE, weights=str(options.weights), cache=cache)  # the export, for all

    found: dict[str, list[Figures]] = {name: [] for name in LEGS}
    first: np.ndarray | None = None
    for pair in range(options.pairs):
        for name in list(LEGS)[:: 1 if pair % 2 == 0 else -1]:
            shutil.rmtree(cache / "features", ignore_errors=True)
            shutil.rmtree(cache / "memo", ignore_errors=True)
            figures = in_process("--leg", name, "--weights", str(options.weights), "--folder", str(folder))
            found[name].append(figures)
            rows = extract(folder / "images", BACKBONE, weights=str(options.weights), cache=cache).X
            first = rows if first is None else first
            assert np.array_equal(rows.view(np.uint8), first.view(np.uint8)), f"{name}: other rows than the first leg's"
    return compared(found)


def compared(found: dict[str, list[Figures]]) -> list[str]:
    lines = [f"| | {' | '.join(['CPU s', 'ms an image', 'wall s', *BESIDE])} |", "|---" * (4 + len(BESIDE)) + "|"]
    for name, runs in found.items():
        cells = [each(runs, "cpu"), f"{median(runs, 'cpu') / runs[0]['images'] * 1e3:.2f}", each(runs, "wall")]
        cells += [each(runs, what) for what in BESIDE]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for name, base in (("ray, 1 worker", "plain"), ("ray, 2 workers", "ray, 1 worker")):
        ratios = [a["cpu"] / b["cpu"] for a, b in zip(found[name], found[base], strict=True)]
        listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        lines.append(f"CPU seconds of {name} to {base}, pair by pair: {listed}; median {statistics.median(ratios):.3f}")
    started = [run["starting Ray, wall s"] for name in found for run in found[name] if name != "plain"]
    count = found["ray, 1 worker"][0]["other processes of Ray"]
    lines.append(f"Ray starts in {statistics.median(started):.1f} s (median), {count:.0f} processes beside one worker")
    return lines


def each(runs: list[Figures], what: str) -> str:
    return ", ".join(f"{run[what]:.1f}" for run in runs if what in run)


def median(runs: list[Figures], what: str) -> float:
    return statistics.median(run[what] for run in runs)


# --- a million rows


def rows_spec(options: argparse.Namespace) -> FeatureSpec:
    return replace(FeatureSpec("torchvision/resnet18", "ab" * 32), dtype=options.dtype)


def fill(options: argparse.Namespace) -> Figures:
    """Shards of 16 MiB of random numbers; their sum is what reading must find."""
    form, rng, total = Form(rows_spec(options), "benchmark", (options.width,)), np.random.default_rng(0), 0.0
    folder = options.folder / "features" / form.spec.folder_name
    shards.create(folder, form)
    step = SHARD_BYTES // form.row_bytes
    for start in range(0, options.rows, step):
        count = min(step, options.rows - start)
        rows = rng.standard_normal((count, options.width), dtype=np.float32).astype(form.dtype)
        keys = np.frombuffer(rng.bytes(count * 32), np.uint8).reshape(count, 32)
        writing.write(folder, form, keys, [rows])
        total += float(rows.sum(dtype=np.float64))
    return {"sum": total}


def read(options: argparse.Namespace) -> Figures:
    """The first opening, then all rows in slices, then 80 % of them in the order they are stored."""
    base = resident("VmRSS") - resident("RssFile")
    before, begin, wall = fresh_peak(), time.process_time(), time.perf_counter()
    store = FeatureStore(options.folder, rows_spec(options))
    figures = {"open, CPU s": time.process_time() - begin, "open, wall s": time.perf_counter() - wall}
    figures |= {"open, memory, MB": resident("VmHWM") - before, "shards": len(store.listing())}

    table = StoredRows(store, store.stored())
    some = np.flatnonzero(np.random.default_rng(1).random(options.rows) < 0.8)
    for name, part in (("all rows", table), ("80 % of them", table.take(some))):
        fresh_peak()
        begin, wall, total, own = time.process_time(), time.perf_counter(), 0.0, 0.0
        for rows in slices(part):
            total += float(rows.sum(dtype=np.float64))
            own = max(own, resident("VmRSS") - resident("RssFile"))
        figures |= {f"{name}, CPU s": time.process_time() - begin, f"{name}, wall s": time.perf_counter() - wall}
        figures |= {f"{name}, memory, MB": resident("VmHWM") - before, f"{name}, without mapped files, MB": own - base}
        figures[f"{name}, sum"] = total
    return figures


def slices(table: StoredRows) -> Iterator[np.ndarray]:
    for start in range(0, table.shape[0], SLICE):
        yield table[start : start + SLICE]


def million(options: argparse.Namespace) -> list[str]:
    size = ["--rows", str(options.rows), "--width", str(options.width), "--dtype", options.dtype]
    filled = in_process("--leg", "fill", *size, "--folder", str(options.folder))
    time.sleep(2.5)  # a younger shard is hashed again at the next opening
    figures = in_process("--leg", "read", *size, "--folder", str(options.folder))
    total = figures.pop("all rows, sum")
    assert abs(total - filled["sum"]) < 1e-6 * options.rows * options.width, (total, filled)
    figures.pop("80 % of them, sum")
    data = options.rows * options.width * np.dtype(options.dtype).itemsize / 1e6
    lines = [f"{options.rows:,} x {options.width} {options.dtype}, {data:,.0f} MB, slices of {SLICE:,} rows", ""]
    lines += ["| what | figure |", "|---|---|"]
    return lines + [f"| {name} | {value:,.1f} |" for name, value in figures.items()]


def in_process(*arguments: str) -> Figures:
    """What one leg prints, run in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    print(" ".join(arguments[:2]), text, file=sys.stderr, flush=True)
    figures: Figures = json.loads(text)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[argparse.Namespace], list[str]]] = {"ray": compare, "rows": million}
    parser.add_argument("--part", choices=list(parts), default="ray")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.leg:
        single = {"fill": fill, "read": read}.get(options.leg)
        print(json.dumps(single(options) if single else leg(options.leg, options)))
        return
    if options.part == "ray" and not (options.photos and options.weights):
        parser.error("--photos and --weights are needed: a folder of JPEGs, and SqueezeNet 1.1's checkpoint")

    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}\n")
    options.folder = Path(tempfile.mkdtemp(prefix="featx-scale-", dir=options.folder))
    try:
        print("\n".join(parts[options.part](options)))
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
