"""A run's configuration and folder: what is written is read back, with the name it always had."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.errors import FeatxError, RunError
from featx.features import FeatureSpec
from featx.head import Head
from featx.pixels.preprocess import Preprocess
from featx.records import read_record, write_record
from featx.runs import EXPORTS, RunConfig, check, default_path, digest, finish, open_run, read_config, start
from featx.shipping.exporting import DEFAULT
from featx.shipping.reduction import PRECISIONS
from featx.sources.own import FIGURES

SPEC = FeatureSpec("torchvision/resnet18", "ab" * 32)
INFO = BackboneInfo(
    name="torchvision/resnet18",
    weights_digest="ab" * 32,
    layer="features",
    preprocess=Preprocess(),
    row_shape=(512,),
    class_names=("tench", "goldfish"),
    affine=True,
    parameters=11_689_512,
    weights_note="pretrained IMAGENET1K_V1",
)
CONFIG = RunConfig(
    featx="0.1.0",
    data="/data/photos",
    data_digest="cd" * 32,
    cache="/data/cache",
    request=BackboneRequest("resnet18", preprocess=(("resize", 232), ("mean", (0.5, 0.5, 0.5)))),
    backbone=INFO,
    spec=SPEC,
    views=2,
    head="logreg",
    settings={"folds": 3, "mapping": {"ä": "b"}},
    seed=7,
    class_names=["ants", "bees"],
    splits={"train": 4, "val": 2, "test": 0},
    digest="1424c61c35948c6c901b4e908bbc3bc31756d5839808407daa118c2e72387239",
)
EXTRACT = {"found": 2, "ignored": 0, "cached": 2, "extracted": 0, "duplicate": 0, "skipped": 0}
REPORT: dict[str, Any] = {
    **{"accuracy": None, "split": "val", "count": 0, "notes": [], "train_accuracy": 0.5},
    **{"fit": {"seconds": 0.1}, "extract": EXTRACT},
}
HEAD = Head(np.ones((2, 512), np.float32), np.zeros(2, np.float32), ("ants", "bees"))


def test_the_digest_of_a_configuration_is_pinned() -> None:
    """These were computed when a configuration was still a dictionary."""
    assert digest(CONFIG) == CONFIG.digest
    tuned = replace(CONFIG, finetune={"mode": "full", "epochs": 3})
    assert digest(tuned) == "322bd1c143329c834cec0fe3a2e80f90522be4005e27311934482dea62d9c3d0"
    assert default_path("export", CONFIG) == Path("export/photos-resnet18-logreg-1424c61c")


@pytest.mark.parametrize("changed", [{"data": "/moved"}, {"cache": "/moved"}, {"class_names": []}, {"featx": "9"}])
def test_where_the_data_lie_is_not_in_the_digest(changed: dict[str, str]) -> None:
    assert digest(replace(CONFIG, **changed)) == CONFIG.digest  # type: ignore[arg-type]


def test_a_finished_run_is_what_was_written(tmp_path: Path) -> None:
    report = REPORT
    start(tmp_path / "run", CONFIG)
    with pytest.raises(RunError, match=r"no report.json: the run is unfinished"):
        open_run(tmp_path / "run")
    run = finish(tmp_path / "run", HEAD, np.array([1, 2], np.uint64), report)
    again = open_run(tmp_path / "run")
    assert open_run(again) is again and repr(again) == repr(run) and len(repr(run)) < 200
    for found in (run, again):
        assert (found.config, found.report, found.request) == (CONFIG, report, CONFIG.request)
        assert np.array_equal(found.head.weight, HEAD.weight)
        assert found.trained_on is not None and found.trained_on.tolist() == [1, 2]


def test_a_full_disk_names_the_run_and_the_same_command_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    start(tmp_path / "run", CONFIG)
    arguments = tmp_path / "run", HEAD, np.array([1, 2], np.uint64), REPORT
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunError, match=r"run cannot be written \(No space left on device\); make room and run the"):
            finish(*arguments)
    start(tmp_path / "run", CONFIG)
    assert finish(*arguments).report == REPORT


def test_a_configuration_keeps_its_keys(tmp_path: Path) -> None:
    start(tmp_path, CONFIG)
    values = json.loads((tmp_path / "config.json").read_text())
    names = "featx data data_digest cache request backbone spec views head settings finetune seed class_names splits"
    assert list(values) == [*names.split(), "digest", "from_here", "format", "seal"]
    start(tmp_path, replace(CONFIG, base={"request": {}}), overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["base"] == {"request": {}}
    weights = read_config(tmp_path)[0].request.weights  # a fine-tuned network lies in its run
    assert weights == str(tmp_path / "model.safetensors")


def test_a_configuration_of_an_older_or_newer_featx_is_read(tmp_path: Path) -> None:
    values = CONFIG.to_dict() | {"added later": 1}
    for name in ("featx", "views", "seed", "finetune", "splits", "digest"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    older = read_config(tmp_path)[0]
    assert older == replace(CONFIG, featx="", views=0, seed=0, splits={}, digest="")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"head": None}, r"config.json is damaged \(.*`head`\)"),
        ({"spec": {"precision": "fp8"}}, r"config.json is damaged .*fit again into another --output"),
        ({"request": 3}, "config.json is damaged"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, harm: dict[str, object], message: str) -> None:
    values = {name: value for name, value in (CONFIG.to_dict() | harm).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FeatxError, match=message):
        read_config(tmp_path)[0]


def test_only_the_same_configuration_goes_on_in_an_unfinished_run(tmp_path: Path) -> None:
    start(tmp_path, CONFIG)
    check(tmp_path, CONFIG)
    with pytest.raises(RunError, match="unfinished run with another configuration"):
        check(tmp_path, replace(CONFIG, digest="00"))
    check(tmp_path, replace(CONFIG, digest="00"), overwrite=True)


def lying(folder: Path) -> set[str]:
    """The files and links under a folder, and the empty folders."""
    found = [p for p in folder.rglob("*") if p.is_symlink() or p.is_file() or not any(p.iterdir())]
    return {str(p.relative_to(folder)) for p in found}


def write(folder: Path, *names: str) -> set[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("somebody's")
    return set(names)


def test_an_exported_run_is_replaced_file_by_file_and_what_no_fit_writes_again_is_named(
    photo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photo_run, tmp_path / "my run")
    assert lying(folder) == {
        *("config.json", "head.safetensors", "trained-on.npy", "report.json"),
        *("model.onnx", "parity.json", "README.md"),
    }
    record, _ = read_record(folder / "parity.json")
    for name in ("head.onnx", "ship.onnx", "kept.onnx"):  # a record was lost; `export -o`; a user's own copy
        shutil.copy(folder / "model.onnx", folder / name)
    write_record(folder / "ship.parity.json", record | {"file": "ship.onnx"})
    write_record(folder / "kept.parity.json", record)
    write(folder, "curve.json", "report.html", "held-out-by-key.npy", *(f"plots/{name}.png" for name in FIGURES))
    mine = write(
        folder,
        *("disparity.json", "my.parity.json", "my.onnx", "model-int8.onnx", "model-int8.parity.json", "notes.md"),
        *("plots/my-figure.txt", "plots/holiday.png", "plots/best-0001.safetensors", "plots/old/map.png"),
        *("model.safetensors", "metrics.jsonl", "checkpoints/last.safetensors", "checkpoints/best-0003.safetensors"),
    )
    start(folder, open_run(folder).config, overwrite=True)
    assert lying(folder) == {"config.json", "kept.onnx", "kept.parity.json"} | mine
    assert {(folder / name).read_text() for name in mine} == {"somebody's"}
    assert capsys.readouterr().err == (
        "removed with the former run: curve.json, head.onnx, model.onnx, parity.json, ship.onnx, ship.parity.json, "
        f"README.md; export again with `featx export '{folder}'`\n"
    )
    start(folder, read_config(folder)[0], overwrite=True)
    assert lying(folder) == {"config.json", "kept.onnx", "kept.parity.json"} | mine
    assert capsys.readouterr().err == ""


def test_every_name_that_export_gives_a_file_is_known_as_one() -> None:
    reduced = {f"{Path(DEFAULT[taken]).stem}-{p}.onnx" for taken in ("pixels", "tensor") for p in PRECISIONS}
    assert set(EXPORTS) == {*DEFAULT.values()} | reduced


def test_a_fine_tuned_run_is_replaced_with_its_checkpoints_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = replace(CONFIG, finetune={"mode": "full"})
    for name in ("run", "other"):
        start(tmp_path / name, tuned)
        write(tmp_path / name, "model.safetensors", "metrics.jsonl", "checkpoints/last.safetensors")
        write(tmp_path / name, "checkpoints/best-0000.safetensors", "checkpoints/best-12345.safetensors")
    mine = write(tmp_path / "run", "checkpoints/best-of-all.safetensors", "checkpoints/map.png")
    for name in ("run", "other"):
        start(tmp_path / name, CONFIG, overwrite=True)
    assert lying(tmp_path / "run") == {"config.json"} | mine
    assert lying(tmp_path / "other") == {"config.json"}
    assert capsys.readouterr().err == "removed with the former run: metrics.jsonl, model.safetensors\n" * 2


def test_fine_tuning_does_not_replace_a_network_that_is_not_its_own(tmp_path: Path) -> None:
    start(tmp_path, CONFIG)
    finish(tmp_path, HEAD, np.array([1], np.uint64), REPORT)
    write(tmp_path, "model.safetensors")
    before = lying(tmp_path)
    with pytest.raises(RunError, match=r"model.safetensors was not written by featx, and fine-tuning would replace"):
        start(tmp_path, replace(CONFIG, finetune={"mode": "full"}), overwrite=True)
    assert lying(tmp_path) == before
    (tmp_path / "model.safetensors").unlink()
    start(tmp_path, replace(CONFIG, finetune={"mode": "full"}), overwrite=True)


def test_nothing_behind_a_link_is_removed(photo_run: Path, tmp_path: Path) -> None:
    """A link under a name of featx's goes; the file it names stays, and so does a link to a folder with all in it."""
    away, folder = shutil.copytree(photo_run, tmp_path / "away"), tmp_path / "run"
    write(away, "map.png", "last.safetensors", "curve.json")
    start(folder, replace(CONFIG, finetune={"mode": "full"}))
    before = lying(away)
    for name in ("report.json", "model.onnx", "parity.json", "README.md", "curve.json"):
        (folder / name).symlink_to(away / name)
    (folder / "metrics.jsonl").symlink_to(away / "nowhere")
    (folder / "plots").symlink_to(away)
    (folder / "checkpoints").symlink_to(away)
    (folder / "report.html").mkdir()
    (tmp_path / "linked").symlink_to(folder)
    start(tmp_path / "linked", CONFIG, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "plots", "checkpoints", "report.html"}
    assert lying(away) == before and (folder / "plots").is_symlink() and (tmp_path / "linked").is_symlink()
