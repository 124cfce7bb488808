"""What every trained head shares: checked input, scaling, weights, folds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

import numpy as np

from featx.errors import HeadError
from featx.features import Rows
from featx.head import Activation, Head
from featx.options import fits
from featx.solvers.examples import Examples
from featx.solvers.moments import Asked, moments
from featx.text import near

BLOCK = 1 << 22  # numbers read at a time, 16 MB as float32
# A column whose spread is below this share of its mean is rounding noise, not information.
CONSTANT = 1e-6
# Logits are clipped this far below the highest: a probability of 1e-26 changes no sum, and smaller ones would
# make the products denormal, which takes ten times as long.
FLOOR = -60.0
EMPTY = np.zeros(0)


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
    weights: np.ndarray | None = None
    """`float64 [N]`, see `Examples`."""
    gram: np.ndarray | None = None
    """`float64 [D, D]`: the products of standardised columns, summed over rows, which count by their weights (of mean
    1). None where rows are so few that they are rotated themselves, and where nobody asked."""
    sums: np.ndarray = field(default_factory=lambda: EMPTY)
    """`float64 [kinds, targets, D]`: standardised rows, summed like `gram`, as `Asked` says."""
    totals: np.ndarray = field(default_factory=lambda: EMPTY)
    """`float64 [kinds, targets]`: the weights in `sums`."""
    kept: np.ndarray = field(default_factory=lambda: EMPTY)
    """`float32 [n, D]`: the rows that were asked for, as they are."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.y.ndim == 2

    def standardise(self, part: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows of X `[B, D]`, standardised, `float32`, written to `out` where it is given."""
        out = np.subtract(np.asarray(part, np.float32), self.mean.astype(np.float32), out=out)
        out /= self.scale.astype(np.float32)
        return out

    def standard(self) -> np.ndarray:
        """All features, standardised, `float32 [N, D]`, in memory."""
        out = np.empty(self.X.shape, np.float32)
        for rows, part in blocks(self.X):
            self.standardise(part, out[rows])
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


def check(
    X: Rows, y: np.ndarray, class_names: Sequence[str], weights: np.ndarray | None = None, *, gram: bool = True
) -> Task:
    """Check training data and measure its columns, in one pass over X.

    X: float `[N, D]`; y: `int [N]` in [0, C), or 0/1 `[N, C]` for several labels per image; weights: see `Examples`;
    gram: whether the products of columns are wanted.
    Raises `HeadError` for shapes, labels or weights that do not fit, NaN or infinite features (the first such row is
    named), fewer than two classes with images, and features that are all constant.
    """
    return measured(labelled(X, y, class_names, weights), Asked(gram))


def labelled(X: Rows, y: np.ndarray, class_names: Sequence[str], weights: np.ndarray | None) -> Task:
    """A task whose labels and weights are checked, and whose columns are not measured yet."""
    y, names, notes = np.asarray(y), list(class_names), []
    if len(X.shape) != 2 or not X.shape[0] or not X.shape[1]:
        raise HeadError(f"expected features [N, D] with rows and columns, got {list(X.shape)}")
    if len(y) != X.shape[0]:
        raise HeadError(f"{X.shape[0]} rows of features and {len(y)} labels do not match")
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        if weights.shape != y.shape[:1] or not (np.isfinite(weights) & (weights > 0)).all():
            raise HeadError(f"weights are {len(y)} finite numbers above 0; leave rows of weight 0 out")

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

    return Task(X, y, tuple(names[i] for i in kept), EMPTY, EMPTY, notes, weights)


def measured(task: Task, asked: Asked) -> Task:
    """The task with what one pass over its rows gathers. Raises `HeadError`, see `check`."""
    X, notes, shares = task.X, task.notes, None
    if task.weights is not None:
        shares = (task.weights / task.weights.mean()).astype(np.float32)
    asked = replace(asked, gram=asked.gram and spanned(X))
    found, kept = moments(X, shares, asked)
    squares = np.diagonal(found.squares) if asked.gram else found.squares
    scale = np.sqrt(np.maximum(squares / found.weight, 0.0))
    constant = scale <= CONSTANT * np.abs(found.mean)
    if constant.all():
        raise HeadError("all features are constant: every image looks the same to this backbone and layer")
    if constant.any():
        notes = [*notes, f"{int(constant.sum())} of {len(constant)} feature columns are constant and get no weight"]

    # rounded to float32, so that standardising in float32 and folding back use the same numbers
    mean, scale = (a.astype(np.float32).astype(np.float64) for a in (found.mean, np.where(constant, np.inf, scale)))
    off, gram = found.mean - mean, None
    if asked.gram:
        gram = (found.squares + found.weight * np.outer(off, off)) / scale / scale[:, None]
    sums = (found.sums + found.totals[..., None] * off) / scale
    return replace(task, mean=mean, scale=scale, notes=notes, gram=gram, sums=sums, totals=found.totals, kept=kept)


def summed(task: Task, fold: np.ndarray, *, gram: bool = False) -> tuple[Task, np.ndarray, np.ndarray]:
    """A `measured` task, and its standardised rows summed by fold and class, `float64 [F + 1, C, D]`, with their summed
    weights, `[F + 1, C]`; the last fold is -1. With several labels per image, C are the labels and then their absences.
    """
    held = np.where(fold < 0, fold.max() + 1, fold)
    folds, classes = int(fold.max()) + 2, len(task.class_names)
    if task.several:
        asked = Asked(gram, held, folds, np.concatenate([task.y, 1 - task.y], axis=1))
    else:
        asked = Asked(gram, held * classes + task.y, folds * classes)
    task = measured(task, asked)
    return task, task.sums.reshape(folds, -1, task.X.shape[1]), task.totals.reshape(folds, -1)


def spanned(X: Rows) -> bool:
    """Whether a table is solved in its columns' space, not in that of its fewer rows."""
    return X.shape[0] >= X.shape[1] or streamed(X)


def streamed(X: Rows) -> bool:
    """Whether a table is read from a disk, pass by pass."""
    return isinstance(X, np.memmap) or not isinstance(X, np.ndarray)


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
    """A task with checked labels, with notes on its folds, too; its `folds`, `int64 [N]`, `count` of them; and the rows
    that are measured when they are held out, `bool [N]`. Its columns are left to `measured`.
    """
    task = labelled(examples.X, examples.y, class_names, examples.weights)
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
    unit, size, label, alone, notes = units(y, groups)
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
    unit, _, _, alone, notes = units(y, groups)
    return ~alone[unit], notes


def units(y: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Each row's group, `int [N]`; of each group the size, the class and whether it is its class's only one,
    `[G]` each; and sentences on the classes that cannot be measured.
    """
    if y.ndim == 2:
        rarity = np.argsort(np.argsort(y.sum(axis=0), kind="stable"))
        y = np.where(y.any(axis=1), np.where(y > 0, rarity, y.shape[1]).min(axis=1), y.shape[1])
    groups = np.arange(len(y)) if groups is None else groups
    _, unit, size = np.unique(groups, return_inverse=True, return_counts=True)
    label = np.full(len(size), np.iinfo(np.int64).max)
    np.minimum.at(label, unit, y)  # a group's class is its smallest, whatever the order of its rows
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


def check_class_weight(class_weight: Mapping[str, float], known: Sequence[str]) -> None:
    """Raise `HeadError` for weights of other classes than those known, or that are not above 0."""
    for name, weight in class_weight.items():
        if name not in known:
            raise HeadError(f"class_weight names {name!r}, of which there is no training image.{near(name, known)}")
        if not fits(weight, float) or not 0 < weight < np.inf:
            raise HeadError(
                f"the weight of a class is a number above 0, not {weight!r}; to leave a class out, leave its images out"
            )


def class_weights(task: Task, class_weight: str | Mapping[str, float] | None) -> np.ndarray | None:
    """Row weights `float64 [N]`, those of the task times those of the classes; None for all 1.

    class_weight: `balanced` (N / (C * images of the class), each image counted by its weight), or weights above 0 by
    class name, 1 for a name that is left out. Raises `HeadError` for others, and with several labels per image.
    """
    if class_weight is None:
        return task.weights
    if task.several:
        raise HeadError(f"class_weight={class_weight!r} needs one label per image")
    own = np.ones(len(task.y)) if task.weights is None else task.weights
    if class_weight == "balanced":
        totals = np.bincount(task.y, own)
        return np.asarray(own * (totals.sum() / (len(totals) * totals))[task.y])
    if isinstance(class_weight, str):
        raise HeadError(f"class_weight is None or 'balanced', or weights by class name, not {class_weight!r}")
    check_class_weight(class_weight, task.class_names)
    return np.asarray(own * np.array([float(class_weight.get(name, 1)) for name in task.class_names])[task.y])
