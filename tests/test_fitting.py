"""A fit without a disk: relabelled features, heads that are refitted, what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images

import featx
from featx.errors import FeatxError, HeadError
from featx.extraction.pipeline import sync
from featx.extraction.planning import plan
from featx.features import Features, FeatureSpec, groups
from featx.fitting import fit, fit_features
from featx.head import Head
from featx.heads import logreg
from featx.measuring.evaluation import evaluate, evaluate_logits
from featx.options import complete, fits
from featx.runs import open_run
from featx.solvers.examples import Examples

SPEC = FeatureSpec("custom/none", "00" * 32)


def features(count: int = 80, several: bool = False) -> Features:
    """Two clouds of features without any file behind them; the last fourth is the validation split."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    X = (rng.normal(size=(count, 16)) + 1.5 * y[:, None]).astype(np.float32)
    return Features(
        rows=X,
        y=np.stack([y, X[:, 0] > 1], axis=1).astype(np.int64) if several else y,
        ids=[f"{i}.jpg" for i in range(count)],
        class_names=["cold", "warm"],
        splits=np.where(np.arange(count) < count * 3 // 4, "train", "val"),
        keys=rng.integers(0, 255, (count, 32), dtype=np.uint8),
        spec=SPEC,
    )


def test_it_is_the_head_and_the_reports_of_the_parts_it_is_made_of() -> None:
    table = features()
    found = fit_features(table, "logreg", settings={"folds": 3}, seed=1)
    train, val = table.split("train"), table.split("val")
    alone = logreg.fit(Examples(train.X, train.y, groups(train.keys)), table.class_names, folds=3, seed=1)
    assert np.array_equal(found.head.weight, alone.head.weight) and found.info["strength"] == alone.info["strength"]
    report = evaluate_logits(alone.head(val.X), val.y, alone.head, table.class_names, val.ids)
    assert found.val is not None and found.val.to_dict() == report.to_dict() and found.test is None
    assert found.train_accuracy == (alone.head(train.X).argmax(axis=1) == train.y).mean()
    assert (
        found.to_dict()["accuracy"] == report.accuracy and found.to_dict()["fit"]["strength"] == found.info["strength"]
    )


def test_a_run_is_written_from_it(tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data", per_class=20), tmp_path / "cache"
    run = fit(data, COLOURS, engine=ColourEngine(), cache=cache, output=tmp_path / "run")
    found = fit_features(sync(data, COLOURS, cache=cache).features())
    assert np.array_equal(found.head.weight, run.head.weight)
    values, written = found.to_dict(), run.report
    assert {name: written[name] for name in values if name != "fit"} == {n: v for n, v in values.items() if n != "fit"}
    again = evaluate(run, data, split="val", engine=ColourEngine())
    assert again.to_dict() == found.val.to_dict()


def test_the_run_that_fit_returns_is_the_one_that_its_folder_holds(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", per_class=20)
    settings = {"strengths": np.array([0.1, 1.0]), "folds": np.int64(3)}
    given: dict[str, Any] = {"engine": ColourEngine(), "cache": tmp_path / "cache", "output": tmp_path / "run"}
    run = fit(data, COLOURS, settings=settings, **given)
    held = open_run(tmp_path / "run", factory=COLOURS.name)
    assert (held.config, held.report) == (run.config, run.report)
    assert held.config.settings == {"strengths": [0.1, 1.0], "folds": 3}
    assert (held.path, held.factory, held.request) == (run.path, run.factory, run.request)
    assert np.array_equal(held.trained_on, run.trained_on) and np.array_equal(held.head.weight, run.head.weight)


@pytest.mark.parametrize(
    ("name", "words", "near"),
    [
        ("extract", {"C": 1}, ""),
        ("extract", {"prescision": "fp32"}, "precision"),
        ("plan", {"enigne": None}, "engine"),
        ("fit", {"bacth_size": 8}, "batch_size"),
        ("fit", {"bakcbone": "resnet18"}, "backbone"),
        ("fit", {"setings": {}}, "settings"),
        ("evaluate", {"splt": "val"}, "split"),
        ("sweep", {"veiws": [0]}, "views"),
    ],
)
def test_a_misspelt_option_is_named_with_the_near_one(name: str, words: dict[str, Any], near: str) -> None:
    given = ("no-run", "no-data") if name == "evaluate" else ("no-data",)
    with pytest.raises(
        featx.FeatxError, match=rf"there is no option '{next(iter(words))}'; there are .*{near}"
    ) as raised:
        (plan if name == "plan" else getattr(featx, name))(*given, **words)
    assert str(raised.value).partition("Did you mean ")[2].startswith(near)
    assert " options" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("batch_size", "8", "int | None"),
        ("workers", 2.5, "int | None"),
        ("views", True, "int"),
        ("seed", None, "int"),
        ("device", None, "str"),
        ("layer", 3, "str"),
        ("cache", None, "str | pathlib.Path"),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, value: object, kind: str) -> None:
    with pytest.raises(featx.FeatxError, match=re.escape(f"{name} is {kind}, not {value!r}")):
        complete({name: value})
    with pytest.raises(featx.FeatxError, match=r"seed is less than 2\*\*63"):
        complete({"seed": np.uint64(2**63)})
    assert fits(np.zeros(2), np.ndarray) and not fits(np.float32(0.5), int) and not fits(np.bool_(True), float)
    assert complete({"seed": np.int64(3), "cache": Path("c"), "workers": None})["seed"] == 3


def test_relabelling_and_fitting_again_reads_no_disk() -> None:
    table = features()
    before = fit_features(table)  # imports what it needs
    opened: list[str] = []
    watching = True

    def audit(event: str, details: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "os.mkdir"):
            opened.append(f"{event} {details[0]}")

    sys.addaudithook(audit)  # for the rest of the process: `watching` turns it off
    after = fit_features(table.relabel({"0.jpg": "warm", "1.jpg": None}))
    watching = False
    assert [file for file in opened if "/proc/" not in file] == []  # threadpoolctl looks for BLAS libraries
    assert not np.array_equal(after.head.weight, before.head.weight)


def test_relabelled_features_are_those_of_a_source_with_these_labels(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", per_class=12)
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))

    def manifest(labels: dict[str, str], splits: bool) -> Features:
        rows = [f"{n},{labels[n]}" + (f",{'val' if i % 3 == 0 else ''}" if splits else "") for i, n in enumerate(names)]
        path = data / f"list{len(list(data.glob('*.csv')))}.csv"
        path.write_text("\n".join(["path,label" + (",split" if splits else ""), *rows]))
        return sync(path, COLOURS, engine=ColourEngine(), cache=tmp_path / "cache").features()

    old = {name: "|".join(["cold", "new"][: 1 + i % 2]) for i, name in enumerate(names)}
    for first in ({n: n.split("/")[0] for n in names}, old):
        changed = first | {names[0]: "third", names[1]: "", names[5]: "warm"}
        for splits in (False, True):
            expected = manifest(changed, splits)
            found = manifest(first, splits).relabel({n: changed[n] for n in (names[0], names[1], names[5])})
            assert found.class_names == expected.class_names and found.labels == expected.labels
            assert np.array_equal(found.y, expected.y) and np.array_equal(found.splits, expected.splits)
            assert found.digest == expected.digest and found.report.notes == expected.report.notes
            every = manifest(first, splits).relabel(expected.labels)
            assert every.digest == expected.digest
            assert every.relabel(first).digest == manifest(first, splits).digest


def test_labels_that_fit_no_image_are_refused() -> None:
    with pytest.raises(FeatxError, match=r"no image '7.jpeg'.*Did you mean 7.jpg"):
        features().relabel({"7.jpeg": "warm"})
    with pytest.raises(FeatxError, match="2 labels were given for 80 images"):
        features().relabel(["cold", "warm"])


def test_several_labels_are_learned_and_relabelled() -> None:
    table = features(several=True)
    again = table.relabel({"0.jpg": "cold|mild", "2.jpg": "|", "3.jpg": ""})
    assert again.class_names == ["cold", "mild", "warm"]
    assert again.y[0].tolist() == [1, 1, 0] and again.y[2].tolist() == [0, 0, 0] and again.y[3].tolist() == [-1] * 3
    assert again.splits[3] == "" and fit_features(again).head.activation == "sigmoid"


def test_what_cannot_be_fitted_is_named() -> None:
    with pytest.raises(HeadError, match="at least two classes"):
        fit_features(features().relabel(["cold"] * 80))
    with pytest.raises(HeadError, match="network's own classifier, which was not given"):
        fit_features(features(), "pretrained")
    with pytest.raises(HeadError, match="Did you mean folds"):
        fit_features(features(), settings={"fold": 3})
    own = Head(np.eye(16, dtype=np.float32)[:2], np.zeros(2, np.float32), ("cold", "warm"))
    found = fit_features(features(), "pretrained", classifier=own)
    assert np.array_equal(found.head.weight, own.weight) and found.info["classes"] == {"cold": "cold", "warm": "warm"}
