"""Correctness under speed: what threads, batches and order must not change, and how a broken run ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images
from PIL import Image
from slow_run import interrupt, program

from featx.cache.store import FeatureStore
from featx.errors import FeatxError, ImageError
from featx.extraction.embedding import embed, keep
from featx.extraction.loader import Loader
from featx.extraction.pipeline import extract, sync
from featx.pixels.decoding import decode
from featx.pixels.preprocess import FAST, Preprocess
from featx.sources.opening import open_source
from featx.sources.source import Source


class QueuedEngine(ColourEngine):
    """Works as the onnxruntime engine does: pieces on threads of its own, finished out of order."""

    def __init__(self, batch_size: int = 4, delay: Callable[[int], float] = lambda n: 0.0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.executor = ThreadPoolExecutor(3, thread_name_prefix="test-embed")
        self.sizes: list[int] = []
        self.delay = delay
        self.lock = threading.Lock()

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        self.sizes.append(len(images))
        pieces = [self.executor.submit(self._piece, i, images[i : i + 2]) for i in range(0, len(images), 2)]
        return lambda: np.concatenate([piece.result() for piece in pieces])

    def _piece(self, number: int, images: np.ndarray) -> np.ndarray:
        time.sleep(self.delay(number))
        with self.lock:
            return super().__call__(images)

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Nineteen images of nineteen sizes and four formats, one of them broken, one a duplicate."""
    root = tmp_path / "mixed" / "all"
    root.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for i in range(17):
        pixels = rng.integers(0, 256, (33 + 9 * i, 200 - 7 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.{('png', 'jpg', 'bmp', 'webp')[i % 4]}")
    (root / "17.jpg").write_bytes((root / "01.jpg").read_bytes()[:200])
    (root / "18.png").write_bytes((root / "04.png").read_bytes())
    return root.parent


@dataclass(frozen=True, eq=False)
class Counting(Source):
    """A source that notes which images are read."""

    loads: list[int] = field(default_factory=list)

    def read(self, i: int) -> bytes:
        self.loads.append(i)
        return super().read(i)


def loading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("featx-load", "test-embed"))]


def test_features_do_not_depend_on_batch_size_threads_or_the_order_in_which_work_ends(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    expected = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "reference", workers=1)
    assert expected.X.shape == (18, 48) and len(np.unique(expected.X, axis=0)) == 17
    rng = np.random.default_rng(0)
    for number, (size, workers) in enumerate([(1, 1), (3, 4), (16, 2), (17, 7), (64, 3)]):
        made = QueuedEngine(size, lambda n: 0.003 * float(rng.random()))
        features = extract(mixed, COLOURS, engine=made, cache=tmp_path / str(number), workers=workers)
        np.testing.assert_array_equal(features.X, expected.X)
        assert features.ids == expected.ids
        full, rest = divmod(17, size)
        assert made.sizes == [size] * full + [rest] * (rest > 0)
        assert made.images == 17


def test_a_duplicate_is_found_however_many_claims_were_forgotten_meanwhile(
    tmp_path: Path, engine: ColourEngine
) -> None:
    root = write_images(tmp_path / "data", per_class=20)
    for i in range(10):
        (root / "warm" / f"copy{i}.png").write_bytes((root / "cold" / f"{i:03d}.png").read_bytes())
    source, store = open_source(root), FeatureStore(tmp_path / "cache", COLOURS.spec(), shard_bytes=1)
    loader = Loader(source, COLOURS.preprocess, [store], workers=2, claims=5)
    for batch in embed(loader(np.arange(50)), engine):
        keep(batch, [store], source)
    assert len(store) == engine.images == 40


def test_one_image_is_enough_and_a_bad_one_leaves_no_hole_in_its_batch(tmp_path: Path, engine: ColourEngine) -> None:
    root = write_images(tmp_path / "one", per_class=1, classes=("only",))
    assert extract(root, COLOURS, engine=engine, cache=tmp_path / "a").X.shape == (1, 48)
    for i in range(1, 6):
        (root / "only" / f"{i:03d}.png").write_bytes(b"" if i % 2 else (b"\x89PNG\r\n\x1a\n" + bytes([i])))
    write_images(root, per_class=3, classes=("other",), seed=3)
    made = QueuedEngine(4)
    features = extract(root, COLOURS, engine=made, cache=tmp_path / "b")
    assert made.sizes == [4]
    assert features.report.skipped == 5 and features.report.extracted == 4
    preprocess = Preprocess(resize=36, crop=32)
    for row, name in zip(features.X, features.ids, strict=True):
        pixels = preprocess((root / name).read_bytes())[None]
        np.testing.assert_array_equal(row, ColourEngine()(pixels)[0])


def test_an_engine_that_is_lost_mid_run_ends_with_what_was_committed_and_its_own_error(
    tmp_path: Path, engine: ColourEngine
) -> None:
    root = write_images(tmp_path / "data", per_class=20)

    class Lost(QueuedEngine):
        def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
            if len(self.sizes) == 4:
                return self.executor.submit(self._lose).result
            return super().submit(images)

        def _lose(self) -> np.ndarray:
            raise FeatxError("the GPU fell off the bus; start again, or use --device cpu")

    lost = Lost(4)
    with closing(lost), pytest.raises(FeatxError, match="fell off the bus"):
        extract(root, COLOURS, engine=lost, cache=tmp_path / "cache")
    assert loading_threads() == []
    report = extract(root, COLOURS, engine=engine, cache=tmp_path / "cache").report
    assert report.cached == 16 and report.extracted == 24
    assert engine.images == report.extracted


def test_loading_threads_end_with_the_run_with_an_error_and_when_nobody_reads_on(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", workers=5)
    assert loading_threads() == []
    store = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").stores[0]
    loader = Loader(open_source(tiny), Preprocess(resize=36, crop=32), [store], 3)
    images = loader(np.arange(12))
    assert next(images).number == 0 and len(loading_threads()) > 0
    images.close()
    assert loading_threads() == []


def test_the_loader_stays_only_a_window_ahead_of_a_slow_backbone(tmp_path: Path, engine: ColourEngine) -> None:
    root = write_images(tmp_path / "data", per_class=30)
    pixels = 3 * 32 * 32
    store = sync(write_images(tmp_path / "one"), COLOURS, engine=engine, cache=tmp_path / "cache").stores[0]
    source = Counting(**vars(open_source(root)))
    loads = source.loads
    images = Loader(source, COLOURS.preprocess, [store], 2, waiting_bytes=8 * pixels)(np.arange(60))
    for taken in range(1, 20):
        next(images)
        time.sleep(0.005)
        assert len(loads) <= taken + 8
    images.close()
    assert len(loads) < 40


def test_ctrl_c_ends_it_and_leaves_a_usable_cache(tmp_path: Path, engine: ColourEngine) -> None:
    root, cache = write_images(tmp_path / "data", per_class=60), tmp_path / "cache"
    interrupt(program(root, cache), batches=5)
    report = extract(root, COLOURS, engine=engine, cache=cache).report
    assert report.cached == 12  # of four batches, the last was still on its way to the store
    assert engine.images == report.extracted == 108


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Tiny distinct files, in a process of its own; 100,000 of them in benchmarks/memory.py."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, str(benchmark), "1000", "13000", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    growth = float(done.stdout.split("bytes an image more:")[1].split()[0])
    assert -400 < growth < 800, done.stdout  # 12,000 images: one MiB of chance is 87 bytes an image


def large_photo(width: int, height: int) -> Image.Image:
    """Smooth shapes, edges and fine texture, as a camera would give."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / s) + np.cos(y / (1.3 * s)) for s in (9.0, 41.0, 200.0)]
    pixels = np.stack([127 + 40 * wave + 30 * ((x // 97 + y // 61) % 2) for wave in waves], axis=2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    path = tmp_path_factory.mktemp("photo") / "large.jpg"
    large_photo(2000, 1500).save(path, quality=92)
    yield path.read_bytes()


def test_the_fast_decoder_shrinks_large_jpegs_only_and_stays_near_the_exact_one(photo: bytes, tmp_path: Path) -> None:
    exact, fast = Preprocess(), Preprocess(pixels=FAST)
    for preprocess, size in ((exact, (2000, 1500)), (fast, (1000, 750))):
        with preprocess.decoded(photo) as image:
            assert image.size == size
    assert exact.shrinks(photo, (2000, 1500)) and not fast.shrinks(photo, (2000, 1500))
    apart = np.abs(exact(photo).astype(int) - fast(photo).astype(int))
    assert 0 < apart.max() <= 24 and apart.mean() < 1.5
    small = tmp_path / "small.jpg"
    large_photo(900, 700).save(small)
    np.testing.assert_array_equal(exact(small.read_bytes()), fast(small.read_bytes()))
    large_photo(2000, 1500).save(tmp_path / "large.png")
    png = (tmp_path / "large.png").read_bytes()
    np.testing.assert_array_equal(exact(png), fast(png))


def test_the_fast_decoder_turns_images_upright_and_keeps_bad_ones_out(photo: bytes, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    large_photo(2000, 1500).save(turned, quality=92, exif=exif)
    fast = Preprocess(pixels=FAST)
    with fast.decoded(turned.read_bytes()) as image:
        assert image.size == (750, 1000)
    with pytest.raises(ImageError):
        fast(photo[: len(photo) // 3])
    assert decode(photo, 400).size == (500, 375) or decode(photo, 400).size == (1000, 750)


def test_fast_features_are_cached_apart_from_exact_ones(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    exact = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    fast = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", decode="fast")
    assert engine.images == 24
    assert fast.spec.preprocess.pixels == "pillow-draft/1" and fast.spec.digest != exact.spec.digest
    np.testing.assert_array_equal(exact.X, fast.X)  # none of them is large
    with pytest.raises(FeatxError, match="exact, fast"):
        extract(tiny, COLOURS, cache=tmp_path / "cache", decode="quick")  # type: ignore[arg-type]
