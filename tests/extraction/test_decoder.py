"""`--decode gpu` on the whole path, with "cpu" as the device's name: what is decoded where, and how a run ends."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import COLOURS, ColourEngine
from PIL import Image
from slow_run import interrupt, program

import featx
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.store import FeatureStore
from featx.cli import cli
from featx.errors import FeatxError, ParityError
from featx.extraction import gpu as module
from featx.extraction import pipeline as extraction
from featx.extraction import planning
from featx.extraction.gpu import Decoder
from featx.extraction.loader import Loader
from featx.extraction.pipeline import extract, sync
from featx.extraction.planning import plan
from featx.features import cosines
from featx.pixels import nvjpeg
from featx.pixels.preprocess import CLOSE, Preprocess
from featx.runs import Run
from featx.sources.opening import open_source


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the GPU's place."""
    for user in (extraction, planning, module):
        monkeypatch.setattr(user, "decoding_device", lambda device: "cpu")


@pytest.fixture
def engine(engine: ColourEngine, monkeypatch: pytest.MonkeyPatch) -> ColourEngine:
    """`ColourEngine`, for a backbone that takes the decoder of its request."""
    plain = extraction.resolve

    def resolve(request: BackboneRequest, cache: Path | None) -> BackboneInfo:
        info = plain(request, cache)
        return replace(info, preprocess=request.override(info.preprocess))

    for user in (extraction, planning):
        monkeypatch.setattr(user, "resolve", resolve)
        monkeypatch.setattr(user, "open_engine", lambda *a, **k: engine)
    return engine


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
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "exact")
    assert exact.X.shape == (17, 48) and exact.report.decoded_on_gpu == 0
    assert exact.report.decode_cosine is None
    for group, workers in ((64, 3), (3, 1), (1, 2)):
        monkeypatch.setattr(module, "GROUP", group)
        monkeypatch.setattr(nvjpeg, "PIXELS", 1 << (20 if group == 64 else 12))
        cache = tmp_path / str(group)
        found = extract(mixed, COLOURS, engine=engine, cache=cache, workers=workers, decode="gpu")
        assert found.spec.preprocess.pixels == "nvjpeg/1" and found.spec.digest != exact.spec.digest
        assert found.ids == exact.ids and found.report.skipped_images == exact.report.skipped_images
        np.testing.assert_allclose(found.X, exact.X, atol=1.5 / 255)  # two builds of libjpeg
        assert found.report.decoded_on_gpu == 11
        assert 1 >= found.report.decode_cosine > 0.9999
        elsewhere = [i for i, name in enumerate(found.ids) if int(name[-6:-4]) in (11, 12, 13, 14, 15)]
        np.testing.assert_array_equal(found.X[elsewhere], exact.X[elsewhere])
        assert threads() == []


def test_augmented_views_are_decoded_once_and_show_the_same_boxes(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    exact = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "exact", views=3)
    found = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "gpu", views=3, decode="gpu")
    assert found.report.decoded_on_gpu == 11
    for view in range(4):
        np.testing.assert_allclose(found.features(view).X, exact.features(view).X, atol=2.5 / 255)
    assert np.abs(found.features(1).X - found.features(2).X).max() > 0.05


def test_what_the_device_refuses_is_decoded_by_pillow_one_by_one(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "exact")
    plain, smallest = nvjpeg.decoded, sorted((mixed / "all").glob("*.jpg"))[3].stat().st_size

    def picky(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        return [None if len(data) == smallest else plain([data], device)[0] for data in files]

    monkeypatch.setattr(nvjpeg, "decoded", picky)
    found = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "gpu", decode="gpu")
    assert found.report.decoded_on_gpu == 10 and found.report.extracted == exact.report.extracted
    row = next(i for i, name in enumerate(found.ids) if name.endswith("03.jpg"))
    np.testing.assert_array_equal(found.X[row], exact.X[row])

    monkeypatch.setattr(nvjpeg, "repeats_chroma", lambda *a: False)
    monkeypatch.setattr(nvjpeg, "decoded", lambda files, device: [None] * len(files))
    found = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "none", decode="gpu")
    np.testing.assert_array_equal(found.X, exact.X)
    assert found.report.decoded_on_gpu == 0 and found.report.decode_cosine is None
    assert "no image was decoded on the GPU: none was a baseline JPEG, or it refused them" in found.report.notes


def test_a_decoder_whose_features_are_far_from_pillows_ends_the_run_with_nothing_stored(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nvjpeg.decoded

    def damaged(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        return [255 - image if image is not None else None for image in plain(files, device)]

    monkeypatch.setattr(nvjpeg, "decoded", damaged)
    with pytest.raises(FeatxError, match=r"of 11 images the worst has a cosine of 0\.\d+, less than 0.999.*exact"):
        extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu")
    assert not list((tmp_path / "cache").rglob("*.h5")) and threads() == []
    assert not any(path.stat().st_size for path in (tmp_path / "cache").rglob("shard*"))
    monkeypatch.setattr(nvjpeg, "decoded", plain)
    report = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu").report
    assert report.cached == 0 and report.extracted == 16


def test_a_small_difference_is_told_and_allowed(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nvjpeg.decoded

    def brighter(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        return [image.clamp(0, 250) + 5 if image is not None else None for image in plain(files, device)]

    monkeypatch.setattr(nvjpeg, "decoded", brighter)
    cosine = extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu").report.decode_cosine
    assert CLOSE < cosine < 0.99999


def test_the_cosine_of_rows_is_that_of_their_directions() -> None:
    rows = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [np.nan, 1.0]], np.float32)
    others = np.array([[0.0, 2.0], [6.0, 8.0], [0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]], np.float32)
    found = cosines(rows, others)
    assert found[:4].tolist() == [0.0, 1.0, 1.0, 0.0] and np.isnan(found[4])


def test_a_warm_run_needs_no_gpu_and_a_cold_one_says_so_before_any_work(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featx.devices import decoding_device

    filled = tmp_path / "cache"
    before = extract(mixed, COLOURS, engine=engine, cache=filled, decode="gpu").X
    for user in (extraction, planning, module):
        monkeypatch.setattr(user, "decoding_device", decoding_device)
    monkeypatch.setattr("featx.devices.has_cuda", lambda: False)
    np.testing.assert_array_equal(
        extract(mixed, COLOURS, engine=engine, cache=filled, decode="gpu", device="cpu").X, before
    )
    monkeypatch.setattr(extraction, "resolve", lambda *a: pytest.fail("weights were asked for"))
    for device, why in (("auto", "there is none here"), ("cpu", "--device cpu was asked for")):
        with pytest.raises(
            FeatxError, match=f"--decode gpu needs a CUDA GPU, and {why}; use --decode exact, or a machine"
        ):
            extract(mixed, COLOURS, engine=engine, cache=tmp_path / "new", decode="gpu", device=device)
        with pytest.raises(FeatxError, match=why):
            plan(mixed, COLOURS, engine=engine, cache=tmp_path / "new", decode="gpu", device=device)
    assert not (tmp_path / "new").exists()


def test_new_images_beside_cached_ones_need_the_gpu(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu")
    save(mixed / "all" / "20.jpg", 20)

    def none(device: str) -> str:
        raise FeatxError("--decode gpu needs a CUDA GPU")

    monkeypatch.setattr(module, "decoding_device", none)
    with pytest.raises(FeatxError, match="needs a CUDA GPU"):
        extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu")


def decoder_of(data: Path, folder: Path) -> Decoder:
    """By itself, on two threads, for a store that holds nothing."""
    spec = sync(data, COLOURS, engine=engine, cache=folder / "other").stores[0].spec
    return Decoder(Loader(open_source(data), Preprocess(36, 32), [FeatureStore(folder / "none", spec)], 2), "cpu")


def test_the_threads_end_with_an_error_and_when_nobody_reads_on(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP", 2)
    made = decoder_of(mixed, tmp_path)
    images = made(np.arange(12))
    first = next(images)
    assert first.row == 0 and first.encoded is None and first.views[0][1].shape == (3, 32, 32)
    assert "featx-decode_0" in threads()
    images.close()
    assert threads() == []

    def lost(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        raise FeatxError("the GPU fell off the bus")

    monkeypatch.setattr(nvjpeg, "decoded", lost)
    with pytest.raises(FeatxError, match="fell off the bus"):
        extract(mixed, COLOURS, engine=engine, cache=tmp_path / "lost", decode="gpu")
    assert threads() == []


def test_the_decoder_stays_only_some_groups_ahead(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        save(mixed / "all" / f"more{i}.jpg", 100 + i)
    monkeypatch.setattr(module, "GROUP", 4)
    made = decoder_of(mixed, tmp_path)
    images = made(np.arange(60))
    for taken in range(1, 30):
        assert next(images).row == taken - 1
        time.sleep(0.002)
        assert made.decoded <= taken + 4 * (module.GROUPS + 1)
    images.close()


ON_CPU = 'decoder.GROUP, decoder.decoding_device = 8, lambda device: "cpu"'


def test_ctrl_c_ends_it_and_keeps_what_was_computed(tmp_path: Path, engine: ColourEngine) -> None:
    for i in range(80):
        save(tmp_path / "data" / "all" / f"{i}.jpg", i)
    (tmp_path / "cache" / "features").mkdir(parents=True)  # else the GPU is asked for at once
    data, cache = tmp_path / "data", tmp_path / "cache"
    interrupt(program(data, cache, ON_CPU, decode="gpu"), batches=12)  # four of them compare the decoders
    report = extract(data, COLOURS, engine=engine, cache=cache, decode="gpu").report
    assert report.cached == 24 and report.extracted == 56


def test_a_warm_run_with_a_damaged_image_loads_no_torch(mixed: Path, tmp_path: Path, engine: ColourEngine) -> None:
    extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu")
    code = program(mixed, tmp_path / "cache", "del decoder.decoding_device", decode="gpu")
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_the_time_of_the_device_counts_as_decoding(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves by 1,000 s at each look, so that nothing else that runs here can weigh as much."""
    monkeypatch.setattr(module, "GROUP", 8)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=count(0, 1000).__next__))
    report = sync(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu").report
    assert report.decoded_on_gpu == 11
    assert 2000 <= report.seconds["decode"] < 3000  # two of the three groups hold JPEGs for the device
    assert report.shares["decode"] > 0.9


def test_a_dry_run_measures_by_the_same_way_and_writes_no_feature(
    mixed: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    planned = plan(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu")
    assert planned.missing == 19 and planned.images_per_second > 0
    assert extract(mixed, COLOURS, engine=engine, cache=tmp_path / "cache", decode="gpu").report.extracted == 16


def test_the_command_says_how_many_and_how_near(
    mixed: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["extract", str(mixed), "--backbone", "tiny", "--cache", str(tmp_path / "cache"), "--decode", "gpu"]
    done = CliRunner().invoke(cli, words)
    assert "11 images decoded on the GPU; features of some by Pillow's pixels: cosine 1.00000 or more" in done.output


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


def fitted(data: Path, folder: Path) -> Run:
    return featx.fit(
        data, "small:backbone_normed", weights="random", decode="gpu", cache=folder / "cache", output=folder / "run"
    )


def test_an_exported_run_is_held_to_pillows_pixels_and_its_features_to_a_cosine(
    jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nvjpeg.decoded

    def other(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        return [image.clamp(0, 253) + 2 if image is not None else None for image in plain(files, device)]

    monkeypatch.setattr(nvjpeg, "decoded", other)
    run = fitted(jpegs, tmp_path)
    found = featx.export(run.path)
    checks = {check.name: check for check in found.checks}
    assert "cached features" not in checks
    apart = checks["cached features, 1 - cosine"]
    assert 0 < apart.value < apart.limit == pytest.approx(1 - CLOSE)
    answers = list(featx.predict(run.path / "model.onnx", jpegs))
    assert len(answers) == 20 and not any(answer.error for answer in answers)


def test_an_export_of_features_too_far_from_pillows_is_refused_with_what_to_do(
    jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nvjpeg.decoded
    monkeypatch.setattr(module, "CLOSE", -1.0)  # as if the first images had been near enough
    monkeypatch.setattr(nvjpeg, "decoded", lambda files, device: [255 - image for image in plain(files, device)])
    run = fitted(jpegs, tmp_path)
    with pytest.raises(ParityError, match=r"cached features, 1 - cosine .*fit again with --decode exact"):
        featx.export(run.path)
    assert not (run.path / "model.onnx").exists()


@pytest.mark.gpu
def test_the_whole_command_on_a_gpu(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: `featx extract --decode gpu` is untested on this machine")
    monkeypatch.undo()
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


def test_two_openings_at_once_take_their_time_from_the_run_once(
    tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        save(tmp_path / "data" / "all" / f"a{i}.png", i)
    for i in range(24):
        save(tmp_path / "data" / "all" / f"b{i}.jpg", 100 + i)
    plain = module._open

    def slow(*given: Any) -> Any:
        time.sleep(0.5)
        return plain(*given)

    monkeypatch.setattr(module, "GROUP", 4)
    monkeypatch.setattr(module, "_open", slow)
    monkeypatch.setattr(extraction, "open_engine", lambda *a, **k: (time.sleep(0.5), engine)[1])
    (tmp_path / "cache").mkdir()
    report = extract(tmp_path / "data", "tiny", cache=tmp_path / "cache", decode="gpu").report
    assert 0.5 <= report.seconds["start"] < report.seconds["total"]
    assert 0 < report.images_per_second < 32 / 0.002


def test_a_group_of_large_files_is_smaller(
    tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(12):
        save(tmp_path / "data" / "all" / f"{i:02d}.jpg", i)
    sizes: list[int] = []
    plain = module.Decoder._decode
    monkeypatch.setattr(
        module.Decoder, "_decode", lambda self, group: (sizes.append(len(group)), plain(self, group))[1]
    )
    monkeypatch.setattr(module, "GROUP_BYTES", 2 * (tmp_path / "data" / "all" / "00.jpg").stat().st_size)
    report = extract(tmp_path / "data", "tiny", cache=tmp_path / "cache", decode="gpu").report
    assert report.extracted == sum(sizes) == 12 and max(sizes) <= 4
