"""`--chunk K/N`: parts that agree without talking, whatever is cached, and that no other listing gets into."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import COLOURS, ColourEngine, write_images
from hypothesis import given
from hypothesis import strategies as st
from sharing import environment

from featx.cache import caching
from featx.cache.light import LightStore
from featx.cache.memo import KeyMemo
from featx.cli import main
from featx.errors import FeatxError, SourceError, StoreError
from featx.extraction.chunks import CHUNKS_A_WORKER, bounds, cut, extract_chunk, parse_chunk, prepare_chunks, work
from featx.extraction.job import prepare
from featx.extraction.keys import KeyTable
from featx.extraction.pipeline import extract, sync
from featx.extraction.report import Chunk
from featx.options import complete
from featx.records import write_record
from featx.sources.opening import open_source
from featx.sources.own import is_own
from featx.sources.source import Source


@given(st.integers(0, 500), st.integers(1, 40), st.lists(st.integers(1, 499), max_size=9))
def test_chunks_cover_every_image_once_and_end_where_containers_do(images: int, chunks: int, inner: list[int]) -> None:
    starts = np.array(sorted({start for start in inner if start < images}), np.int64)
    for edges in (None, starts):
        found = [bounds(images, k, chunks, edges) for k in range(chunks)]
        assert found[0][0] == 0 and found[-1][1] == images
        assert all(a[1] == b[0] for a, b in pairwise(found))
        if edges is not None:
            assert {end for pair in found for end in pair} <= {0, *edges.tolist(), images}


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(1, 5000))
def test_a_driver_cuts_chunks_of_enough_bytes_or_enough_chunks(images: int, workers: int, least: int) -> None:
    numbers = np.arange(images) * 3
    parts = cut(numbers, 8, workers, least=least)
    np.testing.assert_array_equal(np.concatenate(parts), numbers)
    sizes = [len(part) * 8 for part in parts[:-1]]
    assert all(size >= least for size in sizes) or len(parts) >= min(images, CHUNKS_A_WORKER * workers) / 2
    starts = np.arange(0, 3 * images, 60)  # containers of 20 images each
    for part in cut(numbers, 8, workers, starts, least)[:-1]:
        assert part[-1] % 60 == 57


def test_four_chunks_at_once_on_a_grown_data_set_compute_what_is_new_and_forget_nothing(tmp_path: Path) -> None:
    images, cache = write_images(tmp_path / "images", per_class=40), tmp_path / "cache"
    sync(images, COLOURS, engine=ColourEngine(), cache=cache)
    write_images(images, per_class=60, seed=1)  # 40 of each class are other images now, and 20 are new
    script = (
        "import sys; from conftest import COLOURS, ColourEngine; from featx.extraction.chunks import extract_chunk\n"
        "engine = ColourEngine()\n"
        "done = extract_chunk(sys.argv[1], int(sys.argv[3]), 4, COLOURS, engine=engine, cache=sys.argv[2])\n"
        "print(done.report.extracted, engine.images)"
    )
    time.sleep(2.1)  # keys of files that changed this shortly before are not remembered
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(images), str(cache), str(k)],
            stdout=subprocess.PIPE, text=True, env=environment(),
        )
        for k in range(4)
    ]  # fmt: skip
    counts = [process.communicate(timeout=120)[0].split() for process in running]
    assert counts == [["30", "30"]] * 4

    source = open_source(images)
    assert source.stats is not None
    _, known = KeyMemo(cache, source.root).lookup(source.ids, source.stats)
    engine = ColourEngine()
    features = extract(images, COLOURS, engine=engine, cache=cache)
    assert known.all() and engine.images == 0 and len(features) == 120
    alone = extract(images, COLOURS, engine=engine, cache=tmp_path / "other")
    np.testing.assert_array_equal(features.X, alone.X)


def test_a_chunk_that_was_cut_off_computes_only_the_rest(tmp_path: Path) -> None:
    images, cache = write_images(tmp_path / "images", per_class=10), tmp_path / "cache"
    broken = ColourEngine()
    broken.interrupt_at = 8  # while the second of two batches before it is on its way
    with pytest.raises(KeyboardInterrupt):
        extract_chunk(images, 0, 1, COLOURS, engine=broken, cache=cache)
    engine = ColourEngine()
    done = extract_chunk(images, 0, 1, COLOURS, engine=engine, cache=cache)
    assert engine.images == done.report.extracted == 16 and done.report.cached == 4
    again = extract_chunk(images, 0, 1, COLOURS, engine=engine, cache=cache)
    assert engine.images == 16 and (again.report.cached, again.report.extracted) == (20, 0)


def test_an_empty_chunk_and_one_of_broken_images_are_results(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(b"no image")
    where = {"engine": ColourEngine(), "cache": tmp_path / "cache"}
    empty = extract_chunk(folder, 0, 7, COLOURS, **where)
    assert (empty.start, empty.stop, empty.report.found, empty.exit_code) == (0, 0, 0, 0)
    assert empty.text().startswith("chunk 0/7: no image of 3\nfound 0 ")
    broken = extract_chunk(folder, 1, 2, COLOURS, **where)
    assert (broken.start, broken.stop, broken.report.skipped, broken.exit_code) == (1, 3, 2, 3)
    with pytest.raises(SourceError, match="none of the 3 images"):
        sync(folder, COLOURS, **where)


def test_images_that_change_while_a_chunk_is_read_are_computed_as_they_are(tmp_path: Path) -> None:
    images, cache = write_images(tmp_path / "images", per_class=5), tmp_path / "cache"
    source = open_source(images)
    (images / "cold" / "001.png").unlink()
    (images / "cold" / "002.png").write_bytes((images / "warm" / "003.png").read_bytes())
    done = extract_chunk(source, 0, 1, COLOURS, engine=ColourEngine(), cache=cache)
    assert [image["id"] for image in done.report.skipped_images] == ["cold/001.png"]
    features = extract(images, COLOURS, engine=ColourEngine(), cache=cache)
    row = dict(zip(features.ids, features.X, strict=True))
    np.testing.assert_array_equal(row["cold/002.png"], row["warm/003.png"])


def test_a_listing_that_was_not_prepared_is_refused_and_says_which_was(tmp_path: Path) -> None:
    first, second = (write_images(tmp_path / name, per_class=count) for name, count in (("a", 3), ("b", 4)))
    where = {"engine": ColourEngine(), "cache": tmp_path / "cache"}
    extract_chunk(second, 0, 2, COLOURS, **where)  # nothing was prepared: nothing to compare with
    prepared = prepare_chunks(first, COLOURS, **where)
    assert (prepared.images, prepared.engine) == (6, "colour")
    assert extract_chunk(first, 1, 2, COLOURS, **where).report.extracted == 3
    with pytest.raises(SourceError, match=r"b \(8 images\) was not prepared, but .*a \(6 images\) was"):
        extract_chunk(second, 1, 2, COLOURS, **where)
    prepare_chunks(second, COLOURS, **where)
    extract_chunk(second, 1, 2, COLOURS, **where)

    write_images(first, per_class=5)
    with pytest.raises(SourceError, match=r"others than at --prepare \(6 then, 10 now\)"):
        extract_chunk(first, 0, 2, COLOURS, **where)
    copied = replace(open_source(second), uri=str(tmp_path / "mounted-elsewhere"))
    extract_chunk(copied, 0, 2, COLOURS, **where)  # the same listing in another place


def test_rows_of_another_processor_than_at_prepare_are_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", per_class=2)
    where = {"engine": ColourEngine(), "cache": tmp_path / "cache"}
    prepared = prepare_chunks(images, COLOURS, **where)
    assert not extract_chunk(images, 0, 2, COLOURS, **where).report.notes
    (plan,) = (tmp_path / "cache" / "plans").rglob("*.json")
    write_record(plan, prepared.to_dict() | {"kind": "another processor"})
    (note,) = extract_chunk(images, 1, 2, COLOURS, **where).report.notes
    assert note.endswith("--prepare ran on another processor: rows may differ in their last bits")
    plan.write_text("{")
    with pytest.raises(FeatxError, match=r"cannot be read.*run --prepare again"):
        extract_chunk(images, 1, 2, COLOURS, **where)
    assert is_own(str(plan.parent), [], [], [plan.name])
    caching.remove(tmp_path / "cache", "plans")
    extract_chunk(images, 1, 2, COLOURS, **where)


@pytest.mark.parametrize("text", ["17", "9" * 5000 + "/4", "a/b", "1/2/3", "-1/4", "1.5/4", "", "٣/4"])
def test_a_chunk_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FeatxError, match="such as 17/200"):
        parse_chunk(text)


def test_chunk_numbers_count_from_0(tiny: Path, tmp_path: Path, everywhere: ColourEngine) -> None:
    def featx(*words: str) -> Any:
        return CliRunner().invoke(main, ["extract", str(tiny), "--cache", str(tmp_path / "cache"), *words])

    last = featx("--chunk", "4/4")
    assert last.exit_code == 2 and "there is no chunk 4/4: N chunks are numbered from 0/N to N-1/N" in last.stderr
    for value in ((4, 4), (-1, 4), (0, 0), (True, 4)):
        with pytest.raises(FeatxError, match="numbered from 0/N"):
            extract_chunk(tiny, *value, COLOURS, engine=everywhere, cache=tmp_path / "cache")
    assert featx("--chunk", "1/4", "--prepare").exit_code == 2
    assert "leave out --on" in featx("--chunk", "1/4", "--on", "ray").stderr

    assert "12 images are listed" in featx("--prepare").stderr
    done = featx("--chunk", "1/4", "--json")
    found = json.loads(done.stdout)
    assert found["chunk"] == {"number": 1, "chunks": 4, "start": 3, "stop": 6, "images": 12}
    assert (done.exit_code, found["found"], found["extracted"]) == (0, 3, 3)


class Lying(LightStore):
    """Says of a third of all keys that they are stored, as a light store does of a few, until `confirm` is asked."""

    def contains(self, keys: np.ndarray) -> np.ndarray:
        return super().contains(keys) | ((keys[:, 0] % 3 == 0) & (self._absent.locate(keys) < 0))


def test_images_that_only_looked_stored_are_computed_in_a_second_round_and_counted_once(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", per_class=15)
    job = prepare(images, COLOURS, complete({"cache": tmp_path / "cache", "views": 1}), ColourEngine())
    stores = [LightStore(job.cache, job.specs[0]), Lying(job.cache, job.specs[1])]
    table, chunk, engine = KeyTable(job.source, job.cache), Chunk(), ColourEngine()
    assert work(job, table, stores, chunk, engine).all()
    assert engine.images == 60 and chunk.extracted == 30
    found = sync(images, COLOURS, engine=engine, cache=tmp_path / "cache", views=1)
    assert engine.images == 60 and found.report.cached == 30


def test_rows_that_vanish_are_an_error_that_says_what_to_do(tiny: Path, tmp_path: Path) -> None:
    table = KeyTable(open_source(tiny), tmp_path / "cache")
    table.note(3, b"k" * 32)
    table.note(4, b"", "the file is not there")
    stored = np.ones(12, bool)
    stored[4] = False
    assert table.reasons(stored) == {4: "the file is not there"}
    stored[3] = False
    with pytest.raises(StoreError, match=r"1 rows were stored, and are gone or damaged by now; run the same command"):
        table.reasons(stored)


@dataclass(frozen=True, eq=False)
class Columned(Source):
    """A source with a column of its own, which forgets to take it along."""

    weights: tuple[float, ...] = ()


def test_a_source_that_would_lose_a_column_of_its_own_is_refused(tiny: Path, tmp_path: Path) -> None:
    listed = vars(open_source(tiny))
    where = {"engine": ColourEngine(), "cache": tmp_path / "cache"}
    with pytest.raises(SourceError, match="Columned has a column of its own, weights"):
        extract_chunk(Columned(**listed, weights=(1.0,) * 12), 0, 2, COLOURS, **where)
    assert extract_chunk(Columned(**listed), 0, 2, COLOURS, **where).report.extracted == 6
