"""The limits of the gate: what a correct file of any network passes, and which check each wrong file fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from sharing import session_cache

import featx
from featx.errors import ParityError
from featx.features import FeatureSpec
from featx.head import Head
from featx.runs import Run, open_run
from featx.shipping import graph, parity
from featx.shipping.exporting import build, check, export
from featx.shipping.gate import Images, gate_images
from featx.sources.source import Source


@pytest.fixture
def run(photo_run: Path) -> Run:
    return open_run(photo_run)


def change(model: onnx.ModelProto, name: str, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(changed(numpy_helper.to_array(tensor).copy()), name))


def resize_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == "Resize")


def insert(model: onnx.ModelProto, operator: str, value: np.ndarray, before: str, **attributes: int) -> None:
    """One more node between the node `before` and its first input."""
    number, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == f"preprocess/{before}")
    model.graph.initializer.append(numpy_helper.from_array(value, "preprocess/value"))
    inputs = [node.input[0], "preprocess/value"]
    new = helper.make_node(operator, inputs, ["preprocess/new"], name="preprocess/new", **attributes)
    node.input[0] = "preprocess/new"
    model.graph.node.insert(number, new)


def without_antialiasing(model: onnx.ModelProto) -> None:
    node = resize_node(model)
    for attribute in [a for a in node.attribute if a.name in ("antialias", "exclude_outside")]:
        node.attribute.remove(attribute)


def bicubic(model: onnx.ModelProto) -> None:
    next(a for a in resize_node(model).attribute if a.name == "mode").s = b"cubic"


def one_pixel_larger(model: onnx.ModelProto) -> None:
    change(model, "preprocess/resize", lambda size: size + 1)


def shifted_by_a_pixel(model: onnx.ModelProto) -> None:
    insert(model, "Add", np.array([0, 1], np.float32), before="offset")


def blue_first(model: onnx.ModelProto) -> None:
    insert(model, "Gather", np.array([2, 1, 0]), before="pixels", axis=1)


def one_weight(model: onnx.ModelProto) -> None:
    def damaged(weight: np.ndarray) -> np.ndarray:
        weight.flat[7] += 0.1
        return weight

    large = (t.name for t in model.graph.initializer if t.name.startswith("backbone/") and np.prod(t.dims) > 1000)
    change(model, next(large), damaged)


def without_mean_and_std(model: onnx.ModelProto) -> None:
    """Cast to float goes straight into the first convolution, as where someone normalises outside."""
    cast, conv = (
        next(n for n in model.graph.node if n.name.startswith("backbone/") and n.op_type == operator)
        for operator in ("Cast", "Conv")
    )
    conv.input[0] = cast.output[0]


def another_bias(model: onnx.ModelProto) -> None:
    change(model, "head/bias", lambda bias: bias + np.float32([0.001, 0]))


WRONG: list[tuple[Callable[[onnx.ModelProto], None], str, float]] = [
    (without_antialiasing, "pixels", 10),
    (bicubic, "pixels", 10),
    (one_pixel_larger, "pixels", 10),
    (shifted_by_a_pixel, "pixels", 10),
    (blue_first, "pixels", 10),
    (one_weight, "same-pixel features", 5),
    (without_mean_and_std, "same-pixel features", 1000),
    (another_bias, "same-feature logits", 10),
]


@pytest.fixture(scope="module")
def built(photo_run: Path) -> tuple[onnx.ModelProto, Images]:
    """The exported file, and twelve photographs to compare it on."""
    return graph.load(photo_run / "model.onnx"), gate_images(open_run(photo_run), 12, "val")


@pytest.mark.parametrize(("spoil", "name", "margin"), WRONG, ids=[spoil.__name__ for spoil, _, _ in WRONG])
def test_a_wrong_file_exceeds_the_limit_of_what_is_wrong_many_times(
    run: Run, built: tuple[onnx.ModelProto, Images], spoil: Callable[[onnx.ModelProto], None], name: str, margin: float
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(built[0])
    spoil(model)
    found = parity.verify(run, model, built[1])
    missed = {check.name: check.value / check.limit for check in found.missed}
    assert missed[name] > margin
    assert ("pixels" in missed) == (name == "pixels")
    assert all(check in found.failures() for check in missed)


def test_photographs_that_lie_on_their_side_export(photos: Path, squeezenet_weights: Path, tmp_path: Path) -> None:
    for split, count in (("train", 15), ("val", 8)):
        for name in ("ants", "bees"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number, file in enumerate(sorted((photos / split / name).glob("*.jpg"))[:count]):
                if split == "val" and number == 0:
                    image = Image.open(file)
                    exif = image.getexif()
                    exif[274] = 6
                    image.save(tmp_path / "data" / split / name / "turned.jpg", exif=exif, quality=95)
                else:
                    shutil.copy(file, tmp_path / "data" / split / name)
    options = {"weights": str(squeezenet_weights), "cache": session_cache(), "output": tmp_path / "run"}
    found = export(featx.fit(tmp_path / "data", "squeezenet1_1", **options))
    checks = {check.name: check for check in found.checks}
    assert found.equal_labels == found.images == 16
    assert checks["pixels"].value <= 2 and checks["probabilities"].value > 3e-3
    assert checks["same-pixel probabilities"].value < 1e-5


@pytest.fixture(scope="module")
def thumbnails(photos: Path, squeezenet_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SqueezeNet with its own 1,000 classes; photographs of 64 x 48 pixels, all of them smaller than its input."""
    root = tmp_path_factory.mktemp("thumbnails")
    for split, count in (("train", 2), ("val", 12)):
        for name in ("ants", "bees"):
            (root / "data" / split / name).mkdir(parents=True)
            for file in sorted((photos / split / name).glob("*.jpg"))[48 : 48 + count]:
                image = Image.open(file).convert("RGB")
                size = (64, 48) if image.width >= image.height else (48, 64)
                image.resize(size, Image.Resampling.BICUBIC).save(root / "data" / split / name / f"{file.stem}.png")
    return featx.fit(
        root / "data",
        "squeezenet1_1",
        "pretrained",
        settings={"mapping": {"ants": 310, "bees": 309}},
        weights=str(squeezenet_weights),
        cache=root / "cache",
        output=root / "run",
    )


def test_a_network_of_1000_classes_exports_though_the_resize_moves_its_probabilities(
    thumbnails: Run, tmp_path: Path
) -> None:
    found = export(thumbnails)
    checks = {check.name: check for check in found.checks}
    assert len(thumbnails.head.class_names) == 1000
    assert found.images == found.equal_labels == 24 and found.accuracy == thumbnails.report["accuracy"]
    assert 5e-3 < checks["probabilities"].value < 1e-2
    assert checks["same-pixel probabilities"].value < 1e-5
    again = export(thumbnails, output=tmp_path / "again.onnx")  # on the rows that were kept: the same limits
    assert again.method == "head"
    for one in again.checks:
        assert one.limit == pytest.approx(checks[one.name].limit, rel=0.1)
        assert one.value == pytest.approx(checks[one.name].value, rel=0.1, abs=1e-5)


def test_small_images_do_not_hide_a_missing_antialias(thumbnails: Run) -> None:
    model = build(thumbnails, "pixels", None)
    without_antialiasing(model)
    found = parity.verify(thumbnails, model, gate_images(thumbnails, 4, "val"))
    assert {check.name: check.value for check in found.missed}["pixels"] > 20


def test_rows_that_an_older_featx_kept_are_not_read(tmp_path: Path) -> None:
    rows = np.zeros((2, 3), np.float32)
    np.savez(tmp_path / "old.npz", same=rows, torch=rows, resized=rows)
    assert parity.load_rows(tmp_path / "old.npz") is None
    parity.save_rows(tmp_path / "new.npz", parity.ThreeWays(rows, rows, rows, np.uint8([0, 1])))
    read = parity.load_rows(tmp_path / "new.npz")
    assert read is not None and read.levels is not None and read.levels.tolist() == [0, 1]
    parity.save_rows(tmp_path / "crops.npz", parity.ThreeWays(rows, rows, rows))
    read = parity.load_rows(tmp_path / "crops.npz")
    assert read is not None and read.levels is None


@pytest.mark.parametrize("input", ["pixels", "tensor", "features"])
def test_a_head_that_single_precision_cannot_hold_is_refused_by_name(run: Run, tmp_path: Path, input: Any) -> None:
    weight = run.head.weight.copy()
    weight[0, 3] = 1e31
    damaged = replace(run, head=replace(run.head, weight=weight))
    with pytest.raises(ParityError, match=r"weights are too large for single precision: .* add up to \d\.?\d*e\+3"):
        export(damaged, input=input, images=8, output=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_head_or_a_report_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    head = run.head
    another = replace(head, weight=head.weight[::-1])  # classes exchanged
    sharper = replace(head, weight=head.weight * 2, bias=head.bias * 2)  # the same answers
    cases: list[tuple[Run, set[str]]] = [
        (replace(run, head=another), {"reported accuracy", "reported log-loss"}),
        (replace(run, head=sharper), {"reported log-loss"}),
        (replace(run, report=run.report | {"accuracy": 0.9}), {"reported accuracy"}),
        (replace(run, report=run.report | {"log_loss": 0.3}), {"reported log-loss"}),
    ]
    for changed, missed in cases:
        with pytest.raises(ParityError, match=r"are not of one fit") as caught:
            export(changed, output=tmp_path / "model.onnx")
        assert {name for name in ("reported accuracy", "reported log-loss") if name in str(caught.value)} == missed
    with pytest.raises(ParityError, match="reported accuracy"):  # of the training images only the accuracy is known
        export(replace(run, head=another), input="features", split="train", output=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_report_on_more_images_says_nothing_of_these(run: Run, tmp_path: Path) -> None:
    changed, options = replace(run, report=run.report | {"accuracy": 0.1}), {"output": tmp_path / "head.onnx"}
    found = export(changed, input="features", images=40, **options)
    assert not [check.name for check in found.checks if check.name.startswith("reported")]


def some_images(X: np.ndarray, labels: dict[str, str], names: str = "", **stated: float) -> Images:
    """Images that are not read: ids and labels, and the features `X` that are cached for them."""
    source = Source("", Path(), list(labels), list(labels.values()), multilabel="|" in "".join(labels.values()))
    keys, spec = np.zeros((len(X), 32), np.uint8), FeatureSpec("b", "00")
    if source.multilabel:
        y = np.array([[int(name in label.split("|")) for name in names] for label in labels.values()])
    else:
        y = np.array([names.find(label) for label in labels.values()])
    return Images(source, keys, X, spec, split="val", labels=tuple(names), y=y, stated=stated)


def of_head(head: Head, X: np.ndarray) -> parity.Outputs:
    """What a file of this head gives for these features, in numpy."""
    return {"probabilities": head.probabilities(head(X)), "logits": head(X)}


def identity(classes: int = 2) -> Head:
    return Head(np.eye(classes, dtype=np.float32), np.zeros(classes, np.float32), tuple("abcd"[:classes]))


def test_another_answer_is_right_where_torch_gives_it_for_the_same_pixels() -> None:
    head = identity()
    torch = np.float32([[0.002, 0.0], [3.0, 0.0], [0.0, 0.001], [0.5, 0.5]])
    same = np.float32([[0.0, 0.002], [3.0, 0.0], [0.0, 0.001], [0.5, 0.5]])  # the resize turns the first one
    images = some_images(torch, {"turned": "a", "equal": "a", "wrong": "b", "tie": "a"})
    answered = np.float32([[0.0, 0.002], [3.0, 0.0], [0.001, 0.0], [0.5, 0.500001]])
    rows = parity.ThreeWays(same, same, torch, np.ones(4, np.uint8))
    found = parity.compare(images, head, rows, of_head(head, answered), method="file")
    assert (found.ties, found.differing, found.equal_labels) == (["turned", "tie"], ["wrong"], 1)
    assert found.checks[0] == parity.Check("labels", 1.0, 0.0)
    assert (found.accuracy, found.torch_accuracy) == (0.25, 1.0)


def test_pixels_may_be_two_levels_apart() -> None:
    head, X = identity(), np.float32([[1, 0], [0, 1]])
    images = some_images(X, {"x": "a", "y": "b"})
    for levels, missed in ((2, []), (3, ["pixels"])):
        rows = parity.ThreeWays(X, X, X, np.uint8([0, levels]))
        found = parity.compare(images, head, rows, of_head(head, X), method="file")
        assert [check.name for check in found.missed] == missed
        assert f"pixels                    {levels}         (limit 2)" in found.text()


def test_the_tolerance_is_the_limit_of_probabilities_and_above_its_own_limit_of_features() -> None:
    head = identity()
    X = np.float32([[4.0, 0.8], [1.2, 3.6]])
    resized = X * np.float32(1.04)
    images = some_images(X, {"x": "a", "y": "b"})
    cases: list[tuple[float | None, float, float, list[str]]] = [
        (None, 3e-2, 5e-2, ["features"]),
        (5e-3, 3e-2, 5e-3, ["features", "probabilities"]),
        (0.035, 0.035, 0.035, ["features"]),
        (0.05, 0.05, 0.05, []),
    ]
    for tolerance, features, probabilities, missed in cases:
        rows = parity.ThreeWays(resized, resized, X, np.ones(2, np.uint8))
        found = parity.compare(images, head, rows, of_head(head, resized), method="file", tolerance=tolerance)
        assert [check.name for check in found.missed] == missed
        limits = {check.name: check.limit for check in found.checks}
        assert (limits["features"], limits["probabilities"]) == (features, probabilities)


def test_a_head_that_magnifies_what_features_may_differ_by_passes() -> None:
    """As for a deep network with random weights: features 5e-6 apart, a head with large weights."""
    head = Head(np.float32([[40, 0], [0, 40]]), np.zeros(2, np.float32), ("a", "b"))
    torch = np.float32([[1.0, 0.99], [0.5, 0.8]])
    near = (torch * np.float32([[1 + 5e-6, 1 - 5e-6]])).astype(np.float32)
    images, rows = some_images(torch, {"x": "a", "y": "b"}), parity.ThreeWays(near, torch, torch)
    found = parity.compare(images, head, rows, of_head(head, near), method="file")
    values = {check.name: check for check in found.checks}
    assert values["same-pixel probabilities"].value > 5e-5 and found.passed
    wrong = of_head(head, near) | {"logits": head(near) + np.float32(1e-3)}
    found = parity.compare(images, head, rows, wrong, method="file")
    assert [check.name for check in found.missed] == ["same-feature logits"]


def test_no_head_makes_the_same_pixel_limits_grow_without_end() -> None:
    torch = np.float32([[1.0, 0.9999], [0.9999, 1.0]])
    near = (torch * np.float32([[1 + 5e-6, 1 - 5e-6]])).astype(np.float32)
    images, rows = some_images(torch, {"x": "a", "y": "b"}), parity.ThreeWays(near, torch, torch)
    head = Head(np.float32([[9000, 0], [0, 9000]]), np.zeros(2, np.float32), ("a", "b"))
    found = parity.compare(images, head, rows, of_head(head, near), method="file")
    limits = {check.name: check.limit for check in found.checks}
    assert limits["same-pixel probabilities"] == 5e-3 and limits["same-feature logits"] == pytest.approx(9e-3, rel=1e-3)
    head = replace(head, weight=head.weight * np.float32(1.2))
    with pytest.raises(ParityError, match=r"add up to 1e\+04, and above 1e\+04 .* by 0\.005"):
        parity.compare(images, head, rows, of_head(head, near), method="file")


def test_only_near_ties_may_part_the_accuracy_from_the_reported_one() -> None:
    """Ten images, one of them a tie; the report has two right answers more, or one."""
    head, X = identity(), np.tile(np.float32([[1.0, 0.0]]), (10, 1))
    X[0] = 0.5, 0.5000001
    labels = {str(i): "a" if i < 8 else "b" for i in range(10)}
    for accuracy, passed in ((0.7, True), (0.8, True), (0.6, True), (0.9, False), (0.5, False)):
        images = some_images(X, labels, "ab", accuracy=accuracy)
        found = parity.compare(images, head, parity.ThreeWays(X, X, X), of_head(head, X), method="file")
        assert {c.name: c.limit for c in found.checks}["reported accuracy"] == 0.1
        assert found.passed is passed


def test_several_labels_are_measured_as_the_report_measures_them() -> None:
    """A label that the head never learned is left out, as by `fit`."""
    head = Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), ("a", "b"), "sigmoid")
    X = np.float32([[2, 2], [2, 2], [-2, -2], [2, -2]])
    right, wrong = np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0))
    loss = float((7 * right + wrong) / 8)
    labels = {"right": "b|a", "one missing": "a", "none": "|", "unknown label": "a|z"}
    for stated, missed in (
        ({"accuracy": 0.75, "log_loss": loss}, []),
        ({"accuracy": 0.5, "log_loss": loss + 1e-3}, ["reported accuracy", "reported log-loss"]),
    ):
        images = some_images(X, labels, "abz", **stated)
        found = parity.compare(images, head, parity.ThreeWays(X, X, X), of_head(head, X), method="file")
        assert [check.name for check in found.missed] == missed


@pytest.mark.parametrize(
    ("apart", "changed", "missed"),
    [
        (0.04, 2, set()),  # as bf16 of EfficientNet-Lite0, whose worst image is 0.1 off
        (0.04, 3, {"answers from cached features"}),
        (0.3, 0, {"cached features, median"}),
    ],
)
def test_features_in_bf16_may_differ_as_long_as_the_answers_do_not(
    apart: float, changed: int, missed: set[str]
) -> None:
    """Of 40 images two may change: where the two entries are exchanged."""
    X = np.tile(np.array([[2.0, 1.0], [1.0, 2.0]], np.float32), (20, 1))
    images = some_images(X * np.float32(1 + apart), {f"{i:02}.jpg": "ab"[i % 2] for i in range(40)}, "ab")
    images = replace(images, spec=replace(images.spec, precision="bf16"))
    images.cached[:changed] = images.cached[:changed, ::-1]
    found = parity.compare(images, identity(), parity.ThreeWays(X, X, X), of_head(identity(), X), method="file")
    assert {check.name for check in found.missed} == missed
    assert [c.value for c in found.checks if c.name == "answers from cached features"] == [changed]


def test_all_labels_of_an_image_must_be_right_and_only_they() -> None:
    head = Head(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), ("a", "b", "c"), "sigmoid")
    X = np.float32([[1, 1, -1], [1, 1, -1], [-1, -1, -1], [1, -1, -1]])
    images = some_images(X, {"right": "b|a", "one missing": "a", "none": "|", "unknown class": "a|z"})
    assert images.right(head.class_names, head.answers(head.probabilities(X))).tolist() == [True, False, True, False]


def test_the_features_of_one_image_do_not_set_the_scale_for_the_others() -> None:
    rng = np.random.default_rng(0)
    torch = rng.uniform(1, 2, (40, 64)).astype(np.float32)
    file = torch * np.float32(1.001)
    assert parity.distances(file, torch) == pytest.approx(np.full(40, 1e-3), rel=0.5)
    for factor in (100, 0):  # a glaring image, and a black one
        torch[0], file[0] = torch[0] * factor, file[0] * factor
        assert parity.distances(file, torch).max() == pytest.approx(1e-3, rel=1e-2)
    file[0] += 0.5  # the black one as far from what it was as half of another's length is not a rounding error
    assert parity.distances(file, torch).max() == pytest.approx(1 / 3, rel=0.05)
    file[0, 0] = np.nan
    assert np.isnan(parity.distances(file, torch).max())


def test_nan_never_passes() -> None:
    assert not parity.Check("probabilities", float("nan"), 5e-3).passed


def test_a_file_is_checked_by_the_same_limits_as_at_its_export(photo_run: Path, run: Run) -> None:
    found = check(photo_run / "model.onnx", run)
    record = json.loads((photo_run / "parity.json").read_text())["checks"]
    assert {c.name: c.limit for c in found.checks} == pytest.approx({n: c["limit"] for n, c in record.items()}, rel=0.1)
