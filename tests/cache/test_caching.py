"""The cache commands: what they report is what lies there, and they lose nothing they were not told to."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from storekit import SPEC, fill, flip, table

from featx.cache import caching, shards, writing
from featx.cache.shards import Form
from featx.cache.store import FeatureStore
from featx.errors import NewerError, StoreError
from featx.features import Features, FeatureSpec
from featx.files import stat_row
from featx.identity import ADDED

NAME = SPEC.folder_name


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    keys, rows = table(300)
    fill(tmp_path / "cache", keys, rows, shard_bytes=3000)
    return tmp_path / "cache", keys, rows


def names(cache: Path) -> list[str]:
    return list(shards.list_shards(cache / "features" / NAME))


def test_list_and_info_say_what_is_there(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, _ = filled
    (entry,) = caching.entries(cache)
    assert (entry.name, entry.form) == (NAME, Form(SPEC, "tiny", (8,)))
    assert entry.shards == len(names(cache)) == 4 and entry.damaged == 0
    assert entry.bytes == sum(p.stat().st_size for p in entry.path.iterdir()) == caching.sizes(cache)["features"]
    about = caching.info(cache, "resnet18", against=np.concatenate([keys[:100], keys[:50], table(7, seed=9)[0]]))
    assert (about.rows, about.distinct, about.notes) == (300, 300, [])
    assert (about.used, about.unused, about.missing) == (100, 200, 7)
    assert about.files == names(cache)


def test_an_unknown_entry_is_named_with_what_there_is(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(StoreError, match=f"no entry 'resnet81'.*{NAME}"):
        caching.info(filled[0], "resnet81")
    with pytest.raises(StoreError, match="there is no cache at"):
        caching.entries(filled[0] / "nowhere")


def test_verify_reads_every_byte_where_opening_trusts_what_was_verified(
    filled: tuple[Path, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, keys, rows = filled
    assert [v.notes for v in caching.verify(cache)] == [[]]
    shard = cache / "features" / NAME / names(cache)[1]
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10 * 10**9)
    FeatureStore(cache, SPEC)  # an old enough shard is verified, and trusted from then on
    verified = shards.read_verified(shard.parent)
    with shard.open("rb", buffering=0) as file:
        inside = shards.inspect(file, shard.name, None)
    flip(shard, inside.shard.rows_at + 100)
    # bit rot changes no stat: what is remembered takes the stat that this change made
    verified[shard.name] = replace(verified[shard.name], stat=stat_row(os.stat(shard)))
    shards.write_verified(shard.parent, verified)
    assert not np.array_equal(FeatureStore(cache, SPEC).read(keys), rows)
    (report,) = caching.verify(cache, NAME)
    assert len(report.notes) == 1 and shard.name in report.notes[0]
    store = FeatureStore(cache, SPEC)
    there = store.contains(keys)
    assert 200 <= there.sum() < 300 and np.array_equal(store.read(keys[there]), rows[there])
    assert (shard.parent / "damaged" / shard.name).exists()
    assert caching.entries(cache)[0].damaged == 1


@dataclass(frozen=True)
class NewerSpec(FeatureSpec):
    tokens: int = field(default=0, metadata=ADDED)


def test_what_a_newer_featx_wrote_is_neither_damaged_nor_read(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    newer = Form(NewerSpec(SPEC.backbone, SPEC.weights, tokens=3), "tiny", (8,))
    folder = cache / "features" / newer.spec.folder_name
    shards.create(folder, newer)
    shard = writing.write(folder, newer, keys, [rows])
    for form_is_there in (True, False):  # the shard alone says the same
        found = {entry.name: entry.form for entry in caching.entries(cache)}
        assert found == {NAME: Form(SPEC, "tiny", (8,)), folder.name: None}
        with pytest.raises(NewerError, match=r"does not know \(tokens\): it was written by a newer one; update featx"):
            caching.info(cache, folder.name)
        notes = {found.name: found.notes for found in caching.verify(cache)}
        assert notes[NAME] == [] and "written by a newer one" in notes[folder.name][0]
        if form_is_there:
            (folder / "spec.json").unlink()
    assert [path.name for path in folder.iterdir()] == [shard.name]


def test_compact_gives_one_memory_mapped_run(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    done = caching.compact(cache, NAME)
    assert done.done and (done.shards_before, done.shards_after, done.rows_after) == (4, 1, 300)
    store = FeatureStore(cache, SPEC)
    X = store.read(keys)
    assert isinstance(X, np.memmap) and np.array_equal(X, rows) and len(names(cache)) == 1
    assert not caching.compact(cache, NAME).done


def test_compact_in_the_order_of_a_data_set_keeps_the_other_rows(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    order = np.random.default_rng(3).permutation(300)[:120]
    asked = np.concatenate([keys[order], keys[order[:5]], table(4, seed=9)[0]])
    assert caching.compact(cache, NAME, asked).rows_after == 300
    store = FeatureStore(cache, SPEC)
    assert isinstance(store.read(keys[order]), np.memmap)
    assert np.array_equal(store.read(keys[order]), rows[order]) and np.array_equal(store.read(keys), rows)


def test_compact_drops_unused_rows_only_when_told(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    done = caching.compact(cache, NAME, keys[40:60], only=True)
    assert done.rows_after == 20
    store = FeatureStore(cache, SPEC)
    assert len(store) == 20 and np.array_equal(store.read(keys[40:60]), rows[40:60])


def test_compact_stores_rows_of_two_writers_once(tmp_path: Path) -> None:
    keys, rows = table(100)
    one, two = (FeatureStore(tmp_path, SPEC, engine="tiny") for _ in range(2))
    one.append(keys, rows)
    two.append(keys[::-1], rows[::-1])
    one.commit()
    two.commit()
    store = FeatureStore(tmp_path, SPEC)
    assert (len(store.stored()), len(store)) == (200, 100) and np.array_equal(store.read(keys), rows)
    assert caching.compact(tmp_path, NAME).rows_after == 100
    assert np.array_equal(FeatureStore(tmp_path, SPEC).read(keys), rows)


def test_readers_and_writers_go_on_while_another_process_compacts(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    reader, writer = FeatureStore(cache, SPEC), FeatureStore(cache, SPEC, engine="tiny")
    caching.compact(cache, NAME)
    assert np.array_equal(reader.read(keys), rows)
    more, more_rows = table(10, seed=5)
    with writer:
        writer.append(more, more_rows)
    assert np.array_equal(reader.read(more), more_rows)


def test_remove_takes_the_entry_named_and_no_other(filled: tuple[Path, np.ndarray, np.ndarray]) -> None:
    cache, keys, rows = filled
    other = type(SPEC)("torchvision/alexnet", "cd" * 32)
    with FeatureStore(cache, other, engine="tiny") as store:
        store.append(keys, rows)
    assert caching.remove(cache, "resnet18").name == NAME
    assert [e.form for e in caching.entries(cache)] == [Form(other, "tiny", (8,))]
    assert sorted(p.name for p in (cache / "features").iterdir()) == [other.folder_name]


def test_remove_takes_what_runs_make_again_and_nothing_else_beside_the_features(
    filled: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    cache, keys, rows = filled
    (cache / "engines").mkdir()
    (cache / "engines" / f"{'1' * 64}.onnx").write_bytes(b"graph")
    (cache / "mine").mkdir()
    assert caching.removable(cache, "engines") == (cache / "engines", 5)
    assert caching.remove(cache, "engines") == cache / "engines"
    for name in ("engines", "mine", "features", "../elsewhere"):
        with pytest.raises(StoreError, match="there is no entry"):
            caching.remove(cache, name)
    assert sorted(p.name for p in cache.iterdir()) == ["features", "mine"]
    np.testing.assert_array_equal(FeatureStore(cache, SPEC).read(keys), rows)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "*", "/", "engines/..", "features", f"./{NAME}", f"{NAME}/", "r*"]
)
def test_remove_refuses_whatever_is_no_name(filled: tuple[Path, np.ndarray, np.ndarray], name: str) -> None:
    cache, keys, rows = filled
    (cache / "engines").mkdir()
    before = sorted(cache.rglob("*"))
    for given in (name, f"{cache}/features/{NAME}", str(cache)):
        with pytest.raises(StoreError, match=r"there is no entry .*; there are resnet18-"):
            caching.remove(cache, given)
    for read in (caching.info, caching.compact, caching.verify):
        with pytest.raises(StoreError, match="there is no entry"):
            read(cache, name)
    assert sorted(cache.rglob("*")) == before
    np.testing.assert_array_equal(FeatureStore(cache, SPEC).read(keys), rows)


def test_remove_leaves_folders_of_others_and_what_lies_behind_links(
    filled: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """A cache may lie in somebody's project, which has an `engines` or a `features` folder of its own."""
    cache, _, _ = filled
    (cache / "engines").mkdir()
    (cache / "engines" / "diesel.py").write_text("mine")
    (cache / "features" / "login").mkdir()
    (cache / "features" / "login" / "a.py").write_text("mine")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / ("0" * 32)).write_text("memo")
    (cache / "memo").symlink_to(tmp_path / "disk")
    linked = type(SPEC)("torchvision/alexnet", "cd" * 32).folder_name
    (cache / "features" / linked).symlink_to(cache / "features" / NAME)
    (cache / "features" / NAME / "notes.txt").write_text("mine")
    before = sorted(cache.rglob("*"))
    assert [entry.name for entry in caching.entries(cache)] == [linked, NAME]
    for name, message in {
        "engines": "engines holds diesel.py, which featx did not write; move it away first",
        NAME: "holds notes.txt, which featx did not write",
        "login": "there is no entry 'login'",
        "memo": "memo is a link",
        linked: "is a link",
    }.items():
        with pytest.raises(StoreError, match=message):
            caching.remove(cache, name)
    assert sorted(cache.rglob("*")) == before and (tmp_path / "disk" / ("0" * 32)).exists()
    (cache / "features" / NAME / "notes.txt").unlink()
    caching.remove(cache, NAME)
    assert sorted(path.name for path in (cache / "features").iterdir()) == [linked, "login"]


def test_export_is_plain_hdf5(tmp_path: Path) -> None:
    keys, rows = table(5)
    features = Features(
        rows=rows,
        y=np.array([0, 1, 1, 0, -1]),
        ids=["a/é.jpg", "a/b.jpg", "a/\udcff.jpg", "c/d.jpg", "e.jpg"],
        class_names=["ants", "bees"],
        splits=np.array(["train", "val", "train", "", ""]),
        keys=keys,
        spec=SPEC,
    )
    for name in ("features.csv", "features.npy", "features"):
        with pytest.raises(StoreError, match=r"would hold HDF5: call it \.h5"):
            caching.export(features, tmp_path / name)
    path = caching.export(features, tmp_path / "new" / "features.h5")
    with h5py.File(path) as file:
        assert np.array_equal(file["features"][()], rows) and file["features"].chunks is None
        assert file["labels"][()].tolist() == [0, 1, 1, 0, -1]
        assert [v.decode("utf-8", "surrogateescape") for v in file["ids"][()]] == features.ids
        assert file["class_names"].asstr()[()].tolist() == ["ants", "bees"]
        assert file["splits"].asstr()[()].tolist() == ["train", "val", "train", "", ""]
        assert np.array_equal(file["keys"][()], keys) and "resnet18" in file.attrs["spec"].decode()
    with pytest.raises(StoreError, match="there already"):
        caching.export(features, path)
    caching.export(features.take(np.array([], int)), path, overwrite=True)
    with h5py.File(path) as file:
        assert file["features"].shape == (0, 8) and file["ids"].shape == (0,)
    mine, other = tmp_path / "thesis.pdf", tmp_path / "other.h5"
    mine.write_bytes(b"years of work")
    with h5py.File(other, "w") as file:
        file["features"] = rows
    (tmp_path / "link.h5").symlink_to(tmp_path / "nowhere")
    for name in ("thesis.pdf", "other.h5", "link.h5", "new"):
        with pytest.raises(StoreError, match=f"{name} is not a file that featx exported"):
            caching.export(features, tmp_path / name, overwrite=True)
    with h5py.File(other) as file:
        assert np.array_equal(file["features"][()], rows)
    assert mine.read_bytes() == b"years of work" and (tmp_path / "link.h5").is_symlink()
