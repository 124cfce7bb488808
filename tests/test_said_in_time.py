"""What can be known before the extraction is said before it: no image is computed for a run that cannot be."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import COLOURS, ColourEngine, write_images

import featx
from featx.cli import cli
from featx.errors import FeatxError, HeadError, RunError
from featx.heads import pretrained
from featx.learning import check_heads
from featx.sources.opening import open_source


def table(folder: Path, labels: list[Any], splits: list[str] | None = None) -> Path:
    """A manifest of as many images."""
    images = sorted(write_images(folder / "images", len(labels), ("all",)).rglob("*.png"))
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for image, label, split in zip(images, labels, splits or [""] * len(labels), strict=True):
            writer.writerow([image.relative_to(folder), label, split])
    return folder / "data.csv"


def refused(data: Path, folder: Path, engine: ColourEngine, **options: Any) -> str:
    """What `featx.fit` says, having computed nothing and written no run."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(FeatxError) as caught:
        featx.fit(data, COLOURS, engine=engine, cache=folder / "cache", **{"output": folder / "run", **options})
    assert engine.images == 0
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


def test_labels_that_make_no_classifier(tmp_path: Path, engine: ColourEngine) -> None:
    for name, labels, splits, says in (
        ("none", [""] * 4, None, "has no labels: put the images into one folder a class, or name a manifest"),
        ("one", ["a"] * 4, None, "all 4 training images are 'a', and a classifier needs at least two classes"),
        ("held", ["a", "a", "b"], ["train", "train", "val"], "all 2 training images are 'a'.*; of 'b' there is none"),
        ("test", ["a", "b"], ["test", "test"], "there are no training images"),
    ):
        assert re.search(says, refused(table(tmp_path / name, labels, splits), tmp_path / name, engine))


def test_numbers_that_look_like_a_regression_are_asked_about(tmp_path: Path, engine: ColourEngine) -> None:
    rng = random.Random(0)
    weights = [f"{rng.uniform(0, 9):.2f}" for _ in range(60)]
    ages = [str(n) for n in range(30)] * 2
    for name, labels, count in (("weights", weights, len(set(weights))), ("whole", [str(i) for i in range(30)], 30)):
        said = refused(table(tmp_path / name, labels), tmp_path / name, engine)
        assert f"are {count} different numbers for {len(labels)} images" in said
        assert "looks like a regression" in said and "Write a label for each range" in said

    for number, labels in enumerate((ages, [f"id-{i}" for i in range(30)], ["1.5", "2.5"] * 15, ["3", "7", "9"])):
        check_heads([("logreg", {})], open_source(table(tmp_path / str(number), labels)))


@pytest.mark.parametrize(
    ("head", "settings", "says"),
    [
        ("logreg", {"reject": 0.05}, "reject is the accuracy that answers must reach, at least 0.5 and below 1"),
        ("ridge", {"reject": 95}, "not 95: with reject=0.95"),
        ("ncm", {"threshold": 80}, r"a threshold is a probability in \[0, 1\], not 80"),
        ("logreg", {"threshold": 0.5, "reject": 0.9}, "not both"),
        ("logreg", {"folds": 1}, "folds is a whole number of at least 2"),
        ("ridge", {"penalties": [0.0]}, "positive"),
        ("linear", {"epochs": 0}, "epochs and batch_size are at least 1"),
        ("logreg", {"strenghts": [1]}, "no setting 'strenghts'.* Did you mean strengths"),
        ("logreg", {"class_weight": {"warn": 2}}, "names 'warn', of which there is no training image.* mean warm"),
        ("logreg", {"class_weight": {"warm": 0}}, "the weight of a class is a number above 0, not 0"),
        ("logrge", {}, "unknown head 'logrge'.* Did you mean logreg"),
    ],
)
def test_a_heads_settings(
    head: str, settings: dict[str, Any], says: str, tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    assert re.search(says, refused(tiny, tmp_path, engine, head=head, settings=settings))


def test_values_of_another_kind_are_named_by_what_took_them(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    for options, says in (
        ({"settings": ["folds=3"]}, "settings of a head go by name"),
        ({"head": None}, "unknown head None; there are linear, logreg"),
        ({"output": 3}, "expected a path, not 3"),
    ):
        assert says in refused(tiny, tmp_path, engine, **options)
    grids: list[tuple[Any, Any, str]] = [
        (None, "ncm", "a backbone goes by its name, or package.module:factory, not as NoneType"),
        (COLOURS, [("ncm", {})], "a head is text, such as 'logreg folds=10', not"),
        (COLOURS, "nmc", "unknown head 'nmc'.* mean ncm"),
    ]
    for backbones, heads, says in grids:
        with pytest.raises(FeatxError, match=says):
            featx.sweep(tiny, backbones, heads, engine=engine, cache=tmp_path / "cache")


def test_several_labels_rule_some_settings_out(tmp_path: Path, engine: ColourEngine) -> None:
    data = table(tmp_path, ["a|b", "a", "b", "|"])
    assert "needs one label per image" in refused(data, tmp_path, engine, settings={"reject": 0.9})
    assert "needs one label per image" in refused(data, tmp_path, engine, settings={"class_weight": "balanced"})


def test_a_folder_that_cannot_take_the_run(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    assert "is not a run of featx; give another --output" in refused(tiny, tmp_path, engine, output=tmp_path / "mine")
    featx.fit(tiny, COLOURS, engine=ColourEngine(), cache=tmp_path / "former", output=tmp_path / "run")
    assert "holds a finished run; use --overwrite" in refused(tiny, tmp_path, engine)
    with pytest.raises(RunError, match="holds a finished run"):
        featx.fit(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", output=tmp_path / "run", seed=3)
    assert engine.images == 0


def test_evaluation_on_other_classes(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    run = featx.fit(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", output=tmp_path / "run")
    computed = engine.images
    others = write_images(tmp_path / "others", classes=("0", "1"), seed=5)
    with pytest.raises(HeadError, match=r"no label of .*others \('0', '1'\) is a class that .*run knows \('cold', 'w"):
        featx.evaluate(run, others, engine=engine)
    several = table(tmp_path / "several", ["cold|warm", "warm"])
    with pytest.raises(HeadError, match=r"was fitted on one label for each image, and .* has several"):
        featx.evaluate(run, several, engine=engine)
    assert engine.images == computed

    half = write_images(tmp_path / "half", 3, classes=("cold", "hot"), seed=6)
    report = featx.evaluate(run, half, engine=engine)
    assert report.count == 6 and any("never learned 'hot'" in note for note in report.notes)


def test_a_sweep_is_checked_as_a_whole(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    heads = ("logreg", "logreg reject=0.05")
    with pytest.raises(HeadError, match="reject is the accuracy"):
        featx.sweep(tiny, [COLOURS], heads, engine=engine, cache=tmp_path / "cache", output=tmp_path / "sweep")
    one = table(tmp_path / "one", ["a"] * 4)
    with pytest.raises(HeadError, match="all 4 training images are 'a'"):
        featx.sweep(one, [COLOURS], engine=engine, cache=tmp_path / "cache", output=tmp_path / "sweep")
    assert engine.images == 0 and not (tmp_path / "sweep").exists()


def test_labels_that_a_pretrained_network_does_not_know(tmp_path: Path, squeezenet_weights: Path) -> None:
    data = write_images(tmp_path / "data", 2, ("ants", "spanner wrench"))
    options = {"weights": str(squeezenet_weights), "cache": tmp_path / "cache", "output": tmp_path / "run"}
    with pytest.raises(HeadError, match=r"label 'spanner wrench' matches none .*Name one with a mapping"):
        featx.fit(data, "squeezenet1_1", "pretrained", **options)
    assert not (tmp_path / "cache" / "features").exists() and not (tmp_path / "run").exists()


def test_imagenets_classes_are_known_by_their_wordnet_ids(squeezenet_weights: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    names = SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]
    ids = pretrained._wordnet()
    assert len(set(ids)) == 1000 and sorted(ids) == ids
    # from the data set's own list, LOC_synset_mapping.txt
    for wnid, name in (
        ("n01440764", "tench"),
        ("n02219486", "ant"),
        ("n02206856", "bee"),
        ("n15075141", "toilet tissue"),
    ):
        assert names[pretrained.match(wnid, names)] == name
    # two classes are called crane, and two maillot: ids tell them apart
    assert pretrained.matched(["n02012849", "n03126707"], names) == {"n02012849": 134, "n03126707": 517}
    with pytest.raises(HeadError, match="matches none"):
        pretrained.match("n00000000", names)
    with pytest.raises(HeadError, match="matches none"):  # another network's thousand classes
        pretrained.match("n01440764", [f"class {i}" for i in range(1000)])


def test_the_ids_are_those_that_timm_lists() -> None:
    timm_data = pytest.importorskip("timm.data")
    info = timm_data.ImageNetInfo()
    assert pretrained._wordnet() == [info.index_to_label_name(i) for i in range(1000)]


def test_a_split_that_there_is_not_names_the_one_that_was_meant(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    features = featx.extract(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    with pytest.raises(FeatxError, match=r"splits are train, val, test, not 'vall'. Did you mean val\?"):
        features.split("vall")
    assert len(features.split("train")) + len(features.split("val")) == 12
    assert len(features.split("test")) == len(features.split("")) == 0
    unlabelled = features.relabel({features.ids[0]: None})
    assert np.array_equal(unlabelled.split("").ids, features.ids[:1])


def test_a_file_that_cannot_hold_the_exported_features(
    tiny: Path, tmp_path: Path, everywhere: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.h5").write_text("text")
    for name, says in (("feats.csv", "would hold HDF5: call it .h5"), ("mine.h5", "is there already")):
        result = CliRunner().invoke(cli, ["cache", "export", str(tiny), name])
        assert result.exit_code == 1 and says in result.stderr
    assert everywhere.images == 0 and (tmp_path / "mine.h5").read_text() == "text"
