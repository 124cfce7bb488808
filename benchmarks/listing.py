"""How long `open_source` takes to list many files, beside `find`, which looks at them too.

    python benchmarks/listing.py [--files 100000] [--classes 100]

The files are hard links to one small file in a temporary folder, all in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from featx.sources.opening import open_source

LINKS = 30_000  # per file; ext4 allows 65,000


def lay_out(root: Path, files: int, classes: int) -> None:
    for number in range(files):
        seed = root.parent / f"seed-{number // LINKS}.jpg"
        if number % LINKS == 0:
            seed.write_bytes(b"x" * 100)
        folder = root / f"class-{number % classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(seed, folder / f"{number:07d}.jpg")
    with open(root.parent / "list.csv", "w") as table:
        table.write("path,label\n")
        for number in range(files):
            table.write(f"files/class-{number % classes:03d}/{number:07d}.jpg,{number % classes}\n")


def best(work: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args()
    above = Path(tempfile.mkdtemp(prefix="featx-listing-"))
    try:
        root = above / "files"
        lay_out(root, options.files, options.classes)
        assert len(open_source(root)) == len(open_source(above / "list.csv")) == options.files
        find = ["find", str(root), "-type", "f", "-printf", "%s %T@\n"]
        result = {
            "files": options.files,
            "folder_s": best(lambda: open_source(root)),
            "csv_s": best(lambda: open_source(above / "list.csv")),
            "find_s": best(lambda: subprocess.run(find, stdout=subprocess.DEVNULL, check=True)),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        }
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(above)


if __name__ == "__main__":
    main()
