"""How long `open_source` takes to list many files, and how much memory, beside a bare walk that looks at each file.

    python benchmarks/listing.py [--files 1000000] [--rounds 5]

Twice: folders of 1,000 empty files, and 20 large folders; then a CSV manifest of a tenth of the files. The trees are
made in a temporary folder, and removed. Processor seconds are the least of several rounds, in which both walks take
turns; memory is the growth of the peak resident size in a process of its own, without the bytes of the names.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featx.sources.opening import open_source


def lay_out(root: Path, folders: int, each: int) -> None:
    for number in range(folders):
        folder = root / f"class-{number:04d}"
        folder.mkdir(parents=True)
        for place in range(number * each, (number + 1) * each):
            os.close(os.open(folder / f"image-{place:07d}.jpg", os.O_CREAT | os.O_WRONLY))


def walk(root: str) -> int:
    """The least that a listing can do: every name, and the stat of every file."""
    found, waiting = 0, [root]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    entry.stat()
                    found += 1
    return found


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak() -> int:
    """The most bytes that this process has held; not `ru_maxrss`, which a process takes over from its parent."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def grown(root: str, small: str) -> None:
    """Print the bytes a file that listing `root` adds to the peak of this process, beside its name."""
    open_source(small)  # imports, and what else comes once
    before = peak()
    source = open_source(root)
    after = peak()
    names = sum(len(os.fsencode(id)) for id in source.ids)
    print((after - before - names) / len(source))


def measure(root: Path, small: Path, rounds: int) -> str:
    """One row of the table."""
    files = walk(str(root))  # which fills the page cache
    bare, listing = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: walk(str(root))))
        listing.append(seconds(lambda: open_source(root)))
    command = [sys.executable, __file__, "--grown", str(root), str(small)]
    memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    folders = len(list(root.iterdir()))
    cells = f"{files:,} in {folders:,} folders", f"{min(bare):.2f} s", f"{min(listing):.2f} s"
    return f"| {' | '.join(cells)} | {min(listing) / min(bare):.2f} | {memory:.0f} |"


def measure_csv(root: Path, rounds: int) -> str:
    """A sentence on a manifest of every tenth file."""
    source = open_source(root)
    rows = source.take(np.arange(0, len(source), 10))
    table = root.parent / "list.csv"
    lines = (f"files/{id},{label}\n" for id, label in zip(rows.ids, rows.labels or (), strict=True))
    table.write_text("path,label\n" + "".join(lines))
    spent = min(seconds(lambda: open_source(table)) for _ in range(rounds))
    return f"A CSV manifest of {len(rows):,} of them: {spent:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grown", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grown:
        return grown(*options.grown)

    print(f"Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("| files | bare walk | listing | ratio | bytes a file beside its name |\n|---|---|---|---|---|")
    for folders in (max(1, options.files // 1000), 20):
        with tempfile.TemporaryDirectory(prefix="featx-listing-") as above:
            root, small = Path(above, "files"), Path(above, "small")
            lay_out(root, folders, options.files // folders)
            lay_out(small, 1, 1)
            print(measure(root, small, options.rounds), flush=True)
            if folders == 20:
                csv = measure_csv(root, options.rounds)
    print(f"\n{csv}")


if __name__ == "__main__":
    main()
