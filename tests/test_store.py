"""The feature cache: what is written is what is read, and what is not as written is never served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featx.errors import StoreError
from featx.features import FeatureSpec
from featx.store import FeatureStore

SPEC = FeatureSpec("torchvision/resnet18", "ab" * 32)


def table(count: int, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    return keys, rng.standard_normal((count, width)).astype(np.float32)


def fill(cache: Path, keys: np.ndarray, rows: np.ndarray, batch: int = 32, **settings: object) -> FeatureStore:
    store = FeatureStore(cache, SPEC, engine="tiny", **settings)  # type: ignore[arg-type]
    with store:
        for start in range(0, len(keys), batch):
            store.append(keys[start : start + batch], rows[start : start + batch])
    return store


def test_rows_come_back_in_the_order_asked_for_with_repeats(tmp_path: Path) -> None:
    keys, rows = table(500)
    fill(tmp_path, keys, rows, shard_bytes=2000)
    store = FeatureStore(tmp_path, SPEC)
    assert len(list(store.folder.glob("*.h5"))) > 5 and len(store) == 500
    assert np.array_equal(store.read(keys), rows)
    order = np.random.default_rng(1).integers(0, 500, 1200)
    assert np.array_equal(store.read(keys[order]), rows[order])
    assert store.read(keys[:0]).shape == (0, 8)


def test_opening_and_asking_create_nothing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "cache", SPEC, engine="tiny")
    keys, _ = table(3)
    assert len(store) == 0 and not store.contains(keys).any() and store.row_shape is None
    with store, pytest.raises(StoreError, match="3 of 3 features are not in"):
        store.read(keys)
    assert not (tmp_path / "cache").exists()


def test_another_engine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    keys, rows = table(10)
    fill(tmp_path, keys, rows)
    assert FeatureStore(tmp_path, SPEC).engine == "tiny"
    with pytest.raises(StoreError, match=r"engine 'tiny', not 'other'.*featx cache remove"):
        FeatureStore(tmp_path, SPEC, engine="other")


def flip(path: Path, at: int) -> None:
    """Change one bit of one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))
