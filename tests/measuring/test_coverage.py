"""Intervals hold their value and, about 95 times in 100, the truth of the population that the images came from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from featx import metrics
from featx.head import Head
from featx.measuring.evaluation import evaluate_logits
from featx.metrics import Estimate


def covers(estimate: Estimate, truth: float) -> bool:
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    return estimate.low <= truth <= estimate.high


def answers(rng: np.random.Generator, classes: int, accuracy: float) -> np.ndarray:
    """The chance `[C, C]` of each answer to an image of each class; some classes are easy, some pairs alike."""
    wrong = rng.gamma(0.3, size=(classes, classes)) + 1e-9
    np.fill_diagonal(wrong, 0)
    right = rng.beta(5 * accuracy, 5 * (1 - accuracy), classes)
    return wrong / wrong.sum(axis=1, keepdims=True) * (1 - right)[:, None] + np.diag(right)


@pytest.mark.parametrize("images", [1, 2, 5, 50])
@pytest.mark.parametrize("classes", [2, 20, 100])
def test_class_averages_cover_those_of_the_population(classes: int, images: int) -> None:
    rng = np.random.default_rng([classes, images])
    held = {"balanced_accuracy": 0, "macro_f1": 0}
    for trial in range(200):
        chances = answers(rng, classes, (0.1, 0.5, 0.9, 0.99)[trial % 4])
        found = metrics.class_averages(rng.multinomial(images, chances))
        recall = np.diagonal(chances)
        truth = {"balanced_accuracy": recall.mean(), "macro_f1": (2 * recall / (1 + chances.sum(axis=0))).mean()}
        for name, estimate in found.items():
            held[name] += covers(estimate, truth[name])
    assert min(held.values()) >= 0.91 * 200, held


@pytest.mark.parametrize("images", [2, 5, 20])
def test_averages_over_labels_cover_those_of_the_population(images: int) -> None:
    rng, (labels, count) = np.random.default_rng(images), (12, 5 * images)
    grid, trials = np.linspace(-6, 10, 1001)[:, None], 60
    held = {"mean_average_precision": 0, "macro_f1": 0, "micro_f1": 0}
    for _ in range(trials):
        # scores of label l are normal, `apart[l]` higher for images that have it, and one image's go together
        apart = np.maximum(0, rng.normal(2, 0.7, labels))
        truth = np.argsort(rng.random((count, labels)), axis=0) < images
        noise = 0.8 * rng.normal(size=truth.shape) + 0.6 * rng.normal(size=(count, 1))
        found, _ = metrics.label_averages(noise + truth * apart - 1, truth, noise + truth * apart > 1)

        hits, seen = norm.sf(grid - apart) / 5, norm.sf(grid - apart) / 5 + norm.sf(grid) * 4 / 5
        areas = -np.trapezoid(hits / seen, hits * 5, axis=0)
        hits, seen = norm.sf(1 - apart) / 5, norm.sf(1 - apart) / 5 + norm.sf(1) * 4 / 5
        expected = {
            "mean_average_precision": areas.mean(),
            "macro_f1": (2 * hits / (seen + 1 / 5)).mean(),
            "micro_f1": 2 * hits.sum() / (seen + 1 / 5).sum(),
        }
        for name, estimate in found.items():
            held[name] += covers(estimate, expected[name])
    assert min(held.values()) >= 0.9 * trials, held


def test_every_interval_of_every_table_holds_its_value() -> None:
    rng = np.random.default_rng(0)
    for trial in range(400):
        labels, extra = int(rng.integers(1, 12)), int(rng.integers(0, 2))
        table = rng.poisson(rng.gamma(0.3) * rng.random((labels, labels + extra)) ** 3)
        table += rng.poisson(rng.gamma(0.5), (labels, 1)) * np.eye(labels, labels + extra, dtype=int) * (trial % 3)
        table[0, 0] += table.sum() == 0
        for estimate in metrics.class_averages(table).values():
            covers(estimate, 0)
    for trial in range(400):
        shape = int(rng.integers(1, 9)), int(rng.integers(1, 7))
        logits = np.round(rng.normal(size=shape), trial % 2)
        found, areas = metrics.label_averages(logits, rng.random(shape) < rng.random(), logits > 0)
        assert len(areas) == shape[1]
        for estimate in found.values():
            covers(estimate, 0)
    for count in (*range(1, 200), 10**6 + 1):
        for right in {0, 1, count // 3, count - 1, count}:
            assert metrics.wilson(right, count)[0] <= right / count <= metrics.wilson(right, count)[1]


def test_one_image_bounds_a_log_loss_by_its_range_only() -> None:
    found = metrics.mean_of(np.array([0.2]))
    assert (found.value, found.low, found.high) == (0.2, 0.0, pytest.approx(36.04, abs=0.01))
    head = Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), ("a", "b"))
    text = evaluate_logits(np.array([[2.0, 0.0]]), np.array([0]), head, ("a", "b")).text()
    assert "nan" not in text and "log_loss           0.1269  [0.0000, 36.0437]" in text


@pytest.mark.parametrize("count", [2, 3, 10, 50, 1000])
def test_intervals_of_mean_losses_cover_the_mean(count: int) -> None:
    rng = np.random.default_rng(count)
    drawn = rng.exponential(2.0, (500, count))  # as the losses of a bad head; heavier tails are covered less
    found = [metrics.mean_of(values) for values in drawn]
    assert all(0 <= each.low <= each.value <= each.high for each in found)
    assert np.mean([each.low <= 2.0 <= each.high for each in found]) >= 0.87


def test_students_quantile_is_close_and_never_too_small() -> None:
    for freedom in (1, 2, 3, 5, 10, 30, 1000):
        assert -1e-9 <= metrics.student(freedom) / student.ppf(0.975, freedom) - 1 < 0.4 / freedom**2
