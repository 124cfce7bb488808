"""Damaged and hostile files: named, set aside and recomputed; never served, never followed, never run."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from storekit import NAME, SPEC, extract, fill, flip, fork, make_read_only, table, tiny_engine, wait

from featx.cache import caching, shards, writing
from featx.cache.store import FeatureStore
from featx.errors import DamageError, StoreError
from featx.features import FeatureSpec
from featx.records import write_sealed

KEYS = table(64)[0]
ROWS = tiny_engine(KEYS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: nothing here is about what a crash leaves."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def one_shard(cache: Path, block_rows: int = 4096) -> tuple[Path, shards.Inside]:
    """A shard of `KEYS` and `ROWS`, and what is in it. block_rows: rows per digest."""
    form = shards.Form(SPEC, "tiny", (64,))
    shards.create(cache / "features" / NAME, form)
    shard = writing.write(cache / "features" / NAME, form, KEYS, [ROWS], block_rows * form.row_bytes)
    path = cache / "features" / NAME / shard.name
    with path.open("rb", buffering=0) as file:
        return path, shards.inspect(file, shard.name, form)


def regions(path: Path, inside: shards.Inside) -> dict[str, int]:
    """A byte in each part of a shard."""
    data = path.read_bytes()
    return {
        "superblock": 9,
        "superblock checksum": 45,
        "root header": data.index(b"OHDR") + 5,
        "spec": data.index(b'{"backbone"') + 20,
        "engine": data.index(b'"tiny"') + 1,
        "link name": data.index(b"digests") + 2,
        "first key": inside.shard.keys_at,
        "last key": inside.shard.keys_at + 64 * 32 - 1,
        "padding": inside.shard.rows_at - 1,
        "first row": inside.shard.rows_at,
        "last row": inside.shard.rows_at + 64 * 256 - 1,
        "digests": inside.digests_at + 3,
        "last byte": len(data) - 1,
    }


def test_a_flipped_byte_in_any_region_is_named_set_aside_and_recomputed(tmp_path: Path) -> None:
    kept = {}
    for region in regions(*one_shard(tmp_path / "whole")):
        cache = tmp_path / region
        path, inside = one_shard(cache, block_rows=8)
        flip(path, regions(path, inside)[region])
        store = FeatureStore(cache, SPEC, engine="tiny")
        (note,) = store.notes
        assert path.name in note and "is set aside in damaged/" in note and not path.exists()
        assert hashlib.sha256((path.parent / "damaged" / path.name).read_bytes()).hexdigest() not in path.name
        there = store.contains(KEYS)
        kept[region] = int(there.sum())
        if kept[region]:
            assert f"{kept[region]} intact rows" in note and np.array_equal(store.read(KEYS[there]), ROWS[there])
        assert extract(store, KEYS) == 64 - kept[region]
        again = FeatureStore(cache, SPEC)
        assert np.array_equal(again.read(KEYS), ROWS) and again.notes == []
    # what is not hit is kept, in blocks of 8 rows; where the headers are hit nothing is kept
    assert kept["padding"] == 64 and kept["first row"] == kept["last key"] == kept["digests"] == 56
    assert kept["spec"] == kept["engine"] == kept["superblock"] == 0


def test_every_single_flipped_byte_is_noticed_and_no_wrong_row_is_kept(tmp_path: Path) -> None:
    path, inside = one_shard(tmp_path, block_rows=8)
    folder, data = path.parent, bytearray(path.read_bytes())
    form = shards.read_form(folder / "spec.json")
    expected = {bytes(k): r.tobytes() for k, r in zip(KEYS, ROWS, strict=True)}
    places = [*range(0, inside.shard.keys_at, 3), *range(inside.shard.keys_at, len(data), 97)]
    assert len(places) > 700

    def work() -> None:  # in a child, for headers are parsed by C code
        for at in places:
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            with pytest.raises(DamageError, match="SHA-256"):
                shards.check(folder, path.name, form)
            for keys, rows in shards.intact_rows(folder, path.name, form):
                for key, row in zip(keys, rows, strict=True):
                    assert expected[bytes(key)] == row.tobytes()
            data[at] ^= 1 << at % 8

    assert wait(fork(work)) == 0


def test_every_flipped_header_byte_under_a_true_hash_is_refused_or_harmless(tmp_path: Path) -> None:
    """What someone forges with care: the name is the file's hash, the headers lie."""
    path, inside = one_shard(tmp_path)
    folder, data = path.parent, bytearray(path.read_bytes())
    form = shards.read_form(folder / "spec.json")

    def work() -> None:
        refused = 0
        for at in range(inside.shard.keys_at):
            before, data[at] = data[at], data[at] ^ (1, 0x80, 0xFF)[at % 3]
            name = forged_name(bytes(data))
            (folder / name).write_bytes(data)
            try:
                shard = shards.check(folder, name, form).shard
                assert shard.rows_at + shard.count * form.row_bytes <= len(data)
            except DamageError:
                refused += 1
            os.unlink(folder / name)
            data[at] = before
        assert refused > 500

    assert wait(fork(work)) == 0


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.9999])
def test_a_truncated_shard_is_set_aside_and_recomputed(tmp_path: Path, left: float) -> None:
    path, _ = one_shard(tmp_path)
    os.truncate(path, int(path.stat().st_size * left))
    store = FeatureStore(tmp_path, SPEC, engine="tiny")
    assert len(store.notes) == 1 and path.name in store.notes[0] and not path.exists()
    assert extract(store, KEYS) == 64
    assert np.array_equal(FeatureStore(tmp_path, SPEC).read(KEYS), ROWS)


def test_a_shard_that_grew_or_lost_its_name_is_noticed(tmp_path: Path) -> None:
    path, _ = one_shard(tmp_path)
    with path.open("ab") as file:
        file.write(b"more")
    assert len(FeatureStore(tmp_path, SPEC).notes) == 1
    path, _ = one_shard(tmp_path / "other")
    path.rename(path.with_name("notes.h5"))
    assert len(FeatureStore(tmp_path / "other", SPEC)) == 0


def test_a_shard_of_another_spec_or_engine_is_never_served(tmp_path: Path) -> None:
    path, _ = one_shard(tmp_path / "one")
    other = FeatureSpec("torchvision/resnet18", "cd" * 32)
    for spec, engine in ((other, "tiny"), (SPEC, "another")):
        cache = tmp_path / f"{engine}-{spec.weights[:2]}"
        with FeatureStore(cache, spec, engine=engine) as store:
            store.append(*table(3, width=64, seed=5))
        folder = cache / "features" / spec.folder_name
        shutil.copy(path, folder)
        store = FeatureStore(cache, spec)
        assert len(store) == 3 and not store.contains(KEYS).any()
        assert len(store.notes) == 1 and ("weights" if spec == other else "engine") in store.notes[0]


def test_a_damaged_shard_of_a_read_only_cache_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inside = one_shard(tmp_path)
    fill(tmp_path, *table(5, width=64, seed=7))
    flip(path, inside.shard.rows_at)
    make_read_only(monkeypatch)
    store = FeatureStore(tmp_path, SPEC)
    assert len(store) == 5 and path.exists() and "cannot be set aside" in store.notes[0]
    with pytest.raises(StoreError, match="64 of 64"):
        store.read(KEYS)
    assert len(store.notes) == 1


def test_a_shard_swapped_or_deleted_behind_an_open_store_is_not_served(tmp_path: Path) -> None:
    path, inside = one_shard(tmp_path)
    store = FeatureStore(tmp_path, SPEC)
    flip(path, inside.shard.rows_at)
    with pytest.raises(StoreError, match=r"64 of 64 features|features are not in"):
        store.read(KEYS[::-1])
    path, _ = one_shard(tmp_path / "gone")
    store = FeatureStore(tmp_path / "gone", SPEC)
    path.unlink()
    with pytest.raises(StoreError, match="64 of 64"):
        store.read(KEYS[::-1])


@pytest.mark.parametrize("harm", ["flip", "empty", "missing", "binary", "forged", "deep"])
def test_a_lost_spec_json_is_written_again_from_a_shard(tmp_path: Path, harm: str) -> None:
    path, _ = one_shard(tmp_path)
    spec = path.parent / "spec.json"
    before = spec.read_bytes()
    if harm == "flip":
        flip(spec, before.index(b"tiny"))
    elif harm == "missing":
        spec.unlink()
    elif harm == "forged":
        values = json.loads(before)
        values["spec"]["weights"] = "cd" * 32
        del values["sha256"]
        write_sealed(spec, values)
    else:
        spec.write_bytes({"empty": b"", "binary": b"\xff\0" * 50, "deep": b"[" * 100_000}[harm])
    store = FeatureStore(tmp_path, SPEC, engine="tiny")
    assert np.array_equal(store.read(KEYS), ROWS) and len(store.notes) == 1
    assert spec.read_bytes() == before and FeatureStore(tmp_path, SPEC).notes == []
    assert caching.info(tmp_path, NAME).entry.form == shards.Form(SPEC, "tiny", (64,))


@pytest.mark.parametrize("harm", [b"", b"{", b'{"shards": {"x": 1}}', b"[1]", b'"\xff"'])
def test_a_damaged_verified_json_costs_reading_and_nothing_else(tmp_path: Path, harm: bytes) -> None:
    path, _ = one_shard(tmp_path)
    (path.parent / "verified.json").write_bytes(harm)
    store = FeatureStore(tmp_path, SPEC)
    assert np.array_equal(store.read(KEYS), ROWS) and store.notes == []


# --- files made to harm


def forged_name(data: bytes) -> str:
    return f"{7:016x}-{hashlib.sha256(data).hexdigest()}.h5"


def attributes(file: h5py.File) -> None:
    for name, value in shards.Form(SPEC, "tiny", (64,)).attributes().items():
        file.attrs[name] = np.bytes_(value)
    file.attrs["block"] = np.bytes_(b"64")


def contiguous(file: h5py.File, name: str, data: np.ndarray) -> None:
    file.create_dataset(name, data=data)


def honest(file: h5py.File, leave: str = "") -> None:
    """What a shard holds, made by HDF5 itself, but for one array."""
    attributes(file)
    digest = np.frombuffer(hashlib.sha256(ROWS.tobytes() + KEYS.tobytes()).digest(), np.uint8).reshape(1, 32)
    for name, data in (("keys", KEYS), ("rows", ROWS), ("digests", digest)):
        if name != leave:
            contiguous(file, name, data)


def external_storage(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", (64, 64), "<f4", external=[(str(secret), 0, 64 * 64 * 4)])


def external_link(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file["rows"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/rows")


def soft_link(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file["rows"] = h5py.SoftLink("/keys")


def group_behind_a_link(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_group("rows")["rows"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/rows")


def virtual(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    layout = h5py.VirtualLayout((64, 64), "<f4")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "rows", (64, 64))
    file.create_virtual_dataset("rows", layout)


def filtered(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", data=ROWS, chunks=(8, 64), compression="gzip")


def chunked(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", data=ROWS, chunks=(8, 64))


def shape_bomb(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", (1 << 40, 64), "<f4")


def keys_bomb(file: h5py.File, secret: Path) -> None:
    honest(file, "keys")
    file.create_dataset("keys", (1 << 50, 32), "u1")


def overflowing_shape(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", (1 << 33, 1 << 31), "<f4", chunks=(1, 1))


def object_type(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file.create_dataset("rows", (64, 64), h5py.vlen_dtype(np.uint8))


def big_endian(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    contiguous(file, "rows", ROWS.astype(">f4"))


def vlen_attribute(file: h5py.File, secret: Path) -> None:
    honest(file)
    del file.attrs["spec"]
    file.attrs["spec"] = shards.Form(SPEC, "tiny", (64,)).attributes()["spec"].decode()


def array_attribute(file: h5py.File, secret: Path) -> None:
    honest(file)
    del file.attrs["engine"]
    file.attrs["engine"] = np.array([b'"tiny"'] * 1000)


def another_array(file: h5py.File, secret: Path) -> None:
    honest(file)
    contiguous(file, "more", ROWS)


def another_attribute(file: h5py.File, secret: Path) -> None:
    honest(file)
    file.attrs["more"] = 1


def no_rows(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    contiguous(file, "rows", ROWS[:0])


def fewer_keys(file: h5py.File, secret: Path) -> None:
    honest(file, "keys")
    contiguous(file, "keys", KEYS[:63])


def negative_block(file: h5py.File, secret: Path) -> None:
    honest(file)
    del file.attrs["block"]
    file.attrs["block"] = np.bytes_(b"-1")


def a_scalar(file: h5py.File, secret: Path) -> None:
    honest(file, "rows")
    file["rows"] = np.float32(1)


HOSTILE = [external_storage, external_link, soft_link, group_behind_a_link, virtual, filtered, chunked, shape_bomb]
HOSTILE += [keys_bomb, overflowing_shape, object_type, big_endian, vlen_attribute, array_attribute, another_array]
HOSTILE += [another_attribute, no_rows, fewer_keys, negative_block, a_scalar]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host, as raw bytes and as HDF5, that no cache may read."""
    path = tmp_path / "secret"
    path.write_bytes(ROWS.tobytes())
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        contiguous(file, "rows", ROWS)
    return path


def plant(cache: Path, make: Callable[[h5py.File, Path], None], secret: Path) -> Path:
    """Put a file into the cache under the hash it really has."""
    fill(cache, *table(5, width=64, seed=7))
    folder = cache / "features" / NAME
    with h5py.File(folder / "new", "w", track_order=None) as file:
        make(file, secret)
    path = folder / forged_name((folder / "new").read_bytes())
    (folder / "new").rename(path)
    return path


def test_an_honest_file_made_by_hdf5_alone_is_accepted(tmp_path: Path, secret: Path) -> None:
    """So the hostile ones are refused for what they do, not for how they were made."""
    plant(tmp_path / "cache", lambda file, _: honest(file), secret)
    store = FeatureStore(tmp_path / "cache", SPEC)
    assert store.notes == [] and np.array_equal(store.read(KEYS), ROWS)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_file_is_refused_before_it_is_read(
    tmp_path: Path, secret: Path, make: Callable[[h5py.File, Path], None]
) -> None:
    path = plant(tmp_path / "cache", make, secret)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = FeatureStore(tmp_path / "cache", SPEC)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert len(store) == 5 and not store.contains(KEYS).any()
    assert len(store.notes) == 1 and path.name in store.notes[0] and "intact rows" not in store.notes[0]
    assert caching.verify(tmp_path / "cache")[0].notes == []


def elsewhere(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def a_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, secret: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [elsewhere, a_pipe, a_folder], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["shard", "spec.json", "verified.json"])
def test_what_is_not_a_plain_file_is_not_followed(
    tmp_path: Path, secret: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    path, _ = one_shard(tmp_path / "cache")
    secret.write_bytes(path.read_bytes())
    target = path.with_name(forged_name(secret.read_bytes())) if name == "shard" else path.with_name(name)
    target.unlink(missing_ok=True)
    make(target, secret)
    store = FeatureStore(tmp_path / "cache", SPEC)
    assert np.array_equal(store.read(KEYS), ROWS) and len(store.stored()) == 64
    if name == "shard":
        assert len(store.notes) == 1 and "not a plain file" in store.notes[0]
    assert secret.read_bytes() == path.read_bytes()


def test_names_from_a_cache_lead_nowhere_else(tmp_path: Path) -> None:
    fill(tmp_path / "cache", KEYS, ROWS)
    (tmp_path / "precious").mkdir()
    for name in ("../precious", "..", "/", "resnet18-x/../../.."):
        with pytest.raises(StoreError, match="there is no entry"):
            caching.remove(tmp_path / "cache", name)
    assert (tmp_path / "precious").is_dir() and len(FeatureStore(tmp_path / "cache", SPEC)) == 64


def test_a_spec_that_names_another_folder_is_not_opened(tmp_path: Path) -> None:
    path, _ = one_shard(tmp_path)
    os.rename(path.parent, path.parent.with_name("resnet18-0000000000000000"))
    with pytest.raises(StoreError, match="holds no intact spec"):
        caching.info(tmp_path, "resnet18-0000")
    assert caching.entries(tmp_path)[0].name == "resnet18-0000000000000000"
