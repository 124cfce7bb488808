"""What the cache costs: loading, looking up, writing, and a warm run on many files.

    python benchmarks/cache.py [--part load lookup write warm] [--photos FOLDER --weights FILE]
                               [--json FILE] [--markdown FILE]

One run, medians, everything in the page cache, in a temporary folder. `warm` needs the whole of featx
and 100,000 hard links to 1,000 images; the others need the store alone. photos, weights: SqueezeNet
1.1's features of these images, repeated, are one of the contents that lzf compresses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featx.cache import caching
from featx.cache.store import FeatureStore
from featx.extraction.pipeline import extract
from featx.features import FeatureSpec

SPEC = FeatureSpec("torchvision/resnet18", "ab" * 32)
# images/s that the cache must keep up with: ResNet-18 and SqueezeNet 1.1 on two cores, and a busy GPU
RATES = {"ResNet-18, 2 cores": 120, "SqueezeNet 1.1, 2 cores": 469, "a GPU at 5,000 images/s": 5000}


def table(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    return keys, rng.standard_normal((count, width), dtype=np.float32)


def fill(cache: Path, keys: np.ndarray, rows: np.ndarray, batch: int = 256) -> None:
    with FeatureStore(cache, SPEC, engine="benchmark") as store:
        for start in range(0, len(keys), batch):
            store.append(keys[start : start + batch], rows[start : start + batch])


def median(work: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a noisy neighbour hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(times):
        for name, one in work.items():
            begin = time.perf_counter()
            one()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def touched(rows: np.ndarray) -> np.ndarray:
    """Read one value of every 4 KiB, so that a memory-mapped array has really been loaded."""
    rows.reshape(-1)[:: 4096 // rows.itemsize].sum()
    return rows


def load(folder: Path, photos: Path | None = None, weights: Path | None = None) -> dict[str, Any]:
    """200 MB of float32 features, `[50000, 1024]`, in stored order; half of them 0, as behind a ReLU.

    What lzf costs depends on the values: chunks that it cannot compress are kept as they are. So it is also
    given dense random values, and real features. The cache and numpy do not look at the values.
    """
    keys, dense = table(50_000, 1024)
    rows = np.maximum(dense, 0)
    fill(folder / "shards", keys, rows)
    fill(folder / "one", keys, rows)
    caching.compact(folder / "one", SPEC.folder_name)
    np.save(folder / "rows.npy", rows)
    with h5py.File(folder / "lzf.h5", "w") as file:
        file.create_dataset("rows", data=rows, chunks=(256, 1024), compression="lzf")
        file.create_dataset("dense", data=dense, chunks=(256, 1024), compression="lzf")
        if photos:
            X = extract(photos, "squeezenet1_1", weights=str(weights), cache=folder / "real").X
            real = np.random.default_rng(5).permutation(np.tile(X, (100_000 // len(X) + 1, 1))[:100_000])
            file.create_dataset("real", data=real, chunks=(256, X.shape[1]), compression="lzf")
            print(f"  real features: {(X == 0).mean():.0%} of the values are 0")
    time.sleep(2.5)  # a younger shard is read and hashed again at every opening
    for name in ("shards", "one"):
        begin = time.perf_counter()
        store = FeatureStore(folder / name, SPEC)
        assert np.array_equal(store.read(keys), rows)
        print(f"  {name}: {len(store.listing())} files, first opening (hashes all) {time.perf_counter() - begin:.3f} s")
    some = np.random.default_rng(1).permutation(len(rows))[:2000]

    def per_row() -> None:
        with h5py.File(folder / "lzf.h5") as file:
            for i in some.tolist():
                file["rows"][i]

    def whole_lzf(name: str) -> None:
        with h5py.File(folder / "lzf.h5") as file:
            file[name][()]

    shuffled = np.random.default_rng(2).permutation(len(rows))
    store = FeatureStore(folder / "shards", SPEC)

    def stream() -> None:
        for start in range(0, len(keys), 256):
            store.read(keys[shuffled[start : start + 256]], mapped=False)

    work: dict[str, Callable[[], object]] = {
        "numpy.load": lambda: touched(np.load(folder / "rows.npy")),
        "numpy.load, mmap_mode": lambda: touched(np.load(folder / "rows.npy", mmap_mode="r")),
        "featx, shards": lambda: touched(FeatureStore(folder / "shards", SPEC).read(keys)),
        "featx, after compact": lambda: touched(FeatureStore(folder / "one", SPEC).read(keys)),
        "featx, after compact, copied": lambda: np.array(FeatureStore(folder / "one", SPEC).read(keys)),
        "featx, shards, shuffled": lambda: FeatureStore(folder / "shards", SPEC).read(keys[shuffled]),
        "featx, shards, shuffled batches of 256": stream,
        "h5py, chunked lzf, whole": lambda: whole_lzf("rows"),
        "h5py, chunked lzf, whole, dense values that it cannot compress": lambda: whole_lzf("dense"),
    }
    if photos:
        work["h5py, chunked lzf, whole, real features"] = lambda: whole_lzf("real")
    seconds = median(work, 7)
    seconds["h5py, chunked lzf, row by row, shuffled"] = median({"": per_row}, 3)[""] * len(rows) / len(some)
    rate = {name: rows.nbytes / 1e6 / value for name, value in seconds.items()}
    shares = {}
    if photos:
        shares["shards / lzf whole, real features"] = (
            rate["featx, shards"] / rate["h5py, chunked lzf, whole, real features"]
        )
    return {
        "MB": rows.nbytes / 1e6,
        "MB/s": rate,
        "ratios": shares
        | {
            "shards / numpy.load (>= 0.5)": rate["featx, shards"] / rate["numpy.load"],
            "compact / numpy.load (>= 0.95)": rate["featx, after compact"] / rate["numpy.load"],
            "shards / lzf whole (>= 3)": rate["featx, shards"] / rate["h5py, chunked lzf, whole"],
            "shards / lzf row by row (>= 20)": rate["featx, shards"] / rate["h5py, chunked lzf, row by row, shuffled"],
            "shuffled batches / lzf row by row": rate["featx, shards, shuffled batches of 256"]
            / rate["h5py, chunked lzf, row by row, shuffled"],
        },
    }


def lookup(folder: Path, count: int = 1_000_000) -> dict[str, Any]:
    """Open a cache of a million rows and ask for a million keys in another order, in a fresh process."""
    keys, rows = table(count, 4)
    with FeatureStore(folder / "many", SPEC, engine="benchmark", shard_bytes=1 << 20) as store:
        for start in range(0, count, 1 << 16):
            store.append(keys[start : start + (1 << 16)], rows[start : start + (1 << 16)])
    np.save(folder / "asked.npy", keys[np.random.default_rng(3).permutation(count)])
    time.sleep(2.5)
    FeatureStore(folder / "many", SPEC)
    code = f"""
import json, sys, time, numpy as np
from pathlib import Path
from featx.cache.store import FeatureStore
from featx.features import FeatureSpec
asked = np.load(sys.argv[2])
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
before = peak(); begin = time.perf_counter()
store = FeatureStore(Path(sys.argv[1]), FeatureSpec({SPEC.backbone!r}, {SPEC.weights!r}))
opened = time.perf_counter()
assert store.contains(asked).all()
end = time.perf_counter()
print(json.dumps([end - begin, opened - begin, peak() - before, peak()]))
"""
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", code, str(folder / "many"), str(folder / "asked.npy")]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    total, opening, more, peak = np.median(np.array(runs), axis=0).tolist()
    return {
        "keys": count,
        "seconds (< 2)": total,
        "of which opening": opening,
        "MiB on top of the asked keys (< 200)": more,
        "MiB of the whole process": peak,
    }


def write(folder: Path) -> dict[str, Any]:
    """Append 40,000 rows of 512 float32 in batches of 32, in shards of 16 MiB, fsynced."""
    keys, rows = table(40_000, 512)
    seconds = []
    for i in range(5):
        begin = time.perf_counter()
        fill(folder / f"write-{i}", keys, rows, batch=32)
        seconds.append(time.perf_counter() - begin)
    each = statistics.median(seconds) / len(keys)
    share = {f"% of {name} (< 2)": 100 * each * rate for name, rate in RATES.items()}
    return {"MB/s": rows.nbytes / 1e6 / statistics.median(seconds), "us per image": each * 1e6} | share


def warm(folder: Path, files: int = 100_000, images: int = 1000) -> dict[str, Any]:
    """`featx extract` on an unchanged folder, as a process, beside `find` on the same folder."""
    from PIL import Image

    root = folder / "files"
    rng = np.random.default_rng(4)
    for number in range(files):
        first = folder / f"image-{number % images}.png"
        if number < images:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(first)
        target = root / f"class-{number % 100:03d}" / f"{number:07d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(first, target)
    time.sleep(2.5)
    extract = [sys.executable, "-m", "featx", "extract", str(root), "--backbone", "squeezenet1_1"]
    extract += ["--weights", "random", "--cache", str(folder / "cache"), "--json"]
    find = ["find", str(root), "-type", "f", "-printf", "%s %T@\\n"]

    def run(command: list[str]) -> dict[str, Any]:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        values: dict[str, Any] = json.loads(done.stdout) if command is extract else {}
        return values

    report = run(extract)
    print(f"  first run: {json.dumps({k: report[k] for k in ('found', 'extracted', 'duplicate')})}")
    time.sleep(2.5)
    run(extract)  # hashes the shard once more and believes it from then on
    assert run(extract)["extracted"] == 0
    seconds = median({"find": lambda: run(find), "featx": lambda: run(extract)}, 7)
    nothing = median({"": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)}, 5)[""]
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", *extract[1:]], check=True, capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in imports.stderr.splitlines() if "|" in line}
    assert not {"torch", "h5py", "sklearn"} & loaded, sorted(loaded)
    return {
        "files": files,
        "find, s": seconds["find"],
        "featx extract, s": seconds["featx"],
        "allowed, s (3 x find + 0.5)": 3 * seconds["find"] + 0.5,
        "python -c pass, s": nothing,
        "phases": run(extract).get("seconds", {}),
    }


def conditions() -> dict[str, Any]:
    variables = ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "HDF5": h5py.version.hdf5_version,
        "kernel": platform.release(),
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
    }


def rows_of(part: str, result: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines += rows_of(f"{part}, {name}", value)
        else:
            shown = value if isinstance(value, int | str) else f"{value:.3g}" if value < 100 else f"{value:,.0f}"
            lines.append(f"| {part} | {name} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "load": lambda folder: load(folder, options.photos, options.weights),
        "lookup": lookup,
        "write": write,
        "warm": warm,
    }
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"conditions": conditions()}
    print(json.dumps(results["conditions"]))
    for name in options.part:
        folder = Path(tempfile.mkdtemp(prefix="featx-cache-", dir=options.folder))
        try:
            print(name)
            results[name] = parts[name](folder)
            print("\n".join(rows_of(name, results[name])), flush=True)
        finally:
            shutil.rmtree(folder)
    results["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.markdown:
        lines = [line for name in options.part for line in rows_of(name, results[name])]
        options.markdown.write_text("\n".join(["| part | what | value |", "|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    main()
