"""What holds for every source, whatever kind it is: one suite over the same images laid out five ways."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from featx.errors import ImageError, SourceError
from featx.sources.opening import open_source
from featx.sources.source import MAX_BYTES, Source, read_image
from featx.text import printable

# bytes, label, split of each image; listing reads no image, so that any bytes will do
IMAGES = [(b"first", "ant", "train"), (b"second!", "ant", "val"), (b"third", "bee", "train"), (b"fourth", "bee", "val")]


def class_folders(root: Path) -> Path:
    for i, (data, label, _) in enumerate(IMAGES):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{i}.jpg").write_bytes(data)
    return root


def split_folders(root: Path) -> Path:
    for i, (data, label, split) in enumerate(IMAGES):
        (root / split / label).mkdir(parents=True, exist_ok=True)
        (root / split / label / f"{i}.jpg").write_bytes(data)
    return root


def flat(root: Path) -> Path:
    root.mkdir(parents=True)
    for i, (data, _, _) in enumerate(IMAGES):
        (root / f"{i}.jpg").write_bytes(data)
    return root


def rows(root: Path) -> list[dict[str, str]]:
    flat(root / "images")
    return [{"path": f"images/{i}.jpg", "label": x, "split": s} for i, (_, x, s) in enumerate(IMAGES)]


def csv_manifest(root: Path) -> Path:
    table = rows(root)
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(table)
    return root / "list.csv"


def jsonl_manifest(root: Path) -> Path:
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(root)))
    return root / "list.jsonl"


def parquet_manifest(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pip install featx[parquet]")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows(root)), root / "list.parquet")
    return root / "list.parquet"


KINDS: list[Callable[[Path], Path]] = [
    class_folders,
    split_folders,
    flat,
    csv_manifest,
    jsonl_manifest,
    parquet_manifest,
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param.__name__, request.param(tmp_path / "data")


def by_bytes(source: Source, column: list[str]) -> dict[bytes, str]:
    return {source.read(i): column[i] for i in range(len(source))}


def test_every_image_is_listed_once_and_reads_as_its_bytes(made: tuple[str, Path]) -> None:
    source = open_source(made[1])
    assert len(source) == len(source.ids) == len(set(source.ids)) == len(IMAGES)
    assert sorted(source.read(i) for i in range(len(source))) == sorted(data for data, _, _ in IMAGES)
    assert [source.path(i).read_bytes() for i in range(4)] == [source.read(i) for i in range(4)]
    assert source.uri == str(made[1])
    assert source.ignored == [] and source.notes == [] and not source.multilabel


def test_labels_and_splits_are_the_ones_laid_out(made: tuple[str, Path]) -> None:
    kind, path = made
    source = open_source(path)
    if kind == "flat":
        assert source.labels is None
    else:
        assert source.labels is not None
        assert by_bytes(source, source.labels) == {data: label for data, label, _ in IMAGES}
    if kind in ("flat", "class_folders"):
        assert source.splits is None
    else:
        assert source.splits is not None
        assert by_bytes(source, source.splits) == {data: split for data, _, split in IMAGES}


def test_stats_are_those_of_the_files(made: tuple[str, Path]) -> None:
    source = open_source(made[1])
    assert source.stats is not None and source.stats.dtype == np.int64
    for i, row in enumerate(source.stats.tolist()):
        found = os.stat(source.path(i))
        assert row == [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def test_listing_twice_gives_the_same_order(made: tuple[str, Path]) -> None:
    assert open_source(made[1]).ids == open_source(str(made[1])).ids


def test_a_file_that_vanishes_after_listing_is_one_image_error(made: tuple[str, Path]) -> None:
    source = open_source(made[1])
    source.path(2).unlink()
    with pytest.raises(ImageError, match=r"^the file is not there$"):
        source.read(2)
    assert len(source.read(3)) > 0


def test_a_file_that_became_a_folder_or_a_pipe_is_an_image_error_at_once(made: tuple[str, Path]) -> None:
    source = open_source(made[1])
    source.path(0).unlink()
    source.path(0).mkdir()
    with pytest.raises(ImageError, match=r"^a folder, not a file$"):
        source.read(0)
    source.path(1).unlink()
    os.mkfifo(source.path(1))
    with pytest.raises(ImageError, match=r"^a pipe, socket or device, not a file$"):
        source.read(1)


def test_a_file_too_large_for_an_image_is_not_read_into_memory(made: tuple[str, Path]) -> None:
    source = open_source(made[1])
    with open(source.path(0), "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ImageError, match=r"2,147,483,649 bytes are more than"):
        source.read(0)


def test_relative_uris_work_from_the_current_folder(made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made[1].parent)
    source = open_source(made[1].name)
    assert len(source) == 4 and source.read(0) == source.path(0).read_bytes()
    assert open_source(made[1]).ids == source.ids


def test_what_is_not_there_is_an_error_that_names_what_is(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SourceError, match=r"there is no .*/photo\. Did you mean photos\?"):
        open_source(tmp_path / "photo")
    with pytest.raises(SourceError, match="Nor is there a folder"):
        open_source(tmp_path / "nowhere" / "photos")
    with pytest.raises(SourceError, match="there is no data set with an empty name"):
        open_source("")
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(SourceError, match="gone is a link to nothing"):
        open_source(tmp_path / "gone")
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source("a\0b")


@pytest.mark.parametrize("name", ["one.jpg", "list.txt", "list.json", "list"])
def test_a_file_that_is_not_a_manifest_is_refused_with_the_kinds_there_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"neither a folder .* \(\.csv, \.jsonl, \.parquet\); for one image"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name, é, 日本.jpg", "plain name, é, 日本.jpg"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg"),
        ("two\nlines\x1b[31m.jpg", "two\\x0alines\\x1b[31m.jpg"),
        ("narrow\u202fspace.png", "narrow\u202fspace.png"),
    ],
)
def test_printable_names_can_be_written_as_utf8_and_keep_what_is_readable(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert shown.encode().decode() == shown


def test_listing_imports_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; import featx.sources.folder, featx.sources.manifest; "
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'torch', 'torchvision', 'h5py', 'sklearn', 'pandas', 'pyarrow', 'PIL', 'onnxruntime'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_large_file_is_in_memory_once(tmp_path: Path) -> None:
    data = b"\xff\xd8\xff" + bytes(17 << 20)
    (tmp_path / "a.jpg").write_bytes(data)
    tracemalloc.start()
    try:
        assert read_image(tmp_path / "a.jpg") == data
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(data)
    finally:
        tracemalloc.stop()
