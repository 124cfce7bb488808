"""A run's configuration and folder: what is written is read back, with the name it always had."""

from __future__ import annotations

import json
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
from featx.runs import RunConfig, check, default_path, digest, finish, open_run, read_config, start

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


def test_a_configuration_keeps_its_keys(tmp_path: Path) -> None:
    start(tmp_path, CONFIG)
    values = json.loads((tmp_path / "config.json").read_text())
    names = "featx data data_digest cache request backbone spec views head settings finetune seed class_names splits"
    assert list(values) == [*names.split(), "digest", "from_here", "format", "seal"]
    start(tmp_path, replace(CONFIG, base={"request": {}}), overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["base"] == {"request": {}}
    weights = read_config(tmp_path).request.weights  # a fine-tuned network lies in its run
    assert weights == str(tmp_path / "model.safetensors")


def test_a_configuration_of_an_older_or_newer_featx_is_read(tmp_path: Path) -> None:
    values = CONFIG.to_dict() | {"added later": 1}
    for name in ("featx", "views", "seed", "finetune", "splits", "digest"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    older = read_config(tmp_path)
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
        read_config(tmp_path)


def test_only_the_same_configuration_goes_on_in_an_unfinished_run(tmp_path: Path) -> None:
    start(tmp_path, CONFIG)
    check(tmp_path, CONFIG)
    with pytest.raises(RunError, match="unfinished run with another configuration"):
        check(tmp_path, replace(CONFIG, digest="00"))
    check(tmp_path, replace(CONFIG, digest="00"), overwrite=True)
