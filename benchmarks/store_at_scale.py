"""What the cache's metadata costs at a million rows and more: listing, opening, looking up, memory.

    python benchmarks/store_at_scale.py [--rows 1000000 10000000] [--shard-rows 5000] [--memo-rows 10000000]
                                        [--file-rows 1000000] [--steps list open ...] [--folder FOLDER]
                                        [--markdown FILE]

The shards are real files with random keys, but their rows have one column: what is measured does not depend on
a row's width, except the first opening, which hashes every byte. Needs 38 bytes of disk a row. Each step runs in a
process of its own; memory is its peak beyond what it had after its imports. Seconds are CPU seconds of all threads,
so that other work on the machine disturbs them little. With 10^8 rows this takes 8 GB of memory and half an hour;
the memo is left out beyond --memo-rows, since the ids alone would take 8 GB then. The list of the images is measured
on empty files, 1,000 in a folder, up to --file-rows.

A folder of 10^9 rows is measured by its names alone (--names): empty files in the place of shards, and a
`verified.json` of as many made-up entries.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from listing import lay_out

from featx.cache import shards, writing
from featx.cache.light import LightStore
from featx.cache.memo import KeyMemo
from featx.cache.shards import Form, Shard
from featx.cache.store import FeatureStore
from featx.devices import processor
from featx.features import FeatureSpec
from featx.sources.opening import open_source

SPEC = FeatureSpec("torchvision/resnet18", "ab" * 32)
FORM = Form(SPEC, "benchmark", (1,))
ASKED = 200_000  # keys that are looked up, half of which are stored
NAMES = (200_000, 400_000, 1_000_000)  # shards of 10^9 rows, where a shard has 5,000, 2,500, 1,000

Figures = dict[str, float]


def keys_of(shard: int, count: int) -> np.ndarray:
    """`uint8 [count, 32]`, as random as SHA-256s, and the same each time."""
    return np.frombuffer(np.random.default_rng(shard).bytes(count * 32), np.uint8).reshape(count, 32)


def asked(rows: int, shard_rows: int) -> np.ndarray:
    """Keys in random order, one half of them stored."""
    rng, count = np.random.default_rng(7), -(-rows // shard_rows)
    some = np.concatenate([keys_of(int(i), shard_rows) for i in rng.permutation(count - 1)[:50]])
    stored = rng.permutation(some)[: ASKED // 2]
    return rng.permutation(np.concatenate([stored, keys_of(1 << 40, len(stored))]))


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fresh_peak() -> float:
    """MB that this process has; its peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> float:
    """VmRSS, VmHWM (its peak) or RssFile (of mapped files) of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(cache: Path, rows: int, shard_rows: int) -> Figures:
    folder = cache / "features" / SPEC.folder_name
    shards.create(folder, FORM)
    begin, count = cpu(), 0
    for start in range(0, rows, shard_rows):
        part = min(shard_rows, rows - start)
        writing.write(folder, FORM, keys_of(count, part), [np.ones((part, 1), FORM.dtype)])
        count += 1
    return {"shards": count, "write a shard, CPU ms": (cpu() - begin) / count * 1e3, "bytes": tree_bytes(folder)}


def list_shards(cache: Path, rows: int, shard_rows: int) -> Figures:
    begin = cpu()
    found = shards.list_shards(cache / "features" / SPEC.folder_name)
    assert len(found) == -(-rows // shard_rows)
    return {"list the shards, CPU s": cpu() - begin}


def first(cache: Path, rows: int, shard_rows: int) -> Figures:
    time.sleep(2.5)  # a younger shard is not entered in verified.json
    begin = cpu()
    FeatureStore(cache, SPEC)
    verified = cache / "features" / SPEC.folder_name / "verified.json"
    return {"first opening, CPU s": cpu() - begin, "verified.json, bytes": verified.stat().st_size}


def opening(cache: Path, rows: int, shard_rows: int) -> Figures:
    return opened(cache, rows, shard_rows, light=False)


def light(cache: Path, rows: int, shard_rows: int) -> Figures:
    """As a process opens it that only adds rows."""
    return opened(cache, rows, shard_rows, light=True)


def opened(cache: Path, rows: int, shard_rows: int, *, light: bool) -> Figures:
    what, keys = "light store" if light else "store", asked(rows, shard_rows)
    before, begin = fresh_peak(), cpu()
    store = LightStore(cache, SPEC) if light else FeatureStore(cache, SPEC)
    figures = {f"{what}: open, CPU s": cpu() - begin, f"{what}: memory of that, MB": resident("VmHWM") - before}
    for name, look in (("look up", store.contains), ("confirm", store.confirm)):
        if name == "look up" or light:
            begin = cpu()
            look(keys[:100])
            figures[f"{what}: {name} 100 keys at first, CPU s"] = cpu() - begin
            begin = cpu()
            found = look(keys)
            figures[f"{what}: {name}, CPU us a key"] = (cpu() - begin) / len(keys) * 1e6
            wrong = int(found.sum()) - len(keys) // 2  # a light store may say yes of a few that are not stored
            assert 0 <= wrong <= (len(keys) // 20 if light and look == store.contains else 0), wrong
    begin = cpu()
    store.refresh()
    figures[f"{what}: refresh, nothing new, CPU s"] = cpu() - begin
    return figures | {f"{what}: memory of all that, MB": resident("VmHWM") - before}


def memo(cache: Path, rows: int, shard_rows: int) -> Figures:
    ids = [f"class-{i // 1000:06d}/image-{i:010d}.jpg" for i in range(rows)]
    stats = np.full((rows, 4), 10**15, np.int64)
    stats[:, 3] = np.arange(rows)
    keys, root = keys_of(0, rows), Path("/images")
    before, begin = fresh_peak(), cpu()
    KeyMemo(cache, root).record(ids, stats, keys, np.ones(rows, bool))
    figures = {"memo: record all, CPU s": cpu() - begin, "memo: bytes": tree_bytes(cache / "memo")}

    begin = cpu()
    known = KeyMemo(cache, root).lookup(ids, stats)[1]
    figures["memo: open and look all up, CPU s"] = cpu() - begin
    assert known.all()

    few = slice(rows // 2, rows // 2 + max(1, rows // 100))
    begin = cpu()
    KeyMemo(cache, root).record(ids[few], stats[few], keys[few], np.ones(len(ids[few]), bool))
    figures["memo: record a chunk of 1 % beside it, CPU s"] = cpu() - begin
    figures["memo: known of all after that, %"] = float(KeyMemo(cache, root).lookup(ids, stats)[1].mean()) * 100
    return figures | {"memo: memory, MB": resident("VmHWM") - before}


def files(cache: Path, rows: int, shard_rows: int) -> Figures:
    """The list of the images themselves, which every process that extracts makes for itself."""
    root = cache / "images" / "files"
    root.mkdir(parents=True)
    lay_out(root, -(-rows // 1000), 1000)
    before, begin = fresh_peak(), cpu()
    source = open_source(root)
    figures = {"list the images, CPU s": cpu() - begin, "list of the images: memory, MB": resident("VmHWM") - before}
    figures["list of the images: memory an image, bytes"] = (resident("VmRSS") - before) * 1e6 / rows
    assert len(source) == rows
    return figures


def names(cache: Path, count: int, shard_rows: int) -> Figures:
    """A folder of so many empty shards, and a `verified.json` that names them."""
    folder = cache / "features" / SPEC.folder_name
    shards.create(folder, FORM)
    made = [f"{i:016x}-{i:064x}.h5" for i in range(count)]
    for name in made:
        os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY))
    begin = cpu()
    found = shards.list_shards(folder)
    figures = {"list, CPU s": cpu() - begin}
    before, begin = fresh_peak(), cpu()
    shards.write_verified(folder, {name: Shard(name, found[name], 5000, 2048, 163840) for name in made})
    figures["write verified.json, CPU s"] = cpu() - begin
    figures["verified.json, bytes"] = (folder / "verified.json").stat().st_size
    begin = cpu()
    read = len(shards.read_verified(folder))
    return figures | {
        "read verified.json, CPU s": cpu() - begin,
        "entries read back": read,
        "memory, MB": resident("VmHWM") - before,
    }


STEPS: dict[str, Callable[[Path, int, int], Figures]] = {
    "write": write,
    "list": list_shards,
    "first": first,
    "open": opening,
    "light": light,
    "memo": memo,
    "files": files,
    "names": names,
}


def run(step: str, cache: Path, count: int, shard_rows: int) -> Figures:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(cache), "--rows", str(count)]
    command += ["--shard-rows", str(shard_rows)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{count:,}, {step}: {text}", end="", file=sys.stderr, flush=True)
    figures: Figures = json.loads(text)
    return figures


def measured(above: Path | None, count: int, options: argparse.Namespace, steps: list[str]) -> Figures:
    """The figures of some steps on one cache, which is removed again."""
    cache, figures = Path(tempfile.mkdtemp(prefix="featx-scale-", dir=above)), Figures()
    try:
        for step in steps:
            if count <= {"memo": options.memo_rows, "files": options.file_rows}.get(step, count):
                figures |= run(step, cache, count, options.shard_rows)
    finally:
        shutil.rmtree(cache)
    return figures


def table(columns: dict[str, Figures]) -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for name in dict.fromkeys(name for figures in columns.values() for name in figures):
        values = [figures.get(name) for figures in columns.values()]
        lines.append(f"| {name} | {' | '.join('' if value is None else shown(value) for value in values)} |")
    return lines


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--shard-rows", type=int, default=5000)
    parser.add_argument("--memo-rows", type=int, default=10**7, help="the most rows for which the memo is measured")
    parser.add_argument("--file-rows", type=int, default=10**6, help="the most rows for which images are listed")
    parser.add_argument(
        "--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="most need write and first"
    )
    parser.add_argument("--names", type=int, nargs="*", default=list(NAMES), help="shards that are names alone")
    parser.add_argument("--folder", type=Path, help="where the temporary folders go")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options.rows[0], options.shard_rows)))
        return

    text = [f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}", ""]
    steps = [step for step in STEPS if step in options.steps and step != "names"]
    text += table({f"{rows:,} rows": measured(options.folder, rows, options, steps) for rows in options.rows})
    if options.names and "names" in options.steps:
        text += ["", *table({f"{n:,} names": measured(options.folder, n, options, ["names"]) for n in options.names})]
    print("\n".join(text))
    if options.markdown:
        options.markdown.write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
