"""Whether memory grows with the data set: the peak of an extraction of few and of many tiny images.

    python benchmarks/memory.py 1000 100000

Each size runs in a process of its own, over a backbone without torch (the mean colour), so that what
is measured is featx's own book-keeping; the features are three numbers an image.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Colour:
    """An image's mean colour."""

    name = "colour"
    batch_size = 64

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(images.mean(axis=(2, 3), dtype=np.float32))

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        rows = self(images)
        return lambda: rows

    def close(self) -> None:
        pass


def write_images(root: Path, count: int) -> None:
    """`count` distinct PPM files of 16 x 16 pixels in ten class folders."""
    rng = np.random.default_rng(0)
    for folder in range(10):
        (root / f"class{folder}").mkdir(parents=True)
    for i in range(count):
        pixels = np.frombuffer(rng.bytes(768), np.uint8)
        (root / f"class{i % 10}" / f"image_{i:08d}.ppm").write_bytes(b"P6 16 16 255\n" + pixels.tobytes())


def measure(root: Path) -> None:
    """Extract and print the count, the seconds and the peak of this process, in bytes."""
    from featx.backbones.request import BackboneInfo
    from featx.cache.store import FeatureStore
    from featx.extraction.computing import compute
    from featx.extraction.job import prepare
    from featx.extraction.keys import KeyTable
    from featx.extraction.report import Chunk, describe
    from featx.options import complete
    from featx.pixels.preprocess import Preprocess

    preprocess = Preprocess(resize=16, crop=16)
    info = BackboneInfo("custom/colour", "00" * 32, "features", preprocess, (3,), None, False, 0, "")
    begin = time.perf_counter()
    job = prepare(root / "data", info, complete({"cache": root / "cache"}))
    # rows wait 20 s for their shard: at this speed that would be all of them, at a real backbone's some thousands
    stores = [FeatureStore(job.cache, spec, shard_seconds=1.0) for spec in job.specs]
    table = KeyTable(job.source, job.cache)
    chunk = Chunk()
    compute(job, table, stores, np.arange(len(job.source)), chunk, Colour())
    report = describe(job, table.findings(table.stored(stores)), stores, chunk, time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(report.extracted, time.perf_counter() - begin, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 100_000])
    parser.add_argument("--folder", type=Path, help="where the images are made; by default a temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    results = []
    try:
        for size in options.sizes:
            write_images(folder / str(size) / "data", size)
            command = [sys.executable, __file__, "--measure", str(folder / str(size))]
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            count, seconds, peak = text.split()
            assert int(count) == size
            results.append((size, int(peak)))
            print(f"{size:>9,} images: {float(seconds):7.1f} s, peak {int(peak) / 2**20:7.1f} MiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (few, small), (many, large) = results[0], results[-1]
    print(f"bytes an image more: {(large - small) / (many - few):.0f}")


if __name__ == "__main__":
    main()
