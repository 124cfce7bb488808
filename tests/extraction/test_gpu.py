"""`--decode gpu` on the whole path, by torchvision's decoder on the CPU: what is decoded where, how a run ends."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, ColourEngine
from gpu_on_cpu import decoded_on_cpu
from PIL import Image
from slow_run import interrupt, program
from torch import Tensor

import featx
from featx.backbones.request import BackboneRequest
from featx.cache.store import FeatureStore
from featx.errors import FeatxError, ParityError
from featx.extraction.gpu import GROUPS, GpuDecoder
from featx.extraction.loader import Loader
from featx.extraction.pipeline import extract, sync
from featx.extraction.planning import plan
from featx.features import cosines
from featx.pixels.nvjpeg import Decode, Gpu, decoded
from featx.pixels.preprocess import CLOSE
from featx.runs import Run
from featx.sources.opening import open_source


def picture(number: int, width: int = 70, height: int = 50) -> Image.Image:
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, number: int, width: int = 70, height: int = 50, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, width, height).convert(mode).save(path, **options)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twenty-one files: eleven for the device, five more of JPEG's kinds, PNGs, a duplicate, and two broken ones."""
    root = tmp_path / "mixed" / "all"
    for i in range(8):
        exif = Image.Exif()
        exif[0x0112] = i + 1
        save(root / f"{i:02d}.jpg", i, 50 + 9 * i, 90 - 5 * i, exif=exif, subsampling=i % 3)
    save(root / "08.jpg", 8, mode="L")
    save(root / "09.jpg", 9, 64, 2000)
    save(root / "10.jpg", 10, quality=100)
    save(root / "11.jpg", 11, progressive=True)
    save(root / "12.jpg", 12, mode="CMYK")
    save(root / "13.jpg", 13, 14, 40)
    save(root / "14.png", 14)
    save(root / "15.png", 15, mode="L")
    (root / "16.jpg").write_bytes((root / "10.jpg").read_bytes())
    (root / "17.jpg").write_bytes((root / "10.jpg").read_bytes()[:900])
    (root / "18.jpg").write_bytes(b"\xff\xd8 nothing")
    save(root / "19.jpg", 19, 16, 1100)  # beyond the aspect ratio
    return root.parent


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("featx-load", "featx-decode"))]


def test_every_kind_of_file_gives_the_features_of_the_exact_decoder(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    found = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "exact")
    exact, report = found.features(), found.report
    assert exact.X.shape == (17, 48) and report.decoded_on_gpu == 0 and report.decode_cosine is None
    for group, at_once, workers in ((64, 1 << 20, 3), (3, 1 << 12, 1), (1, 1 << 12, 2)):
        limits = {"group": group, "at_once": at_once}
        gpu = decoded_on_cpu(mixed, tmp_path / str(group), engine, limits=limits, workers=workers)
        features = gpu.features()
        assert features.spec.preprocess.pixels == "nvjpeg/1" and features.spec.digest != exact.spec.digest
        assert features.ids == exact.ids and gpu.report.skipped_images == report.skipped_images
        np.testing.assert_allclose(features.X, exact.X, atol=2.5 / 255)  # two builds of libjpeg, resized in torch
        assert gpu.report.decoded_on_gpu == 11
        assert gpu.report.decode_cosine is not None and 1 >= gpu.report.decode_cosine > 0.9999
        elsewhere = [i for i, name in enumerate(features.ids) if int(name[-6:-4]) in (11, 12, 13, 14, 15)]
        np.testing.assert_array_equal(features.X[elsewhere], exact.X[elsewhere])
        assert threads() == []


def test_augmented_views_are_decoded_once_and_show_the_same_boxes(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    exact = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "exact", views=3)
    found = decoded_on_cpu(mixed, tmp_path / "gpu", engine, views=3)
    assert found.report.decoded_on_gpu == 11
    for view in range(4):
        np.testing.assert_allclose(found.features(view).X, exact.features(view).X, atol=3.5 / 255)
    assert np.abs(found.features(1).X - found.features(2).X).max() > 0.05


def test_what_the_device_refuses_is_decoded_by_pillow_one_by_one(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    exact = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "exact")
    smallest = sorted((mixed / "all").glob("*.jpg"))[3].stat().st_size

    def picky(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        return [None if len(data) == smallest else decoded([data], device)[0] for data in files]

    found = decoded_on_cpu(mixed, tmp_path / "gpu", engine, decode=picky)
    assert found.report.decoded_on_gpu == 10 and found.report.extracted == exact.report.extracted
    features = found.features()
    row = next(i for i, name in enumerate(features.ids) if name.endswith("03.jpg"))
    np.testing.assert_array_equal(features.X[row], exact.features().X[row])


def only_plain(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """Decodes the picture that a decoder is tried with, and no other."""
    return decoded(files, device) if Image.open(io.BytesIO(files[0])).size == (64, 64) else [None] * len(files)


def test_a_device_that_refuses_everything_leaves_it_to_pillow(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    exact = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "exact").features()
    found = decoded_on_cpu(mixed, tmp_path / "none", engine, decode=only_plain)
    np.testing.assert_array_equal(found.features().X, exact.X)
    assert found.report.decoded_on_gpu == 0 and found.report.decode_cosine is None
    assert "no image was decoded on the GPU: none was a baseline JPEG, or it refused them" in found.report.notes


def changed(change: Any) -> Decode:
    """A decoder whose pixels are changed, the picture's that it is tried with left out."""

    def decode(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        images = decoded(files, device)
        return [i if i is None or i.shape[1:] == (64, 64) else change(i) for i in images]

    return decode


def test_a_decoder_whose_features_are_far_from_pillows_ends_the_run_with_nothing_stored(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(FeatxError, match=r"of 11 images the worst has a cosine of 0\.\d+, less than 0.999.*exact"):
        decoded_on_cpu(mixed, cache, engine, decode=changed(lambda image: 255 - image))
    assert not list(cache.rglob("*.h5")) and threads() == []
    assert not any(path.stat().st_size for path in cache.rglob("shard*"))
    report = decoded_on_cpu(mixed, cache, engine).report
    assert report.cached == 0 and report.extracted == 16


def test_a_small_difference_is_told_and_allowed(mixed: Path, tmp_path: Path, engine: ColourEngine) -> None:
    brighter = changed(lambda image: image.clamp(0, 250) + 5)
    report = decoded_on_cpu(mixed, tmp_path / "cache", engine, decode=brighter).report
    assert report.decode_cosine is not None and CLOSE < report.decode_cosine < 0.99999
    said = "11 images decoded on the GPU; features of a sample against Pillow's: cosine"
    assert f"{said} {report.decode_cosine:.5f} or more" in report.text()


def test_the_cosine_of_rows_is_that_of_their_directions() -> None:
    rows = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [np.nan, 1.0]], np.float32)
    others = np.array([[0.0, 2.0], [6.0, 8.0], [0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]], np.float32)
    found = cosines(rows, others)
    assert found[:4].tolist() == [0.0, 1.0, 1.0, 0.0] and np.isnan(found[4])


def test_a_warm_run_needs_no_gpu_and_a_cold_one_says_so_before_any_work(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    filled = tmp_path / "cache"
    before = decoded_on_cpu(mixed, filled, engine).features().X
    warm = sync(mixed, COLOURS, cache=filled, decode="gpu", device="cpu")
    np.testing.assert_array_equal(warm.features().X, before)
    why = "--decode gpu needs a CUDA GPU, and --device cpu was asked for; use --decode exact, or a machine"
    for run in (sync, plan):
        with pytest.raises(FeatxError, match=why):
            run(mixed, "no_such_network", cache=tmp_path / "new", decode="gpu", device="cpu")
    assert not (tmp_path / "new").exists()


def test_new_images_beside_cached_ones_need_the_gpu(mixed: Path, tmp_path: Path, engine: ColourEngine) -> None:
    decoded_on_cpu(mixed, tmp_path / "cache", engine)
    save(mixed / "all" / "20.jpg", 20)
    with pytest.raises(FeatxError, match="needs a CUDA GPU"):
        sync(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu", device="cpu")


def decoder_of(data: Path, folder: Path, group: int) -> GpuDecoder:
    """By itself, on two threads, for a store that holds nothing."""
    store = FeatureStore(folder / "none", COLOURS.spec())
    loader = Loader(open_source(data), COLOURS.preprocess, [store], 2)
    return GpuDecoder(loader, "cpu", ColourEngine(), gpu=Gpu(COLOURS.preprocess, "cpu"), group=group)


def test_the_threads_end_with_an_error_and_when_nobody_reads_on(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    images = decoder_of(mixed, tmp_path, group=2)(np.arange(12))
    first = next(images)
    assert first.number == 0 and first.encoded is None and first.views[0][1].shape == (3, 32, 32)
    assert "featx-decode_0" in threads()
    images.close()
    assert threads() == []

    def lose(image: Tensor) -> Tensor:
        raise FeatxError("the GPU fell off the bus")

    with pytest.raises(FeatxError, match="fell off the bus"):
        decoded_on_cpu(mixed, tmp_path / "lost", engine, decode=changed(lose))
    assert threads() == []


def test_the_decoder_stays_only_some_groups_ahead(mixed: Path, tmp_path: Path) -> None:
    for i in range(60):
        save(mixed / "all" / f"more{i}.jpg", 100 + i)
    made = decoder_of(mixed, tmp_path, group=4)
    images = made(np.arange(60))
    for taken in range(1, 30):
        assert next(images).number == taken - 1
        time.sleep(0.002)
        assert made.loader.decoded_on_gpu <= taken + 4 * (GROUPS + 1)
    images.close()


ON_CPU = """from gpu_on_cpu import decoded_on_cpu
decoded_on_cpu(data, cache, engine, limits={"group": 8})"""


def test_ctrl_c_ends_it_and_keeps_what_was_computed(tmp_path: Path, engine: ColourEngine) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    for i in range(80):
        save(data / "all" / f"{i}.jpg", i)
    interrupt(program(data, cache, ON_CPU), batches=12)  # four of them compare the decoders
    report = decoded_on_cpu(data, cache, engine).report
    assert report.cached == 24 and report.extracted == 56


def test_a_warm_run_with_a_damaged_image_loads_no_torch(mixed: Path, tmp_path: Path, engine: ColourEngine) -> None:
    decoded_on_cpu(mixed, tmp_path / "cache", engine)
    call = 'sync(data, COLOURS, cache=cache, decode="gpu", device="cpu")\nprint("torch" in sys.modules)'
    code = program(mixed, tmp_path / "cache", call)
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_the_time_of_the_device_counts_as_decoding(mixed: Path, tmp_path: Path, engine: ColourEngine) -> None:
    def slow(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        time.sleep(0.3)
        return decoded(files, device)

    report = decoded_on_cpu(mixed, tmp_path / "cache", engine, decode=slow, limits={"group": 8}).report
    assert report.decoded_on_gpu == 11
    assert report.seconds["decode"] >= 0.6  # two of the three groups hold JPEGs for the device
    assert report.shares["decode"] > 0.5


def test_a_group_of_large_files_is_smaller(tmp_path: Path, engine: ColourEngine) -> None:
    for i in range(12):
        save(tmp_path / "data" / "all" / f"{i:02d}.jpg", i)
    sizes: list[int] = []

    def counting(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
        sizes.append(len(files))
        return decoded(files, device)

    limits = {"group_bytes": 2 * (tmp_path / "data" / "all" / "00.jpg").stat().st_size}
    report = decoded_on_cpu(tmp_path / "data", tmp_path / "cache", engine, decode=counting, limits=limits).report
    assert report.extracted == 12 and sum(sizes[1:]) == 12 and 2 <= max(sizes) <= 4  # the first call tries the decoder


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    for number, name in enumerate(("cold", "warm")):
        for i in range(10):
            coarse = rng.integers(100 * number, 100 * number + 150, (8, 8, 3), dtype=np.uint8)
            path = tmp_path / "jpegs" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path, quality=90)
    return tmp_path / "jpegs"


def fitted(data: Path, folder: Path, decode: Decode, *, compares: bool = True) -> Run:
    """A run on features by the GPU's pixels: `fit` finds them in the cache."""
    request = BackboneRequest("small:backbone_normed", weights="random")
    decoded_on_cpu(data, folder / "cache", None, request, decode=decode, compares=compares)
    where: dict[str, Any] = {"cache": folder / "cache", "output": folder / "run"}
    return featx.fit(data, "small:backbone_normed", weights="random", decode="gpu", **where)


def test_an_export_is_compared_with_pillows_pixels_and_its_features_by_cosine(jpegs: Path, tmp_path: Path) -> None:
    run = fitted(jpegs, tmp_path, changed(lambda image: image.clamp(0, 253) + 2))
    found = featx.export(run)
    checks = {check.name: check for check in found.checks}
    assert "cached features" not in checks
    apart = checks["cached features, 1 - cosine"]
    assert 0 < apart.value < apart.limit == pytest.approx(1 - CLOSE)
    answers = list(featx.predict(run.path / "model.onnx", jpegs))
    assert len(answers) == 20 and not any(answer.error for answer in answers)


def test_an_export_of_features_too_far_from_pillows_is_refused_with_what_to_do(jpegs: Path, tmp_path: Path) -> None:
    run = fitted(jpegs, tmp_path, changed(lambda image: 255 - image), compares=False)
    with pytest.raises(ParityError, match=r"cached features, 1 - cosine .*fit again with --decode exact"):
        featx.export(run)
    assert not (run.path / "model.onnx").exists()


@pytest.mark.gpu
def test_the_whole_command_on_a_gpu(photos: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: `featx extract --decode gpu` is untested on this machine")
    options: dict[str, Any] = {"weights": "random", "cache": tmp_path / "cache", "device": "cuda"}
    exact = extract(photos, "resnet18", **options)
    found = sync(photos, "resnet18", decode="gpu", views=1, **options)
    assert found.report.decoded_on_gpu > 380 and found.report.decode_cosine >= CLOSE
    assert cosines(found.features().X, exact.X).min() >= CLOSE
    resaved = tmp_path / "resaved" / "all"
    resaved.mkdir(parents=True)
    for path in sorted(photos.glob("val/*/*.jpg")):
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        (resaved / path.name).write_bytes(buffer.getvalue())
    half = extract(resaved.parent, "resnet18", decode="gpu", **options)
    whole = extract(resaved.parent, "resnet18", **options)
    assert cosines(half.X, whole.X).min() >= CLOSE
