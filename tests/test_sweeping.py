"""A sweep extracts once, fits each point once, and chooses on training images alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images
from PIL import Image

from featx.backbones.request import BackboneRequest
from featx.errors import BackboneError, FeatxError, HeadError, RunError
from featx.learning import head_text, parse_head
from featx.measuring.evaluation import evaluate
from featx.records import read_record
from featx.reporting.comparison import write
from featx.sweeping import Sweep, sweep


class CountingEngine(ColourEngine):
    """Counts the images that are extracted, without those that its speed is measured on."""

    def __init__(self) -> None:
        super().__init__()
        self.extracted = 0

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        self.extracted += len(images)
        return super().submit(images)


def draw(root: Path) -> Path:
    write_images(root / "train", 12)
    write_images(root / "val", 6, seed=1)
    rng = np.random.default_rng(0)
    for path in sorted((root / "train").rglob("00[0-2].png")):  # some that no head can tell
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a sweep without torch, on one backbone. Tests that write elsewhere give another `output`."""
    root = tmp_path_factory.mktemp("sweep")
    return {
        "data": draw(root / "data"),
        "backbones": [COLOURS],
        "heads": ["logreg", "logreg folds=3"],
        "views": [0, 2],
        "cache": root / "cache",
        "output": root / "sweep",
        "engine": CountingEngine(),
    }


@pytest.fixture(scope="module")
def swept(grid: dict[str, Any]) -> Sweep:
    return sweep(**grid)


def test_each_image_is_extracted_once_and_each_point_is_a_run(grid: dict[str, Any], swept: Sweep) -> None:
    assert grid["engine"].extracted == 36 * 3
    assert len(swept.points) == 4
    assert {(p.head, p.views) for p in swept.points} == {(head, views) for head in grid["heads"] for views in (0, 2)}
    for point in swept.points:
        folder = swept.path / point.run
        report = json.loads((folder / "report.json").read_text())
        assert point.accuracy == report["accuracy"]
        assert point.images_per_second > 0
        assert point.megabytes == pytest.approx((folder / "head.safetensors").stat().st_size / 1e6, abs=1e-3)
    assert len({p.images_per_second for p in swept.points}) == 1  # heads on one backbone share its speed


def test_the_winner_is_the_best_of_held_out_training_images_and_a_run_like_any(
    grid: dict[str, Any], swept: Sweep, tmp_path: Path
) -> None:
    ranks = [(-p.cross_validated.accuracy, p.cross_validated.log_loss) for p in swept.points]
    assert ranks == sorted(ranks)
    for point in swept.points:
        right, loss = np.load(swept.path / point.run / "held-out-by-key.npy")
        assert len(right) == 24 == point.cross_validated.images
        assert point.cross_validated.accuracy == right.mean()
        assert point.cross_validated.log_loss == pytest.approx(loss.mean())
    assert swept.winner.path == swept.path / swept.points[0].run
    again = evaluate(swept.winner, grid["data"], split="val", engine=ColourEngine())
    assert again.accuracy == swept.points[0].accuracy
    other = shutil.copytree(swept.path, tmp_path / "other")
    losses = [p.cross_validated.log_loss for p in sweep(**grid | {"output": other, "by": "log_loss"}).points]
    assert losses == sorted(losses)


def test_relabelled_validation_images_change_no_choice(grid: dict[str, Any], swept: Sweep, tmp_path: Path) -> None:
    data = shutil.copytree(grid["data"], tmp_path / "data")
    (data / "val" / "cold").rename(data / "val" / "aside")
    (data / "val" / "warm").rename(data / "val" / "cold")
    (data / "val" / "aside").rename(data / "val" / "warm")
    second = sweep(**grid | {"data": data, "output": tmp_path / "other"})
    assert [(p.head, p.views) for p in swept.points] == [(p.head, p.views) for p in second.points]
    assert [p.cross_validated for p in swept.points] == [p.cross_validated for p in second.points]
    assert swept.points[0].accuracy != second.points[0].accuracy


def test_a_second_sweep_fits_and_measures_nothing(grid: dict[str, Any], swept: Sweep) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (swept.path / "runs").rglob("*")}

    before, engine = written(), ColourEngine()
    assert sweep(**grid | {"engine": engine}).points == swept.points
    assert written() == before and engine.images == 0


def test_what_was_found_is_written_for_people_and_programs(swept: Sweep) -> None:
    values, _ = read_record(swept.path / "sweep.json")
    assert values == {"by": "accuracy", "winner": swept.points[0].run} | swept.to_dict()
    with open(swept.path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == [p.name for p in swept.points]
    assert [float(r["cross_validated_accuracy"]) for r in rows] == [p.cross_validated.accuracy for p in swept.points]
    text = swept.text()
    assert text.count("colours") >= 4
    assert "Validation images were not used to pick the winner." in text
    write(swept)
    page = (swept.path / "sweep.html").read_text()
    assert f'href="{swept.points[0].run}/report.html"' in page
    assert str(swept.path.parent) not in page
    with Image.open(swept.path / "plots" / "trade-off.png") as image:
        assert image.width > 1000


def test_a_point_that_fails_is_named_and_the_others_go_on(grid: dict[str, Any], tmp_path: Path) -> None:
    found = sweep(**grid | {"heads": ["pretrained", "ncm"], "views": [0], "output": tmp_path / "sweep"})
    assert [point.head for point in found.points] == ["ncm"]
    (failed,) = found.failed
    assert failed["point"] == "custom/colours/features pretrained 0 views" and "is not a factory" in failed["error"]
    assert "failed: custom/colours" in found.text()
    sounds = BackboneRequest("squeezenet1_1", weights="random", preprocess=(("pitch", 440),))
    with pytest.raises(FeatxError, match=r"no point of the sweep could be fitted.*squeezenet1_1.*pitch"):
        sweep(**grid | {"backbones": [sounds], "engine": None, "output": tmp_path / "none"})


def test_a_wrong_grid_is_refused_before_anything_runs(grid: dict[str, Any], tmp_path: Path) -> None:
    engine = ColourEngine()
    grid = grid | {"engine": engine, "output": tmp_path / "new"}
    with pytest.raises(HeadError, match="logreg"):
        sweep(**grid | {"heads": ["logregg"]})
    with pytest.raises(BackboneError, match=r"no classification network 'squeezenet1_2'.*squeezenet1_1"):
        sweep(**grid | {"backbones": [COLOURS, "squeezenet1_2"]})
    with pytest.raises(FeatxError, match="one engine runs one backbone and layer, and the grid has 2"):
        sweep(**grid | {"backbones": [COLOURS, "squeezenet1_1"]})
    with pytest.raises(FeatxError, match="accuracy or log_loss"):
        sweep(**grid, by="luck")
    with pytest.raises(FeatxError, match="at least one"):
        sweep(**grid | {"views": []})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not overwrite")
    (tmp_path / "bayes").mkdir()
    (tmp_path / "bayes" / "sweep.json").write_text('{"method": "bayes", "parameters": {}}')
    (tmp_path / "runs").write_text("a file")
    for name in ("mine", "bayes", "runs"):
        with pytest.raises(RunError, match=f"{name} exists and is not a sweep; give another --output"):
            sweep(**grid | {"output": tmp_path / name})
    assert [path.name for path in (tmp_path / "bayes").iterdir()] == ["sweep.json"]
    assert engine.images == 0 and not (tmp_path / "new").exists()


def test_a_sweep_of_other_data_is_not_replaced(grid: dict[str, Any], swept: Sweep, tmp_path: Path) -> None:
    """Two data sets may have folders of one name; the first one's table, page and runs stay as they are."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in swept.path.rglob("*") if path.is_file()}

    other, engine, before = shutil.copytree(grid["data"], tmp_path / "data"), ColourEngine(), content()
    with pytest.raises(RunError, match=f"holds a sweep of {grid['data']}, and this one is of {other}; give another"):
        sweep(**grid | {"data": other, "engine": engine})
    assert content() == before and engine.images == 0


def test_folders_with_dots_in_their_names_have_sweeps_of_their_own(
    grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("v1.0", "v1.1"):
        shutil.copytree(grid["data"], tmp_path / name)
        found = sweep(**grid | {"data": name, "output": None, "heads": ["ncm"], "views": [0]})
        assert found.path == Path(f"export/{name}-sweep")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(grid["data"], tmp_path / "elsewhere" / "v1.0")
    with pytest.raises(RunError, match=rf"holds a sweep of {tmp_path}/v1.0, and this one is of .*/elsewhere/v1.0"):
        sweep(**grid | {"data": "elsewhere/v1.0", "output": None, "heads": ["ncm"], "views": [0]})
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["v1.0-sweep", "v1.1-sweep"]


def test_a_sweep_goes_on_in_its_folder_with_more_images_after_a_move_and_after_an_interruption(
    grid: dict[str, Any], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    chosen = grid | {"data": shutil.copytree(grid["data"], project / "data"), "heads": ["ncm"], "views": [0]}
    chosen |= {"output": project / "sweep", "cache": project / "cache"}
    first = sweep(**chosen)
    (project / "sweep" / "mine.txt").write_text("mine")
    write_images(project / "data" / "train" / "more", 2, seed=5)
    (project / "data" / "train" / "more" / "cold").rename(project / "data" / "train" / "cold" / "more")
    shutil.rmtree(project / "data" / "train" / "more")
    second = sweep(**chosen)
    assert second.points[0].name != first.points[0].name  # another fit, beside the first
    names = {first.points[0].name, second.points[0].name}
    assert {path.name for path in (project / "sweep" / "runs").iterdir()} == names
    assert {path.name for path in (project / "sweep").iterdir()} == {"sweep.json", "sweep.csv", "runs", "mine.txt"}

    moved = project.rename(tmp_path / "moved")
    chosen |= {"data": moved / "data", "output": moved / "sweep", "cache": moved / "cache"}
    assert sweep(**chosen).points == second.points
    for name in ("sweep.json", "sweep.csv", "mine.txt"):  # as where it was interrupted at the first point
        (moved / "sweep" / name).unlink()
    assert sweep(**chosen).points[0].name == second.points[0].name


def test_a_head_is_written_with_its_settings() -> None:
    name, settings = parse_head('linear epochs=30 "recipe=a b" standardise=false')
    assert (name, settings) == ("linear", {"epochs": 30, "recipe": "a b", "standardise": False})
    balanced = {"folds": 3, "class_weight": "balanced"}
    assert parse_head(head_text("logreg", balanced)) == ("logreg", balanced)
    assert parse_head(head_text(name, settings)) == (name, settings)
    for text in ("", "logreg folds", 'logreg "folds=3', "logreg fold=3"):
        with pytest.raises(HeadError):
            parse_head(text)


def test_features_beyond_the_memory_given_are_read_by_slices(grid: dict[str, Any], tmp_path: Path) -> None:
    chosen = grid | {"heads": ["ncm"], "views": [2]}
    held = sweep(**chosen | {"output": tmp_path / "held"})
    sliced = sweep(**chosen | {"output": tmp_path / "sliced", "memory": 100.0})
    found, expected = (asdict(swept.points[0].cross_validated) for swept in (sliced, held))
    assert found == pytest.approx(expected, rel=1e-5)  # sums in another order
    with pytest.raises(FeatxError, match="--head linear holds the features in memory"):
        sweep(**chosen | {"heads": ["linear epochs=1"], "output": tmp_path / "linear", "memory": 100.0})
