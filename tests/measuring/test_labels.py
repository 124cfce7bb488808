"""Images without a label, images in two splits, and runs that are replaced: what `fit` and `evaluate` do with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ColourEngine, write_images

from featx.errors import FeatxError, HeadError, ImageError, RunError, SourceError, TrainingError
from featx.extraction.keys import content_keys
from featx.extraction.pipeline import extract
from featx.finetuning.recipes import FinetuneConfig
from featx.fitting import fit
from featx.measuring.evaluation import evaluate
from featx.reporting.report import write_report
from featx.runs import Run, is_finished, open_run
from featx.sources.opening import open_source


@pytest.fixture
def split(tmp_path: Path, everywhere: ColourEngine) -> Path:
    """`train` and `valid` with class folders, `test` without; 12, 6 and 4 images."""
    root = tmp_path / "split"
    write_images(root / "train", per_class=6)
    write_images(root / "valid", per_class=3, seed=1)
    for path in sorted(write_images(tmp_path / "more", per_class=2, seed=2).rglob("*.png")):
        (root / "test").mkdir(exist_ok=True)
        path.rename(root / "test" / f"{path.parent.name}{path.name}")
    return root


def fitted(data: Path, tmp_path: Path, name: str = "run", **options: Any) -> Run:
    return fit(data, "tiny", cache=tmp_path / "cache", output=tmp_path / name, **options)


def rows_of(data: Path) -> list[dict[str, Any]]:
    """A row of a manifest for each image of `split`."""
    names = {"train": "train", "valid": "val", "test": "test"}
    found = []
    for path in sorted(data.rglob("*.png")):
        parts = path.relative_to(data).parts
        label = parts[1] if len(parts) == 3 else None
        found.append({"path": str(path), "label": label, "split": names[parts[0]]})
    return found


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_split_without_class_folders_takes_part_in_nothing(split: Path, tmp_path: Path) -> None:
    features = extract(split, "tiny", cache=tmp_path / "cache")
    assert features.splits.tolist() == [""] * 4 + ["train"] * 12 + ["val"] * 6
    assert features.labelled.tolist() == [False] * 4 + [True] * 18
    assert features.report.notes[-1] == "4 images have a split and no label, and take part in none"
    run = fitted(split, tmp_path)
    assert run.report["count"] == 6 and "test" not in run.report and run.config.splits["test"] == 0
    assert (run.path / "report.json").is_file()
    assert write_report(run, layout="pca").is_file()


@pytest.mark.parametrize("several", [False, True])
def test_an_empty_label_is_neither_trained_on_nor_measured(several: bool, split: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(split) if row["label"]]
    for row in rows:
        row["label"] = [row["label"], "all"] if several else row["label"]
    for i in (0, 1, 13):  # two of train, one of val
        rows[i]["label"] = None
    data = manifest(tmp_path / "list.jsonl", rows)
    run = fitted(data, tmp_path)
    assert run.config.splits == {"train": 10, "val": 5, "test": 0}
    assert run.report["count"] == 5
    if several:  # that every image is "all" teaches nothing
        assert run.report["notes"] == ["the head never learned 'all', which are not measured"]
    assert evaluate(run, data).count == 15
    features = extract(data, "tiny", cache=tmp_path / "cache")
    assert (features.y < 0).reshape(18, -1).all(axis=1).nonzero()[0].tolist() == [0, 1, 13]


def test_that_no_class_applies_is_learned_and_measured(split: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(split) if row["label"]]
    for row in rows:
        row["label"] = [] if row["label"] == "warm" else ["cold"]
    run = fitted(manifest(tmp_path / "list.jsonl", rows), tmp_path)
    assert run.head.class_names == ("cold",) and run.head.weight.shape == (1, 48)
    assert run.config.splits == {"train": 12, "val": 6, "test": 0}
    assert run.report["count"] == 6 and run.report["per_class"][0]["support"] == 3


def test_validation_images_that_are_trained_on_are_counted_and_said(split: Path, tmp_path: Path) -> None:
    assert fitted(split, tmp_path, "before").report["notes"] == []
    for i in range(2):
        shutil.copy(split / "train" / "cold" / f"00{i}.png", split / "valid" / "cold" / f"copy{i}.png")
    (note,) = fitted(split, tmp_path).report["notes"]
    assert note.startswith("2 of 8 val images are training images too, byte for byte")


def test_evaluating_on_what_was_trained_on_is_said(split: Path, tmp_path: Path) -> None:
    run = fitted(split, tmp_path)
    (note,) = evaluate(run, split).notes
    assert note.startswith("12 of 18 images are images that the run was trained on")
    assert evaluate(run, split, split="val").notes == []
    assert len(open_run(run.path).trained_on) == 12


def test_skipped_images_are_part_of_an_evaluation(split: Path, tmp_path: Path) -> None:
    run = fitted(split, tmp_path)
    other = write_images(tmp_path / "other", per_class=3, seed=9)
    (other / "cold" / "broken.png").write_bytes(b"broken")
    report = evaluate(run, other)
    assert report.count == 6 and report.skipped == 1
    assert report.notes[0].startswith("1 images could not be read and are left out, the first: cold/broken.png:")


def lying(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_overwrite_replaces_runs_of_featx_and_nothing_else(split: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    other.mkdir()
    for config in ('{"model_type": "bert"}', "{}", "[1]", "not json"):
        (other / "config.json").write_text(config)
        (other / "weights.bin").write_bytes(b"precious")
        with pytest.raises(RunError, match="is not a run of featx"):
            fitted(split, tmp_path, "model", overwrite=True)
        assert lying(other) == {"config.json": config.encode(), "weights.bin": b"precious"}
    run = fitted(split, tmp_path)
    for name in ("notes.md", "README.md", "mine.onnx", "model.onnx", "parity.json"):
        (run.path / name).write_text("mine")
    (run.path / "curve.json").write_text("of the former head")
    again = fitted(split, tmp_path, overwrite=True, settings={"strengths": [0.1]})
    assert again.config.settings == {"strengths": [0.1]}
    assert set(lying(run.path)) == {
        *("config.json", "report.json", "head.safetensors", "trained-on.npy"),
        *("notes.md", "README.md", "mine.onnx", "model.onnx", "parity.json"),
    }


@pytest.mark.parametrize("options", [{"settings": {"class_weight": "foo"}}, {"settings": {"threshold": 2}}])
def test_a_run_that_cannot_be_replaced_stays_whole(options: dict[str, Any], split: Path, tmp_path: Path) -> None:
    run = fitted(split, tmp_path)
    before = lying(run.path)
    with pytest.raises(HeadError):
        fitted(split, tmp_path, overwrite=True, **options)
    assert lying(run.path) == before


def test_what_an_older_run_was_trained_on_is_not_known(split: Path, tmp_path: Path) -> None:
    run = fitted(split, tmp_path)
    assert run.trained_on is not None and len(run.trained_on) == 12
    (run.path / "trained-on.npy").unlink()
    older = open_run(run.path)
    assert older.trained_on is None and len(evaluate(older, split).notes) == 0  # as of a run that an older featx made


def test_a_run_that_was_copied_takes_no_other_projects_data(split: Path, tmp_path: Path) -> None:
    run = fit(split, "tiny", cache=tmp_path / "cache", output=tmp_path / "export" / "run")
    other = tmp_path / "other"
    shutil.copytree(run.path, other / "export" / "run")
    write_images(other / "split" / "train")
    shutil.rmtree(split)
    shutil.rmtree(tmp_path / "cache")
    assert open_run(other / "export" / "run").config == run.config  # it has photographs there, and no cache


def test_a_refused_fit_leaves_no_run_behind(split: Path, tmp_path: Path) -> None:
    rows = [row | {"label": [row["label"]]} for row in rows_of(split) if row["label"]]
    data = manifest(tmp_path / "list.jsonl", rows)
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingError, match="one label per image"):
        fitted(data, tmp_path, finetune=FinetuneConfig(mode="full", epochs=1))
    with pytest.raises(HeadError):
        fitted(data, tmp_path, settings={"class_weight": "foo"})
    assert lying(tmp_path / "run") == {}
    assert is_finished(fitted(data, tmp_path).path)


def test_a_run_in_the_working_folder_can_be_replaced(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fitted(split, tmp_path)
    monkeypatch.chdir(run.path)
    again = fit(split, "tiny", cache=tmp_path / "cache", output=".", overwrite=True)
    assert is_finished(again.path) and set(lying(run.path)) >= {"config.json", "report.json"}


def test_a_project_that_moved_as_a_whole_is_found_from_its_run(split: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    data, cache = Path(shutil.move(split, tmp_path / "before" / "photos")), tmp_path / "before" / "cache"
    run = fit(data, "tiny", cache=cache, output=tmp_path / "before" / "export" / "run")
    before = run.config
    assert before.data == str(data) and before.cache == str(cache)
    project = (tmp_path / "before").rename(tmp_path / "after" / "project")
    moved = {"data": str(project / "photos"), "cache": str(project / "cache")}
    assert open_run(project / "export" / "run").config == replace(before, **moved)


def test_rows_of_files_that_cannot_be_read_now_are_not_dropped(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(open_source(split))
    plain = kind.read

    def read(self: Any, row: int) -> bytes:
        if self.ids[row] == "test/cold000.png":
            raise ImageError("permission denied")
        return plain(self, row)

    monkeypatch.setattr(kind, "read", read)
    assert len(content_keys(split, tmp_path / "cache")) == 21
    with pytest.raises(SourceError, match=r"test/cold000.png cannot be read now"):
        content_keys(split, tmp_path / "cache", whole=True)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"views": -2}, {"workers": 0}, {"batch_size": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int], split: Path, tmp_path: Path) -> None:
    (name,) = wrong
    with pytest.raises(FeatxError, match=f"{name} is [01] or more"):
        extract(split, "tiny", cache=tmp_path / "cache", **wrong)
