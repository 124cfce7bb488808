"""The learning curve: subsets are what they should be, intervals and forecasts match known laws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ColourEngine, write_images
from PIL import Image

from featx import metrics
from featx.errors import FeatxError, HeadError, RunError
from featx.extraction.pipeline import sync
from featx.features import groups
from featx.fitting import fit
from featx.heads import logreg
from featx.measuring import curve
from featx.records import read_record
from featx.reporting.report import write_report
from featx.runs import Run, write_config
from featx.solvers.examples import Examples


@pytest.fixture
def run(tmp_path: Path, everywhere: ColourEngine) -> Run:
    data = tmp_path / "data"
    write_images(data / "train", 24, ("cold", "mild", "warm"))
    write_images(data / "val", 10, ("cold", "mild", "warm"), seed=1)
    rng = np.random.default_rng(0)
    for path in sorted(data.rglob("00[0-3].png")):  # some that no head can tell
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return fit(data, "colours", cache=tmp_path / "cache", output=tmp_path / "run")


def test_the_last_point_is_the_run_itself(run: Run, everywhere: ColourEngine):
    before = everywhere.images
    found = curve.learning_curve(run.path, repeats=3)
    assert everywhere.images == before
    assert [r.images for r in found.points] == [18, 36, 72]
    assert [r.subsets for r in found.points] == [3, 3, 1]
    last, stated = found.to_dict()["rows"][-1], run.report["intervals"]["accuracy"]
    assert (last["accuracy"], last["low"], last["high"]) == (run.report["accuracy"], stated["low"], stated["high"])
    assert 0 < last["accuracy"] < 1
    assert all(r.low <= r.accuracy <= r.high for r in found.points)
    assert curve.Curve.from_dict(read_record(run.path / "curve.json")[0]) == found
    assert curve.learning_curve(run.path, repeats=3) == found
    assert found.verdict in found.text()


def test_heads_choose_by_the_centre_crops_as_the_runs_own_did(tmp_path: Path, everywhere: ColourEngine):
    # what tells the classes lies in the middle, so that most views show nothing of it
    rng, data = np.random.default_rng(3), tmp_path / "data"
    for split, count in (("train", 16), ("val", 40)):
        for number, name in enumerate(("cold", "mild", "warm")):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 140, (40, 48, 3), dtype=np.uint8)
                pixels[14:26, 18:30] += np.uint8(12 * number)
                Image.fromarray(pixels).save(data / split / name / f"{i}.png")
    run = fit(data, "colours", cache=tmp_path / "cache", output=tmp_path / "run", views=3, gain=False)
    (row,) = curve.learning_curve(run, sizes=[48], repeats=1).points
    assert row.accuracy == run.report["accuracy"]

    extraction = sync(data, "colours", cache=tmp_path / "cache", views=3)
    features = extraction.features()
    train, held = features.split("train"), features.split("val")
    views = Examples.of_views(extraction.views(train.keys), train.y, groups(train.keys))
    other = logreg.fit(replace(views, scored=None), features.class_names).head(held.X)
    assert abs((other.argmax(axis=1) == held.y).mean() - row.accuracy) > 0.01  # the test can tell


def test_the_report_shows_it(run: Run):
    curve.learning_curve(run.path, sizes=[12, 72], repeats=2)
    text = write_report(run.path, layout="pca").read_text()
    assert "Would more photographs help?" in text
    assert "No forecast from 2 sizes" in text
    assert (run.path / "plots" / "learning.png").is_file()


def test_sizes_and_runs_that_give_no_curve_are_refused(run: Run, tmp_path: Path):
    with pytest.raises(HeadError, match="72 training images"):
        curve.learning_curve(run.path, sizes=[10, 100])
    with pytest.raises(FeatxError, match="repeats is a whole number from 1, not 0"):
        curve.learning_curve(run.path, repeats=0)
    write_config(run.path, replace(run.config, head="pretrained"))
    with pytest.raises(HeadError, match="learns nothing"):
        curve.learning_curve(run.path)
    write_config(run.path, run.config)
    next((tmp_path / "data" / "train" / "cold").iterdir()).unlink()
    with pytest.raises(RunError, match="changed"):
        curve.learning_curve(run.path)


def test_sizes_halve_down_to_four_a_class():
    assert curve.default_sizes(244, 2) == [8, 15, 30, 61, 122, 244]
    assert curve.default_sizes(10, 5) == [10]
    assert len(curve.default_sizes(10**6, 10)) == curve.MAX_SIZES


def test_every_beginning_is_stratified_and_keeps_duplicates_together():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    group = np.arange(100)
    group[1::2] = group[::2]  # pairs
    order = curve.nested_order(y, group, seed=0)
    assert sorted(order) == list(range(100))
    assert sorted(np.bincount(y[order[:12]], minlength=3)) == [4, 4, 4]  # two groups of each class
    share = np.bincount(y[order[:50]], minlength=3) / 50
    np.testing.assert_allclose(share, [0.6, 0.3, 0.1], atol=0.07)
    for label in range(3):
        mine = group[order[y[order] == label]]
        assert (mine[::2] == mine[1::2]).all()
    assert not np.array_equal(order, curve.nested_order(y, group, seed=1))
    several = np.eye(3, dtype=int)[y]
    assert sorted(curve.nested_order(several, group, seed=0)) == list(range(100))


def samples(accuracy: np.ndarray, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return accuracy[:, None] + noise * rng.normal(size=(len(accuracy), 1000))


def test_a_power_law_is_forecast():
    n = np.array([25, 50, 100, 200, 400])
    accuracy = 1 - 1.2 * n**-0.4
    forecast, verdict = curve.extrapolate(n, accuracy, samples(accuracy, 0.005))
    assert forecast is not None
    assert forecast.images == 800
    assert forecast.accuracy == pytest.approx(1 - 1.2 * 800**-0.4, abs=1e-9)
    assert forecast.exponent == pytest.approx(0.4)
    assert forecast.low < forecast.accuracy < forecast.high
    assert "800 training images would give" in verdict


def test_a_curve_that_flattens_gets_no_forecast_or_a_flat_one():
    n = np.array([25, 50, 100, 200, 400])
    bent = 0.9 - 3.0 * n**-1.2
    forecast, verdict = curve.extrapolate(n, bent, samples(bent, 0.002))
    assert forecast is None
    assert "power law through the smaller sizes" in verdict
    flat = np.full(5, 0.8)
    forecast, verdict = curve.extrapolate(n, flat, samples(flat, 0.01))
    assert forecast is not None
    assert "flat within its error" in verdict


def test_few_sizes_or_no_errors_give_no_forecast():
    n = np.array([25, 50, 100, 200])
    assert curve.extrapolate(n[:3], n[:3] / 300, samples(n[:3] / 300, 0.01))[0] is None
    perfect = np.array([0.9, 0.95, 1.0, 1.0])
    forecast, verdict = curve.extrapolate(n, perfect, samples(perfect, 0.01))
    assert forecast is None
    assert "no error left" in verdict


def test_an_interval_of_subsets_is_no_narrower_than_independent_answers_allow():
    right = np.tile([[1, 0], [0, 1]], (1, 20))  # each image is right in one subset: no image seems harder
    (row,), _, _ = curve.summarise([100], [right])
    assert (row.low, row.high) == pytest.approx(metrics.wilson(40, 80))


def test_intervals_hold_both_images_and_subsets():
    rng = np.random.default_rng(0)
    hard = rng.random(2000)  # each image's chance, shared by all subsets
    right = (rng.random((5, 2000)) < hard).astype(float)
    (row,), _, _ = curve.summarise([100], [right])
    images = right.mean(axis=0).std() / 2000**0.5
    assert row.accuracy == pytest.approx(right.mean())
    assert (row.high - row.low) / (2 * 1.96 * images) == pytest.approx(1.2, abs=0.25)
    shifted = right.copy()
    shifted[0] = 0  # one subset that learned nothing
    (wide,), _, _ = curve.summarise([100], [shifted])
    assert wide.high - wide.low > 3 * (row.high - row.low)
    assert wide.spread == pytest.approx(shifted.mean(axis=1).std(ddof=1))
