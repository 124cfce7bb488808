"""Every metric against scikit-learn, every interval against a hand-computed value or a plain bootstrap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as reference

from featx import metrics
from featx.errors import HeadError
from featx.head import Head
from featx.measuring.evaluation import Report, evaluate_logits


def passing(names: list[str], activation: str = "softmax", threshold: float | None = None) -> Head:
    """A head whose logits are its features."""
    return Head(
        np.eye(len(names), dtype=np.float32), np.zeros(len(names), np.float32), tuple(names), activation, threshold
    )


def noisy(classes: int, rows: int = 700, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[y]
    return logits, y, [f"c{i}" for i in range(classes)]


def test_every_metric_is_scikit_learns() -> None:
    logits, y, names = noisy(8)
    report = evaluate_logits(logits, y, passing(names), names)
    answers = logits.argmax(axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = {
        "accuracy": reference.accuracy_score(y, answers),
        "balanced_accuracy": reference.balanced_accuracy_score(y, answers),
        "macro_f1": reference.f1_score(y, answers, average="macro"),
        "top5_accuracy": reference.top_k_accuracy_score(y, logits, k=5),
        "log_loss": reference.log_loss(y, p),
    }
    assert {k: s.value for k, s in report.scores.items()} == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["accuracy"] < 1
    assert (report.confusion == reference.confusion_matrix(y, answers)).all()
    for column, name in enumerate(("precision", "recall", "f1", "support")):
        want = reference.precision_recall_fscore_support(y, answers)[column]
        assert [getattr(row, name) for row in report.per_class] == pytest.approx(want.tolist())
    assert report.to_dict()["accuracy"] == expected["accuracy"] == report.accuracy


def test_a_wilson_interval_is_the_hand_computed_one() -> None:
    # 141 of 153: centre (p + z2/2n) / (1 + z2/n), z = 1.96 -> 0.867888 to 0.954580
    p, n, z = 141 / 153, 153, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = metrics.wilson(141, 153)
    assert low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
    assert (round(low, 4), round(high, 4)) == (0.8679, 0.9546)
    assert metrics.wilson(0, 10)[0] == 0.0 and metrics.wilson(0, 10)[1] == pytest.approx(0.27754, abs=1e-5)
    assert metrics.wilson(10, 10)[1] == pytest.approx(1.0) and metrics.wilson(10, 10)[1] <= 1


def test_intervals_of_many_images_are_close_to_those_of_resampled_images() -> None:
    logits, y, names = noisy(4, rows=300)
    report = evaluate_logits(logits, y, passing(names), names)
    rng, answers = np.random.default_rng(1), logits.argmax(axis=1)
    each = metrics.losses(logits, y)
    drawn: dict[str, list[float]] = {"balanced_accuracy": [], "macro_f1": [], "log_loss": []}
    for _ in range(1000):
        rows = rng.integers(0, len(y), len(y))
        drawn["balanced_accuracy"].append(reference.balanced_accuracy_score(y[rows], answers[rows]))
        drawn["macro_f1"].append(reference.f1_score(y[rows], answers[rows], average="macro"))
        drawn["log_loss"].append(each[rows].mean())
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        score = report.scores[name]
        assert score.low < score.value < score.high
        assert (score.low, score.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_the_same_data_gives_the_same_report() -> None:
    logits, y, names = noisy(3)
    first, second = (evaluate_logits(logits, y, passing(names), names).to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first)) == first


def test_the_calibration_error_is_the_mean_gap_of_its_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, False, True, True])
    # bins of 1/15: two rows at 0.95 with accuracy 0.5, two at 0.55 with accuracy 1
    assert metrics.calibration_error(confidence, right) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert [b["count"] for b in metrics.reliability(confidence, right)] == [2, 2]
    assert metrics.calibration_error(np.array([1.0]), np.array([True])) == 0.0


def test_answers_outside_the_labels_are_wrong_and_shown_as_other() -> None:
    head = passing(["x", "ant", "bee", "y"])
    logits = np.array([[0, 9, 0, 0], [9, 0, 0, 0], [0, 0, 9, 0], [0, 9, 0, 0.0]])
    report = evaluate_logits(logits, np.array([0, 0, 1, 1]), head, ["ant", "bee"], ids=list("abcd"))
    assert report.columns == ("ant", "bee", "other")
    assert report.confusion is not None and report.confusion.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert report.accuracy == 0.5
    assert {(m.id, m.label, m.answer) for m in report.mistakes} == {("b", "ant", "x"), ("d", "bee", "ant")}
    assert "other" in report.text()


def test_a_label_the_head_never_learned_is_wrong_and_said() -> None:
    logits, y, names = noisy(3, rows=90)
    report = evaluate_logits(logits[:, :2], y, passing(names[:2]), names)
    right = (logits[:, :2].argmax(axis=1) == y).mean()
    assert report.accuracy == pytest.approx(right)
    assert any("never learned 'c2'" in note for note in report.notes)
    known = y < 2
    p = np.exp(logits[:, :2]) / np.exp(logits[:, :2]).sum(axis=1, keepdims=True)
    assert report.scores["log_loss"].value == pytest.approx(reference.log_loss(y[known], p[known]))


def test_a_class_without_images_is_left_out_of_averages_and_said() -> None:
    logits, y, names = noisy(3, rows=90)
    logits, y = logits[y < 2], y[y < 2]
    report = evaluate_logits(logits, y, passing(names), names)
    answers = logits.argmax(axis=1)
    recall = reference.recall_score(y, answers, labels=[0, 1], average="macro")
    assert report.scores["balanced_accuracy"].value == pytest.approx(recall)
    assert report.scores["macro_f1"].value == pytest.approx(
        reference.f1_score(y, answers, labels=[0, 1], average="macro")
    )
    assert any("no image of 'c2'" in note for note in report.notes)
    assert report.per_class[2].support == 0


def test_mistakes_are_the_surest_wrong_answers_first() -> None:
    logits, y, names = noisy(3, rows=400)
    ids = [f"{i}.jpg" for i in range(400)]
    report = evaluate_logits(logits, y, passing(names), names, ids)
    p = passing(names).probabilities(logits)
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    expected = wrong[np.argsort(-p[wrong].max(axis=1))][:20]
    assert len(expected) == 20
    assert [m.id for m in report.mistakes] == [ids[i] for i in expected]
    assert report.mistakes[0].probability == pytest.approx(p[expected[0]].max())


def test_the_threshold_reports_coverage_and_accuracy() -> None:
    logits, y, names = noisy(3)
    report = evaluate_logits(logits, y, passing(names, threshold=0.7), names)
    p = passing(names).probabilities(logits)
    answered = p.max(axis=1) >= 0.7
    assert report.rejection == pytest.approx(
        {"threshold": 0.7, "coverage": answered.mean(), "accuracy": (p.argmax(axis=1) == y)[answered].mean()}
    )
    assert 0.1 < report.rejection["coverage"] < 0.9


def several(rows: int = 400) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(3)
    y = (rng.random((rows, 4)) < [0.5, 0.2, 0.1, 0.4]).astype(np.int64)
    return rng.normal(size=y.shape) + 2.0 * y - 1, y, list("abcd")


def test_metrics_for_several_labels_are_scikit_learns() -> None:
    logits, y, names = several()
    report = evaluate_logits(np.round(logits, 1), y, passing(names, "sigmoid"), names)
    logits = np.round(logits, 1)  # with ties
    said, p = (logits >= 0).astype(int), 1 / (1 + np.exp(-logits))
    expected = {
        "accuracy": reference.accuracy_score(y, said),
        "mean_average_precision": reference.average_precision_score(y, logits, average="macro"),
        "macro_f1": reference.f1_score(y, said, average="macro"),
        "micro_f1": reference.f1_score(y, said, average="micro"),
        "log_loss": np.mean([reference.log_loss(y[:, i], p[:, i]) for i in range(4)]),
    }
    assert {k: s.value for k, s in report.scores.items()} == pytest.approx(expected, abs=1e-9)
    assert all(s.low <= s.value <= s.high for s in report.scores.values())
    assert [row.average_precision for row in report.per_class] == pytest.approx(
        [reference.average_precision_score(y[:, i], logits[:, i]) for i in range(4)]
    )
    assert report.confusion is None and json.dumps(report.to_dict())


def test_what_a_row_adds_to_average_precision_is_the_effect_of_its_weight() -> None:
    logits, y, _ = several(2000)
    scores, y = np.round(logits[:, 0], 1), y[:, 0]  # with ties
    area, added, _ = metrics.average_precision(scores, y)
    assert area == pytest.approx(reference.average_precision_score(y, scores))
    for row in range(0, 2000, 50):
        weights = np.ones(2000)
        weights[row] += 1e-3
        heavier = reference.average_precision_score(y, scores, sample_weight=weights)
        assert (heavier - area) / 1e-3 == pytest.approx(added[row], rel=0.02, abs=2e-6)


@pytest.mark.parametrize(
    ("logits", "y", "says"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "no image to evaluate"),
        (np.zeros((3, 3)), np.zeros(3, int), r"logits \[N, 2\]"),
        (np.array([[0, np.nan]]), np.zeros(1, int), "row.jpg hold NaN"),
        (np.zeros((2, 2)), np.array([0, 2]), r"in \[0, 2\)"),
        (np.zeros((2, 2)), np.zeros(3, int), "do not match"),
    ],
)
def test_what_cannot_be_measured_is_named(logits: np.ndarray, y: np.ndarray, says: str) -> None:
    ids = ["row.jpg"] if len(logits) == 1 else None
    with pytest.raises(HeadError, match=says):
        evaluate_logits(logits, y, passing(["a", "b"]), ["a", "b"], ids)


def test_a_report_of_many_labels_stays_short() -> None:
    logits, y, names = noisy(60, rows=600)
    report = evaluate_logits(logits, y, passing(names), names)
    assert isinstance(report, Report)
    assert "and 30 more labels" in report.text() and len(report.text().splitlines()) < 60


def test_an_interval_of_perfect_answers_has_a_width() -> None:
    head = Head(weight=np.eye(2, dtype=np.float32), bias=np.zeros(2, np.float32), class_names=("a", "b"))
    y = np.array([0, 1] * 5)
    found = evaluate_logits(np.eye(2)[y], y, head, ("a", "b")).scores
    for name in ("balanced_accuracy", "macro_f1"):
        # ten of ten, five of each: Wilson's limit for ten, n / (n + z2)
        assert (found[name].low, found[name].high) == (pytest.approx(10 / (10 + 1.959964**2)), 1.0)
    wrong = evaluate_logits(np.eye(2)[1 - y], y, head, ("a", "b")).scores["balanced_accuracy"]
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1.959964**2 / (10 + 1.959964**2)))
