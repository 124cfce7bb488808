"""The main path over an engine without torch: what is computed, what is not, and what is said about it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images
from PIL import Image

from featx.errors import FeatxError, HeadError, ImageError, RunError, SourceError
from featx.extraction.pipeline import extract, sync
from featx.extraction.report import ExtractionReport
from featx.options import Options, fields_of
from featx.pixels.preprocess import Preprocess
from featx.sources.opening import open_source
from featx.sources.source import Source

COUNTS = ("found", "ignored", "cached", "extracted", "duplicate", "skipped")


def counts(report: ExtractionReport | None) -> tuple[int, ...]:
    return tuple(getattr(report, name) for name in COUNTS)


class Silent(Source):
    """A source that must not be read."""

    def read(self, i: int) -> bytes:
        pytest.fail(f"{self.ids[i]} was read")


def expected_row(path: Path) -> np.ndarray:
    pixels = Preprocess(resize=36, crop=32)(path.read_bytes()).astype(np.float64)
    return np.array([pixels[c, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean() / 255
                     for c in range(3) for i in range(4) for j in range(4)])  # fmt: skip


def test_every_image_gets_its_own_row_in_the_order_of_the_source(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert features.X.shape == (12, 48) and features.X.dtype == np.float32
    assert features.ids == sorted(features.ids) and len(features.ids) == 12
    assert features.class_names == ["cold", "warm"]
    for row, name, label in zip(features.X, features.ids, features.y, strict=True):
        np.testing.assert_allclose(row, expected_row(tiny / name), atol=1e-6)
        assert features.class_names[label] == name.split("/")[0]
    assert counts(features.report) == (12, 0, 0, 12, 0, 0)


def test_a_second_run_makes_no_forward_pass(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    first = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    second = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert engine.images == 12
    assert counts(second.report) == (12, 0, 12, 0, 0, 0)
    np.testing.assert_array_equal(first.X, second.X)


def test_a_warm_run_reads_no_image(
    tiny: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = 1_600_000_000
    for path in tiny.rglob("*.png"):
        os.utime(path, (old, old))
    extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    # files made within the clock's granularity are read once more; after that no more
    clock = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: clock() + 60_000_000_000)
    extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    silent = Silent(**vars(open_source(tiny)))
    assert counts(extract(silent, COLOURS, engine=engine, cache=tmp_path / "cache").report) == (12, 0, 12, 0, 0, 0)


def test_relabelling_renaming_and_moving_recompute_nothing(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    before = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    (tiny / "cold" / "000.png").rename(tiny / "warm" / "was_cold.png")
    (tiny / "cold" / "001.png").rename(tiny / "cold" / "renamed.png")
    moved = tmp_path / "elsewhere"
    shutil.move(tiny, moved)
    after = extract(moved, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert engine.images == 12
    assert counts(after.report) == (12, 0, 12, 0, 0, 0)
    was = before.X[before.ids.index("cold/000.png")]
    np.testing.assert_array_equal(after.X[after.ids.index("warm/was_cold.png")], was)
    assert after.class_names[after.y[after.ids.index("warm/was_cold.png")]] == "warm"


def test_a_duplicate_costs_no_forward_pass_and_is_counted_in_every_run(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    shutil.copy(tiny / "cold" / "000.png", tiny / "cold" / "copy.png")
    first = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").report
    second = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").report
    assert engine.images == 12
    assert counts(first) == (13, 0, 0, 12, 1, 0)
    assert counts(second) == (13, 0, 12, 0, 1, 0)
    assert first.duplicates == [["cold/000.png", "cold/copy.png"]]
    assert first.conflicts == []


def test_the_same_bytes_under_two_labels_are_named(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    shutil.copy(tiny / "cold" / "000.png", tiny / "warm" / "copy.png")
    features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert features.report.conflicts == [{"cold/000.png": "cold", "warm/copy.png": "warm"}]
    twins = [features.ids.index(name) for name in ("cold/000.png", "warm/copy.png")]
    assert features.splits[twins[0]] == features.splits[twins[1]]


def test_a_changed_image_is_computed_again(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    Image.new("RGB", (50, 50), (255, 0, 0)).save(tiny / "cold" / "000.png")
    features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert engine.images == 13
    np.testing.assert_allclose(features.X[features.ids.index("cold/000.png")], [1.0] * 16 + [0.0] * 32)


def test_one_bad_image_is_named_and_skipped_and_the_run_goes_on(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    photo = tiny / "cold" / "000.png"
    (tiny / "cold" / "cut.png").write_bytes(photo.read_bytes()[:400])
    (tiny / "cold" / "empty.png").write_bytes(b"")
    (tiny / "warm" / "text.jpg").write_text("no image at all")
    (tiny / "warm" / "notes.txt").write_text("not listed")
    for run in range(2):
        features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
        assert counts(features.report) == (15, 1, 12 * run, 12 * (1 - run), 0, 3)
        skipped = {image["id"]: image["reason"] for image in features.report.skipped_images}
        assert set(skipped) == {"cold/cut.png", "cold/empty.png", "warm/text.jpg"}
        assert "empty" in skipped["cold/empty.png"]
        assert features.report.ignored_files == ["warm/notes.txt"]
        assert len(features) == 12 and not set(skipped) & set(features.ids)


def test_a_copy_of_a_bad_image_is_skipped_too(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    for name in ("a.png", "b.png"):
        (tiny / "cold" / name).write_bytes(b"the same rubbish")
    report = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").report
    assert counts(report) == (14, 0, 0, 12, 0, 2)
    assert len({image["reason"] for image in report.skipped_images}) == 1


def test_no_readable_image_is_an_error_that_says_why(tmp_path: Path, everywhere: ColourEngine) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"none of the 1 images .* could be read .*a/x\.jpg.*empty"):
        extract(tmp_path / "data", "tiny", cache=tmp_path / "cache")


def test_a_file_that_vanishes_mid_run_is_skipped(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    source = open_source(tiny)
    (tiny / "warm" / "003.png").unlink()
    report = extract(source, COLOURS, engine=engine, cache=tmp_path / "cache").report
    assert counts(report) == (12, 0, 0, 11, 0, 1)
    assert report.skipped_images[0]["id"] == "warm/003.png"


def test_an_interrupt_keeps_what_was_computed(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    interrupted = ColourEngine()
    interrupted.interrupt_at = 8
    with pytest.raises(KeyboardInterrupt):
        extract(tiny, COLOURS, engine=interrupted, cache=tmp_path / "cache")
    features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert counts(features.report) == (12, 0, 4, 8, 0, 0)  # one of two batches was still in flight
    assert engine.images == 8
    undisturbed = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "other")
    np.testing.assert_array_equal(features.X, undisturbed.X)


def test_a_row_that_is_not_finite_is_refused_with_its_image_and_never_cached(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    class Overflowing(ColourEngine):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            rows = super().__call__(images)
            if self.images == 8:
                rows[1, 7], rows[3] = np.inf, np.nan
            return rows

    for options, remedy in (({}, "weights are damaged"), ({"precision": "bf16"}, "use --precision fp32")):
        with pytest.raises(FeatxError, match=rf"infinity for cold/005.png \(2 of the 4 images.*{remedy}"):
            extract(tiny, COLOURS, engine=Overflowing(), cache=tmp_path / "cache", **options)
        features = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", **options)
        assert counts(features.report) == (12, 0, 4, 8, 0, 0)
        assert np.isfinite(features.X).all()


def test_adding_views_computes_only_the_new_ones(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    cache = tmp_path / "cache"
    extract(tiny, COLOURS, engine=engine, cache=cache)
    two = sync(tiny, COLOURS, engine=engine, cache=cache, views=2)
    assert engine.images == 12 * 3
    three = sync(tiny, COLOURS, engine=engine, cache=cache, views=3)
    assert engine.images == 12 * 4
    np.testing.assert_array_equal(two.features(2).X, three.features(2).X)
    assert not np.array_equal(three.features(1).X, three.features(2).X)
    assert not np.array_equal(three.features(0).X, three.features(1).X)


def test_views_do_not_depend_on_threads_or_on_other_images(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    all_ = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "a", views=1, workers=4).features(1)
    shutil.rmtree(tiny / "warm")
    few = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "b", views=1, workers=1).features(1)
    np.testing.assert_array_equal(all_.X[: len(few)], few.X)
    assert all_.ids[: len(few)] == few.ids


def test_a_float16_cache_is_another_spec(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    full = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    half = extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", dtype="float16")
    assert engine.images == 24
    assert half.X.dtype == np.float16 and full.spec.digest != half.spec.digest
    np.testing.assert_allclose(half.X, full.X, rtol=1e-3)


def test_the_scikit_learn_transformer_takes_paths_images_and_arrays(
    tiny: Path, tmp_path: Path, everywhere: ColourEngine
) -> None:
    from featx import ImageFeatures

    paths = sorted(tiny.rglob("*.png"))
    transformer = ImageFeatures("tiny", cache=tmp_path / "cache")
    X = transformer.fit_transform(paths)
    np.testing.assert_array_equal(X, transformer.transform([str(path) for path in paths]))
    assert everywhere.images == 12
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.testing.assert_array_equal(X, transformer.transform(arrays))
    np.testing.assert_array_equal(X, transformer.transform([Image.open(path) for path in paths]))
    assert everywhere.images == 24  # pixels are not the files' bytes, but a Pillow image is its array
    with pytest.raises(ImageError, match=r"missing\.png"):
        transformer.transform([*paths, tiny / "missing.png"])
    np.testing.assert_array_equal(X[:1], transformer.transform(str(paths[0])))


def test_the_transformer_takes_what_extract_takes_but_views() -> None:
    """Views of an image are rows beside its own; a transformer gives one row for each image."""
    from featx import ImageFeatures

    defaults = {name: field.option.default for name, field in fields_of(Options).items() if name != "views"}
    assert ImageFeatures().get_params() == {"backbone": "resnet18"} | defaults


def test_the_transformer_works_in_a_grid_search_and_clones(
    tiny: Path, tmp_path: Path, everywhere: ColourEngine
) -> None:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    from featx import ImageFeatures

    write_images(tiny, classes=("cold", "warm"), per_class=10, seed=1)
    paths = [str(path) for path in sorted(tiny.rglob("*.png"))]
    y = ["warm" in path for path in paths]
    pipeline = make_pipeline(ImageFeatures("tiny", cache=str(tmp_path / "cache")), LogisticRegression())
    search = GridSearchCV(clone(pipeline), {"logisticregression__C": [0.1, 10.0]}, cv=2).fit(paths, y)
    assert search.best_score_ == 1.0
    assert everywhere.images == 20


def test_a_device_that_cannot_be_is_refused_even_where_nothing_is_computed(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    with pytest.raises(FeatxError, match="device is auto, cpu, cuda or cuda:N, not 'gpu'"):
        sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", device="gpu")


def test_a_fit_that_is_refused_leaves_no_run_in_the_way(tiny: Path, tmp_path: Path, everywhere: ColourEngine) -> None:
    from featx.fitting import fit
    from featx.runs import is_finished

    run = tmp_path / "run"
    for wrong in ({"Cs": 5}, {"strengths": [-1.0]}):
        with pytest.raises(HeadError):
            fit(tiny, "tiny", settings=wrong, cache=tmp_path / "cache", output=run)
        assert not run.exists()
    fitted = fit(tiny, "tiny", cache=tmp_path / "cache", output=run)
    assert is_finished(fitted.path)
    with pytest.raises(RunError, match="give another --output"):
        (tmp_path / "file").write_text("")
        fit(tiny, "tiny", cache=tmp_path / "cache", output=tmp_path / "file" / "run")


def test_a_split_that_is_not_there_and_other_kinds_of_labels_are_named(
    tiny: Path, tmp_path: Path, everywhere: ColourEngine
) -> None:
    from featx.fitting import fit
    from featx.measuring.evaluation import evaluate

    run = fit(tiny, "tiny", cache=tmp_path / "cache", output=tmp_path / "run")
    with pytest.raises(HeadError, match=r"the split 'vla'; there are train .*val .*Did you mean val"):
        evaluate(run.path, tiny, split="vla")
    table = tmp_path / "several.csv"
    rows = [f"{path},cold|warm" for path in sorted(tiny.rglob("*.png"))]
    table.write_text("\n".join(["path,label", *rows]))
    with pytest.raises(HeadError, match=r"fitted on one label for each image, and .* has several labels"):
        evaluate(run.path, table)
