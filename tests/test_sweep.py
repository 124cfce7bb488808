"""A sweep extracts once, fits each point once, and chooses on training images alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ColourEngine, write_images
from PIL import Image

from featx import sweeping as module
from featx.backbones.request import BackboneRequest
from featx.errors import BackboneError, ExportError, FeatxError, HeadError, RunError
from featx.measuring.evaluation import evaluate
from featx.reporting.comparison import write
from featx.sweeping import head_text, parse_head, sweep


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = write_images(tmp_path / "data" / "train", 12)
    write_images(tmp_path / "data" / "val", 6, seed=1)
    rng = np.random.default_rng(0)
    for path in sorted(root.rglob("00[0-2].png")):  # some that no head can tell
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def grid(data: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a sweep without torch, on one backbone."""

    def no_export(*args: Any) -> Path:
        raise ExportError("colours cannot be exported")

    monkeypatch.setattr(module, "open_engine", lambda *a, **k: ColourEngine())
    monkeypatch.setattr(module, "backbone_onnx", no_export)
    monkeypatch.setattr(module, "SPEED_SECONDS", 0.01)
    monkeypatch.setattr(module, "names", lambda: ["colours", "sounds"])
    return {
        "data": data,
        "backbones": ["colours"],
        "heads": ["logreg", "logreg folds=3"],
        "views": [0, 2],
        "cache": tmp_path / "cache",
        "output": tmp_path / "sweep",
    }


def test_each_image_is_extracted_once_and_each_point_is_a_run(grid: dict[str, Any], engine: ColourEngine):
    found = sweep(**grid)
    assert engine.images == 36 * 3
    assert len(found.points) == 4
    assert {(p.head, p.views) for p in found.points} == {
        (head, views) for head in ("logreg", "logreg folds=3") for views in (0, 2)
    }
    for point in found.points:
        report = json.loads((found.path / point.run / "report.json").read_text())
        assert point.accuracy == report["accuracy"]
        assert point.images_per_second > 0
        assert point.megabytes == pytest.approx(
            (found.path / point.run / "head.safetensors").stat().st_size / 1e6, abs=1e-3
        )
    assert len({p.images_per_second for p in found.points}) == 1  # heads on one backbone share its speed


def test_the_winner_is_the_best_of_held_out_training_images_and_a_run_like_any(grid: dict[str, Any], data: Path):
    found = sweep(**grid)
    ranks = [(-p.cross_validated.accuracy, p.cross_validated.log_loss) for p in found.points]
    assert ranks == sorted(ranks)
    for point in found.points:
        right, loss = np.load(found.path / point.run / "held-out-by-key.npy")
        assert len(right) == 24 == point.cross_validated.images
        assert point.cross_validated.accuracy == right.mean()
        assert point.cross_validated.log_loss == pytest.approx(loss.mean())
    assert found.winner.path == found.path / found.points[0].run
    again = evaluate(found.winner.path, data, split="val")
    assert again.accuracy == found.points[0].accuracy
    by_loss = sweep(**grid, by="log_loss").points
    losses = [p.cross_validated.log_loss for p in by_loss]
    assert losses == sorted(losses)


def test_relabelled_validation_images_change_no_choice(grid: dict[str, Any], data: Path, tmp_path: Path):
    first = sweep(**grid)
    cold, warm = data / "val" / "cold", data / "val" / "warm"
    cold.rename(data / "val" / "aside")
    warm.rename(cold)
    (data / "val" / "aside").rename(warm)
    second = sweep(**{**grid, "output": tmp_path / "other"})
    assert [(p.head, p.views) for p in first.points] == [(p.head, p.views) for p in second.points]
    assert [p.cross_validated for p in first.points] == [p.cross_validated for p in second.points]
    assert first.points[0].accuracy != second.points[0].accuracy


def test_a_second_sweep_fits_nothing(grid: dict[str, Any], engine: ColourEngine, monkeypatch: pytest.MonkeyPatch):
    first = sweep(**grid)
    before = engine.images
    for name in ("fit", "_speed"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("fitted or measured again"))
    monkeypatch.setattr(module, "held_out", lambda *a, **k: pytest.fail("cross-validated again"))
    assert sweep(**grid).points == first.points
    assert engine.images == before


def test_what_was_found_is_written_for_people_and_programs(grid: dict[str, Any]):
    found = sweep(**grid)
    values = json.loads((found.path / "sweep.json").read_text())
    assert values["winner"] == found.points[0].run
    assert {**values, "winner": None} == {**found.to_dict(), "winner": None}
    with open(found.path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [p.name for p in found.points]
    assert [float(r["cross_validated_accuracy"]) for r in rows] == [p.cross_validated.accuracy for p in found.points]
    text = found.text()
    assert text.count("colours") >= 4
    assert "Validation images were not used to pick the winner." in text
    write(found)
    page = (found.path / "sweep.html").read_text()
    assert f'href="{found.points[0].run}/report.html"' in page
    assert str(found.path.parent) not in page
    with Image.open(found.path / "plots" / "trade-off.png") as image:
        assert image.width > 1000


def test_a_point_that_fails_is_named_and_the_others_go_on(grid: dict[str, Any], engine: ColourEngine):
    sounds = BackboneRequest("sounds", preprocess=(("pitch", 440),))
    found = sweep(**{**grid, "backbones": [sounds, "colours"], "views": [0]})
    assert len(found.points) == 2
    assert len(found.failed) == 2
    assert all("sounds" in f["point"] and "pitch" in f["error"] for f in found.failed)
    assert "failed: custom/sounds" in found.text() or "failed: sounds" in found.text()
    with pytest.raises(FeatxError, match="no point of the sweep could be fitted"):
        sweep(**{**grid, "backbones": [sounds], "output": found.path.parent / "none"})


def test_a_wrong_grid_is_refused_before_anything_runs(grid: dict[str, Any], engine: ColourEngine, tmp_path: Path):
    with pytest.raises(HeadError, match="logreg"):
        sweep(**{**grid, "heads": ["logregg"]})
    with pytest.raises(BackboneError, match=r"no classification network 'squeezenet1_2'.*squeezenet1_1"):
        sweep(**{**grid, "backbones": ["colours", "squeezenet1_2"]})
    with pytest.raises(FeatxError, match="accuracy or log_loss"):
        sweep(**grid, by="luck")
    with pytest.raises(FeatxError, match="at least one"):
        sweep(**{**grid, "views": []})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not overwrite")
    with pytest.raises(RunError, match="no sweep"):
        sweep(**{**grid, "output": tmp_path / "mine"})
    assert engine.images == 0


def test_a_head_is_written_with_its_settings():
    name, settings = parse_head('linear epochs=30 recipe=tutorial "notes=a b" standardise=false')
    assert (name, settings) == ("linear", {"epochs": 30, "recipe": "tutorial", "notes": "a b", "standardise": False})
    assert parse_head(head_text("logreg", {"folds": 3, "class_weight": "balanced"})) == (
        "logreg",
        {"folds": 3, "class_weight": "balanced"},
    )
    assert parse_head(head_text(name, settings)) == (name, settings)
    for text in ("", "logreg folds", 'logreg "folds=3'):
        with pytest.raises(HeadError):
            parse_head(text)


def test_features_beyond_the_memory_given_are_read_by_slices(grid: dict[str, Any], tmp_path: Path):
    chosen = {**grid, "heads": ["ncm"], "views": [2]}
    held, sliced = sweep(**chosen), sweep(**{**chosen, "output": tmp_path / "sliced"}, memory=100.0)
    assert sliced.points[0].cross_validated.accuracy == held.points[0].cross_validated.accuracy
    with pytest.raises(FeatxError, match="--head linear holds the features in memory"):
        sweep(**{**chosen, "heads": ["linear epochs=1"], "output": tmp_path / "linear"}, memory=100.0)
