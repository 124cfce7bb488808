"""Ten million rows in thousands of shards, written by hundreds of processes: open files, memory, what is read again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS
from sharing import environment
from storekit import NAME, SPEC, fill, flip, many_shards, shard_files, table

from featx.cache import caching, shards
from featx.cache.light import LightStore
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.cache.writing import Writer
from featx.errors import DamageError, StoreError


def in_process(script: str, *arguments: object) -> Any:
    """What a script prints as JSON, in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FEW_FILES = """
import json, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
from sharing import environment
from storekit import SPEC
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.features import hash_fraction
from featx.learning import learn
from featx.solvers.examples import Examples
store = FeatureStore(Path(sys.argv[1]), SPEC)
keys = store.stored()
train = np.flatnonzero(hash_fraction(keys) >= 0.2)
rows = StoredRows(store, keys).take(train)
found = np.concatenate([rows[start : start + 500] for start in range(0, len(train), 500)])
same = bool(np.array_equal(found, np.load(sys.argv[2])[train]))
fitted = learn("ncm", Examples(rows, (found[:, 0] > 0).astype(int)), ["a", "b"])
held = learn("ncm", Examples(found, (found[:, 0] > 0).astype(int)), ["a", "b"])
print(json.dumps([same, len(train), float(np.abs(fitted.head.weight - held.head.weight).max())]))
"""


def test_two_thousand_shards_are_read_and_learnt_from_with_256_open_files(tmp_path: Path) -> None:
    _, rows = many_shards(tmp_path, 2000, 5)
    np.save(tmp_path / "rows.npy", rows)
    same, count, difference = in_process(FEW_FILES, tmp_path, tmp_path / "rows.npy")
    assert same and 7800 < count < 8200 and difference < 1e-4


def bytes_read() -> int:
    """What this process has read from files, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("kind", [FeatureStore, LightStore])
def test_a_listing_reads_only_what_is_new_and_all_again_where_a_shard_has_gone(
    tmp_path: Path, kind: type[Writer]
) -> None:
    keys, _ = many_shards(tmp_path, 6, 20_000)
    store = kind(tmp_path, SPEC)
    (more, rows), before = table(200, 2, seed=7), bytes_read()
    fill(tmp_path, more, rows)
    own = bytes_read() - before  # another writer's, which lists too
    store.refresh()
    assert store.contains(np.concatenate([keys, more])).all()
    assert bytes_read() - before - own < 300_000 < 6 * 20_000 * 32
    before = bytes_read()
    store.refresh()
    assert bytes_read() - before < 100_000
    shard_files(tmp_path)[2].unlink()
    store.refresh()
    assert bytes_read() - before > 5 * 20_000 * 32
    there = np.concatenate([np.arange(len(keys)) // 20_000 != 2, np.ones(200, bool)])
    assert np.array_equal(store.confirm(np.concatenate([keys, more])), there)


def test_what_is_listed_later_keeps_places_though_its_name_sorts_first(tmp_path: Path) -> None:
    keys, rows = table(100)
    early = fill(tmp_path, keys[:50], rows[:50])
    (first,) = shard_files(tmp_path)
    store = FeatureStore(tmp_path, SPEC)
    with FeatureStore(tmp_path, SPEC, engine="tiny") as other:
        other.append(keys[50:], rows[50:])
    second = shard_files(tmp_path)[1]
    second.rename(second.with_name("0" * 16 + second.name[16:]))  # of a machine whose clock is behind
    store.refresh()
    assert np.array_equal(store.stored(), keys) and np.array_equal(store.read(keys), rows)
    assert np.array_equal(FeatureStore(tmp_path, SPEC).stored(), np.concatenate([keys[50:], keys[:50]]))
    assert not early.empty and next(iter(store.listing())) == first.name


def test_rows_by_slices_keep_places_which_a_compact_changes(tmp_path: Path) -> None:
    keys, rows = table(300)
    fill(tmp_path, keys, rows, shard_bytes=2000)
    order = np.random.default_rng(0).permutation(300)
    stored = StoredRows(FeatureStore(tmp_path, SPEC), keys[order])
    few = stored.take(np.arange(0, 300, 7))
    assert np.array_equal(stored.places, order) and np.array_equal(few.places, order[::7])
    caching.compact(tmp_path, NAME, keys[::-1])
    assert np.array_equal(few[0:50], rows[order[::7]]) and np.array_equal(stored[10:300], rows[order[10:]])
    assert np.array_equal(stored.places, 299 - order) and np.array_equal(few.places, 299 - order[::7])
    stored = StoredRows(FeatureStore(tmp_path, SPEC), keys[order])
    caching.compact(tmp_path, NAME, keys[:20], only=True)
    with pytest.raises(StoreError, match="280 of 300 features are not in"):
        stored[0:9]


WORKER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from conftest import COLOURS, ColourEngine
from featx.extraction.chunks import extract_chunk

class Narrow(ColourEngine):
    name = "tiny"
    def __call__(self, images):
        return super().__call__(images)[:, :1]

_, cache, images = map(Path, sys.argv)
info = replace(COLOURS, row_shape=(1,))
done = extract_chunk(images, 0, 1, info, engine=Narrow(), cache=cache)
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([peak, done.report.extracted]))
"""


def test_a_worker_takes_hardly_more_memory_where_ten_million_rows_are_stored(tiny: Path, tmp_path: Path) -> None:
    spec, peaks = replace(COLOURS, row_shape=(1,)).spec(), []
    for count in (2, 2000):
        many_shards(tmp_path / str(count), count, 5000, width=1, answer=False, spec=spec)
        peak, extracted = in_process(WORKER, tmp_path / str(count), tiny)
        assert extracted == 12
        peaks.append(peak)
    assert 30 < peaks[1] - peaks[0] < 50  # MB: 4 bytes a key


def test_a_light_store_says_no_wrongly_never_and_yes_as_long_as_nobody_asks_for_certainty(tmp_path: Path) -> None:
    keys, rows = table(400)
    alike = keys.copy()
    alike[:, 4:] ^= 1  # other images, whose keys begin alike
    fill(tmp_path, keys[:300], rows[:300], shard_bytes=2000)
    light = LightStore(tmp_path, SPEC, engine="tiny")
    assert light.contains(keys).tolist() == [True] * 300 + [False] * 100 == light.contains(alike).tolist()
    asked = np.concatenate([alike[:5], alike[:5], keys[:7], keys[298:302]])
    assert light.confirm(asked).tolist() == [False] * 10 + [True] * 7 + [True, True, False, False]
    assert light.contains(alike).tolist() == [False] * 5 + [True] * 295 + [False] * 100
    assert light.contains(keys[:300]).all() and not light.confirm(alike).any() and not light.contains(alike).any()

    with light:  # its own rows are exact, and stored once
        light.append(keys[300:350], rows[300:350])
        light.append(keys[340:360], rows[340:360])
        light.commit()
        light.append(keys[300:310], rows[300:310])
        light.append(alike[:10], rows[:10])
    assert light.contains(keys).tolist() == [True] * 360 + [False] * 40
    assert light.contains(alike).tolist() == [True] * 10 + [False] * 390 == light.confirm(alike).tolist()
    with FeatureStore(tmp_path, SPEC) as other:
        assert len(other.stored()) == 370 and np.array_equal(other.read(keys[:360]), rows[:360])
        assert np.array_equal(other.confirm(alike), other.contains(alike))
        other.append(alike[10:20], rows[10:20])
    assert not light.contains(alike[10:20]).any()
    light.refresh()
    assert light.contains(alike[:20]).all() and light.confirm(alike[:20]).all() and not light.contains(alike[20:]).any()


def test_a_light_store_hashes_nothing_sets_nothing_aside_and_leaves_out_what_it_cannot_parse(tmp_path: Path) -> None:
    assert LightStore(tmp_path, SPEC).empty
    keys, rows = table(120)
    fill(tmp_path, keys, rows, shard_bytes=64 * 8 * 4)
    assert FeatureStore(tmp_path, SPEC).empty is LightStore(tmp_path, SPEC).empty is False
    first, second = shard_files(tmp_path)
    (first.parent / "verified.json").unlink(missing_ok=True)
    flip(first, 0)  # the header
    with shards.open_regular(second) as file:
        flip(second, shards.inspect(file, second.name, None).shard.rows_at + 9)
    before = sorted(first.parent.iterdir())
    light = LightStore(tmp_path, SPEC)
    assert light.contains(keys).tolist() == [False] * 64 + [True] * 56
    assert len(light.notes) == 1 and first.name in light.notes[0] and "left out" in light.notes[0]
    assert sorted(first.parent.iterdir()) == before
    store = FeatureStore(tmp_path, SPEC)
    assert len(store.notes) == 2 and sorted(path.name for path in (first.parent / "damaged").iterdir()) == [
        first.name,
        second.name,
    ]


def test_a_light_store_goes_on_while_another_process_compacts_or_removes(tmp_path: Path) -> None:
    keys, rows = table(100)
    light = LightStore(tmp_path, SPEC, engine="tiny")
    with light:
        light.append(keys[:50], rows[:50])
    fill(tmp_path, keys[50:80], rows[50:80])
    light.refresh()
    caching.compact(tmp_path, NAME)
    assert light.confirm(keys).tolist() == [True] * 80 + [False] * 20
    caching.remove(tmp_path, NAME)
    light.refresh()
    assert light.empty and not light.contains(keys).any()
    with light:
        light.append(keys, rows)
    assert np.array_equal(FeatureStore(tmp_path, SPEC).read(keys), rows)


def test_what_is_verified_is_remembered_however_much_it_is(tmp_path: Path) -> None:
    many_shards(tmp_path, 3, 5)
    path = tmp_path / "features" / NAME / "verified.json"
    known = shards.read_verified(path.parent)
    path.write_bytes(path.read_bytes().replace(b"{", b"{" + b" " * (1 << 26), 1))
    assert shards.read_verified(path.parent) == known and len(known) == 3
    form = path.with_name("spec.json")
    form.write_bytes(form.read_bytes() + b" " * (1 << 24))
    with pytest.raises(DamageError, match=r"has 16,777,\d+ bytes, and a record of its kind at most 16,777,216"):
        shards.read_form(form)
