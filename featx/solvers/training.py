"""What every trained head shares: checked input, scaling, folds, calibration, the reject threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np

from featx import metrics
from featx.errors import HeadError
from featx.features import Rows
from featx.head import Activation, Head
from featx.solvers.examples import Examples

BLOCK = 1 << 22  # numbers read at a time, 16 MB as float32
# A column whose spread is below this share of its mean is rounding noise, not information.
CONSTANT = 1e-6
# Logits are clipped this far below the highest: a probability of 1e-26 changes no sum, and smaller ones would
# make the products denormal, which takes ten times as long.
FLOOR = -60.0
LEAST_REJECT = 0.5
"""Nobody asks for answers that are wrong more often than right: a smaller `reject` means something else."""


def blocks(X: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """Row ranges and their features as `float32 [B, D]`."""
    size = max(64, BLOCK // X.shape[1])
    for start in range(0, X.shape[0], size):
        rows = slice(start, min(start + size, X.shape[0]))
        yield rows, np.asarray(X[rows], np.float32)


@dataclass(frozen=True, eq=False)
class Task:
    """Checked training data."""

    X: Rows
    y: np.ndarray
    """`int64 [N]` in [0, C); for several labels per image `float32 [N, C]` of 0 and 1."""
    class_names: tuple[str, ...]
    """C names; those without a training image are left out and named in `notes`."""
    mean: np.ndarray
    """`float64 [D]`."""
    scale: np.ndarray
    """`float64 [D]`: the standard deviation (of N). Infinite for constant columns, which standardises them to 0
    and folds whatever weight they have to exactly 0."""
    notes: list[str] = field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.y.ndim == 2

    def standardise(self, part: np.ndarray) -> np.ndarray:
        """Rows of X `[B, D]`, standardised, `float32`."""
        out = np.asarray(part, np.float32) - self.mean.astype(np.float32)
        out /= self.scale.astype(np.float32)
        return out

    def standard(self) -> np.ndarray:
        """All features, standardised, `float32 [N, D]`, in memory."""
        out = np.empty(self.X.shape, np.float32)
        for rows, part in blocks(self.X):
            out[rows] = self.standardise(part)
        return out

    def one_hot(self) -> np.ndarray:
        """Targets, `float32 [N, C]`."""
        if self.several:
            return self.y.astype(np.float32)
        return np.asarray(np.eye(len(self.class_names), dtype=np.float32)[self.y])

    def head(self, weight: np.ndarray, bias: np.ndarray) -> Head:
        """The head for raw features, from weight `[C, D]` and bias `[C]` fitted on standardised ones."""
        weight = np.asarray(weight, np.float64) / self.scale
        bias = np.asarray(bias, np.float64) - weight @ self.mean
        activation: Activation = "sigmoid" if self.several else "softmax"
        return Head(weight.astype(np.float32), bias.astype(np.float32), self.class_names, activation)


def check(X: Rows, y: np.ndarray, class_names: Sequence[str]) -> Task:
    """Check training data and measure its columns, in one pass over X.

    X: float `[N, D]`; y: `int [N]` in [0, C), or 0/1 `[N, C]` for several labels per image.
    Raises `HeadError` for shapes or labels that do not fit, NaN or infinite features (the first such row is named),
    fewer than two classes with images, and features that are all constant.
    """
    y, names, notes = np.asarray(y), list(class_names), []
    if len(X.shape) != 2 or not X.shape[0] or not X.shape[1]:
        raise HeadError(f"expected features [N, D] with rows and columns, got {list(X.shape)}")
    if len(y) != X.shape[0]:
        raise HeadError(f"{X.shape[0]} rows of features and {len(y)} labels do not match")

    if y.ndim == 2:
        if y.shape[1] != len(names) or not np.isin(y, (0, 1)).all():
            raise HeadError(f"several labels per image need 0/1 targets [N, {len(names)}], got {list(y.shape)}")
        count = y.sum(axis=0)
        kept = np.flatnonzero((count > 0) & (count < len(y)))
        if not len(kept):
            raise HeadError("every label is on all images or on none; there is nothing to tell apart")
        y = y[:, kept].astype(np.float32)
    else:
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= len(names):
            raise HeadError(f"expected labels as int [N] in [0, {len(names)}), got {y.dtype} {list(y.shape)}")
        kept, y = np.unique(y, return_inverse=True)
        if len(kept) < 2:
            raise HeadError(f"all {len(y)} training images are {names[kept[0]]!r}; a head needs at least two classes")
        if len(kept) > len(y) // 2:
            notes.append(f"{len(kept)} classes for {len(y)} training images: expect little")

    left_out = sorted(set(range(len(names))) - set(kept.tolist()))
    if left_out:
        some = ", ".join(repr(names[i]) for i in left_out[:5])
        notes.append(f"{len(left_out)} classes cannot be learned from these training images: {some}")

    mean, scale, constant = _columns(X)
    if constant.all():
        raise HeadError("all features are constant: every image looks the same to this backbone and layer")
    if constant.any():
        notes.append(f"{int(constant.sum())} of {len(constant)} feature columns are constant and get no weight")
    return Task(X, y, tuple(names[i] for i in kept), mean, scale, notes)


def _columns(X: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and constancy of each column; sums are relative to the first row: nothing cancels."""
    first = np.asarray(X[0:1], np.float32)
    total, squares = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for rows, part in blocks(X):
        for start in range(0, len(part), 512):  # small enough to stay in the cache
            with np.errstate(over="ignore", invalid="ignore"):
                centred = part[start : start + 512] - first
                total += np.ones(len(centred), np.float32) @ centred
                squares += np.einsum("nd,nd->d", centred, centred)
        if not (np.isfinite(total).all() and np.isfinite(squares).all()):
            bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
            where = f"row {rows.start + bad[0]}" if len(bad) else f"rows {rows.start} to {rows.stop}"
            raise HeadError(
                f"the features hold NaN, infinity or numbers beyond float32 ({where}); extract these images "
                "again, in fp32"
            )
    offset = total / X.shape[0]
    mean = first[0].astype(np.float64) + offset
    scale = np.sqrt(np.maximum(squares / X.shape[0] - offset**2, 0.0))
    constant = scale <= CONSTANT * np.abs(mean)
    # rounded to float32, so that standardising in float32 and folding back use the same numbers
    mean, scale = (a.astype(np.float32).astype(np.float64) for a in (mean, np.where(constant, np.inf, scale)))
    return mean, scale, constant


def ascending(values: Sequence[float], says: str) -> np.ndarray:
    """The distinct values, ascending, `float64 [S]`. Unless all are positive and finite, raises `HeadError` with
    `says` in front.
    """
    found = np.unique(np.asarray(values, np.float64))
    if not len(found) or not found[0] > 0 or not np.isfinite(found).all():
        raise HeadError(f"{says}, not {list(values)}")
    return found


def prepared(
    examples: Examples, class_names: Sequence[str], count: int, seed: int
) -> tuple[Task, np.ndarray, np.ndarray]:
    """A checked task, with notes on its folds, too; its `folds`, `int64 [N]`, `count` of them; and the rows that are
    measured when they are held out, `bool [N]`.
    """
    task = check(examples.X, examples.y, class_names)
    fold, notes = folds(task.y, count, groups=examples.groups, seed=seed)
    return replace(task, notes=[*task.notes, *notes]), fold, counted(fold >= 0, examples.scored)


def folds(
    y: np.ndarray, count: int, *, groups: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Stratified cross-validation folds that split no group.

    y: `int [N]`, or 0/1 `[N, C]` (stratified by each row's rarest label); groups: `int [N]` or None.
    Returns `int64 [N]`, the fold in which a row is held out, -1 for never: a class with a single group is
    always trained on, since no fold could both learn and measure it. Empty folds do not occur; there may
    be fewer than `count`, or none (all -1). The second value says so in sentences. Raises `HeadError` for a
    `count` that is not a whole number of at least 2.
    """
    if not isinstance(count, Integral) or count < 2:
        raise HeadError(f"folds is a whole number of at least 2 (5 is usual), not {count!r}")
    unit, size, label, alone, notes = _units(y, groups)
    used = min(count, int((~alone).sum()))
    if used < 2:
        return np.full(len(y), -1), notes

    order = np.random.default_rng(seed).permutation(len(size))
    order = order[np.lexsort((-size[order], label[order]))]  # class by class, large groups first
    held = order[~alone[order]]
    fold_of = np.full(len(size), -1)
    if (size == 1).all():
        fold_of[held] = np.arange(len(held)) % used  # dealt round, class after class
    else:
        number = np.unique(label, return_inverse=True)[1]
        per_class, load = np.zeros((number.max() + 1, used), np.int64), np.zeros(used, np.int64)
        for group in held:
            # the fold with fewest of this class, then the emptiest
            fold = int(np.lexsort((load, per_class[number[group]]))[0])
            fold_of[group] = fold
            per_class[number[group], fold] += size[group]
            load[fold] += size[group]
        filled, fold_of[held] = np.unique(fold_of[held], return_inverse=True)
        used = len(filled)
    if used < count:
        notes.append(f"cross-validated with {used} folds instead of {count}: there are too few images")
    return fold_of[unit], notes


def measurable(y: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
    """`bool [N]`: the rows whose class can still be learned when they are left out with their group, which are
    those that `folds` would hold out; and sentences on the others.
    """
    unit, _, _, alone, notes = _units(y, groups)
    return ~alone[unit], notes


def _units(
    y: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Each row's group, `int [N]`; of each group the size, the class and whether it is its class's only one,
    `[G]` each; and sentences on the classes that cannot be measured.
    """
    if y.ndim == 2:
        rarity = np.argsort(np.argsort(y.sum(axis=0), kind="stable"))
        y = np.where(y.any(axis=1), np.where(y > 0, rarity, y.shape[1]).min(axis=1), y.shape[1])
    groups = np.arange(len(y)) if groups is None else groups
    _, unit, size = np.unique(groups, return_inverse=True, return_counts=True)
    first = np.full(len(size), -1)
    first[unit[::-1]] = np.arange(len(y))[::-1]
    label = y[first]  # a group's class is its first row's
    _, inverse, many = np.unique(label, return_inverse=True, return_counts=True)
    alone = many[inverse] == 1
    notes = []
    if alone.any():
        notes.append(
            f"{int(alone.sum())} classes have one distinct training image: always trained on, never "
            "measured in cross-validation"
        )
    if alone.all():
        notes.append("too few images to cross-validate")
    return unit, size, label, alone, notes


def counted(able: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
    """The rows on which a fit measures, `bool [N]`: those that can be held out (`able`) and are `scored` (`bool [N]`,
    None for all). Raises `HeadError` for a `scored` of another dtype or shape.
    """
    if scored is None:
        return able
    if scored.dtype != bool or scored.shape != able.shape:
        raise HeadError(
            f"scored marks the rows to measure on, bool [{len(able)}], not {scored.dtype} {list(scored.shape)}"
        )
    return np.asarray(able & scored)


def class_weights(task: Task, class_weight: str | None) -> np.ndarray | None:
    """Row weights `float64 [N]` with mean 1, None for all 1. `balanced`: N / (C * images of the class).

    Raises `HeadError` for another `class_weight`, and for `balanced` with several labels per image.
    """
    if class_weight is None:
        return None
    if class_weight != "balanced":
        raise HeadError(f"class_weight is None or 'balanced', not {class_weight!r}")
    if task.several:
        raise HeadError("class_weight='balanced' needs one label per image")
    counts = np.bincount(task.y)
    return np.asarray((len(task.y) / (len(counts) * counts))[task.y])


def finish(
    head: Head,
    task: Task,
    info: dict[str, Any],
    held_out: np.ndarray | None,
    counted: np.ndarray,
    *,
    measured_on: str = "held-out folds of the training images",
    calibrate: bool,
    threshold: float | None,
    reject: float | None,
) -> Head:
    """Apply what is measured on held-out rows: a calibration temperature, then a reject threshold.

    held_out: logits `[M, C]` of the rows `counted`, `bool [N]`, each by the fold that left it out; None without
    such rows. threshold: the probability below which an answer is rejected; reject: an accuracy in [0.5, 1), which
    takes the lowest threshold that reaches it on held-out rows. Writes its figures to `info`. Raises `HeadError`
    for both at once, numbers out of range, `reject` with several labels per image, and held-out rows that are missing.
    """
    if reject is not None and not LEAST_REJECT <= reject < 1:
        meant = f"reject={reject / 100:g}" if 50 <= reject < 100 else "reject=0.95"
        raise HeadError(
            f"reject is the accuracy that answers must reach, at least {LEAST_REJECT} and below 1, not {reject}: with "
            f"{meant} the images of whose class the head is not sure enough are rejected, as many as that takes"
        )
    if threshold is not None and reject is not None:
        raise HeadError("give threshold (a probability) or reject (an accuracy to reach), not both")
    if not (calibrate or threshold is not None or reject is not None):
        return head
    if task.several and reject is not None:
        raise HeadError("reject needs one label per image")
    if held_out is None:
        if calibrate or reject is not None:
            raise HeadError("calibration and reject need held-out folds; there are too few training images")
        return _with(head, 1.0, threshold)

    y, temperature = task.y[counted], 1.0
    if calibrate:
        temperature = _temperature(held_out, y)
        info["calibration"] = {
            "temperature": temperature,
            "ece_before": _ece(head, held_out, y),
            "ece_after": _ece(head, held_out / temperature, y),
            "measured_on": measured_on,
        }

    if not task.several and (threshold is not None or reject is not None):
        probabilities = head.probabilities(held_out / temperature)
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
        if reject is not None:
            threshold = _threshold(confidence, right, reject)
        answered = confidence >= threshold
        info["rejection"] = {
            "threshold": threshold,
            "coverage": float(answered.mean()),
            "accuracy": float(right[answered].mean()) if answered.any() else 0.0,
            "accuracy_without": float(right.mean()),
            "measured_on": measured_on,
        }
    return _with(head, temperature, threshold)


def _with(head: Head, temperature: float, threshold: float | None) -> Head:
    if threshold is not None and not 0 <= threshold <= 1:
        raise HeadError(f"a threshold is a probability in [0, 1], not {threshold}")
    weight, bias = head.weight / np.float32(temperature), head.bias / np.float32(temperature)
    return Head(weight, bias, head.class_names, head.activation, threshold)


def _ece(head: Head, logits: np.ndarray, y: np.ndarray) -> float:
    p = head.probabilities(logits)
    if y.ndim == 2:
        said = head.answers(p)
        return metrics.calibration_error(np.where(said, p, 1 - p).ravel(), (said == (y > 0)).ravel())
    return metrics.calibration_error(p.max(axis=1), p.argmax(axis=1) == y)


def _temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """The most probable temperature in [1/1000, 1000]: least log-loss, summed over rows, plus `(log T)^2 / 2`.

    That term is a standard normal prior on log T. Few rows are often all answered right; their log-loss falls
    for ever as T goes to 0, and the first mistake on a new image then costs all that was gained. A weak prior
    is the remedy of Gelman, Jakulin, Pittau and Su (2008, Annals of Applied Statistics 2, 1360-1383) for
    logistic regression on linearly separable rows. At T = 1/5 or 5 it weighs as much as two rows answered blindly, so
    it hardly affects hundreds of images with some mistakes among them. T = 1 is a natural centre: probabilities
    of a logistic fit, ridge's scores of -1 and 1, distances over sqrt(D). Platt's smoothed targets (1999), the
    other usual remedy, give new rows a higher log-loss, except for logistic fits to fewer than a hundred images.

    Newton's method over `-log T`; a step out of the bracket is replaced by a bisection.
    """
    z = np.asarray(logits, np.float64)
    low, high, u = -np.log(1e3), np.log(1e3), 0.0
    for _ in range(60):
        scale = np.exp(u)
        if y.ndim == 2:
            p = 0.5 * (1 + np.tanh(0.5 * scale * z))
            slope, curve = (z * (p - y)).sum(), (z * z * p * (1 - p)).sum()
        else:
            p = np.exp(scale * (z - z.max(axis=1, keepdims=True)))
            p /= p.sum(axis=1, keepdims=True)
            mean = np.einsum("nc,nc->n", p, z)
            slope = (mean - z[np.arange(len(y)), y]).sum()
            curve = np.einsum("nc,nc,nc->", p, z, z) - (mean**2).sum()
        # from derivatives over 1 / T to those over its logarithm, and the prior's
        slope, curve = scale * slope + u, scale**2 * curve + scale * slope + 1
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / curve if curve > 0 else np.inf
        if abs(step - u) < 1e-6:
            break
        u = float(step) if low < step < high else float(low + high) / 2
    return float(np.exp(-u))


def _threshold(confidence: np.ndarray, right: np.ndarray, accuracy: float) -> float:
    """The lowest confidence from which on the answers reach `accuracy`; HeadError where none does."""
    order = np.argsort(-confidence, kind="stable")
    reached = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence[order]) != 0, True)  # equal confidences are answered together
    good = np.flatnonzero((reached >= accuracy) & last)
    if not len(good):
        raise HeadError(f"no threshold reaches an accuracy of {accuracy:.3g} on held-out images")
    return float(confidence[order[good[-1]]])
