"""The heads that can be fitted, their settings, checked, and `learn`, which fits one."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np

from featx import heads
from featx.errors import HeadError
from featx.head import Fitted
from featx.options import fits, plain
from featx.solvers.examples import Examples
from featx.solvers.training import check_class_weight
from featx.sources.source import Source
from featx.state import ordinary
from featx.text import assigned, near, some

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.I)


def parse_head(text: str) -> tuple[str, dict[str, Any]]:
    """`logreg class_weight=balanced folds=10` as a name and settings; a value is JSON where it reads as such.

    Raises `HeadError` for any other text, and for a head or a setting that does not exist.
    """
    if not isinstance(text, str):
        raise HeadError(f"a head is text, such as 'logreg folds=10', not {text!r}")
    try:
        name, *pairs = shlex.split(text)
        settings = assigned(pairs)
    except ValueError as error:
        raise HeadError(f"{text!r} is not a head's name with settings after it: {error}") from None
    check_settings(name, settings)
    return name, settings


def head_text(name: str, settings: dict[str, Any]) -> str:
    """A head with its settings, as `parse_head` reads it."""
    return shlex.join([name, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())])


def names() -> list[str]:
    """The heads there are: the names of the files in `featx/heads`."""
    return sorted(m.name for m in pkgutil.iter_modules(heads.__path__) if not m.name.startswith("_"))


def able(ability: str) -> str:
    """The heads with an ability, `LEARNS` or `STREAMS`, for a message."""
    return ", ".join(name for name in names() if getattr(module(name), ability))


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings that a head's `fit` takes, by name. Raises `HeadError` for an unknown head.

    A default of None that stands for a value in the head's `DEFAULTS` is replaced by it.
    """
    found = inspect.signature(module(name).fit).parameters.values()
    usual = getattr(module(name), "DEFAULTS", {})
    return {
        p.name: p.replace(default=usual.get(p.name, p.default))
        for p in found
        if p.kind is p.KEYWORD_ONLY and p.name not in ("seed", "device")  # which featx gives, not the user
    }


def check_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, `plain`. Raises `HeadError` for an unknown head, settings that it does not have, and values of
    another type.
    """
    if not isinstance(settings, Mapping):
        raise HeadError(f"settings of a head go by name, such as {{'threshold': 0.5}}, not {settings!r}")
    settings = {key: plain(value) for key, value in settings.items()}
    known, kinds = settings_of(name), get_type_hints(module(name).fit)
    for key, value in settings.items():
        if key not in known:
            others = [other for other in names() if key in settings_of(other)]
            only = f"; {key} is for --head {' and '.join(others)}" if others else ""
            raise HeadError(
                f"--head {name} has no setting {key!r}; there are {', '.join(known)}{only}.{near(key, list(known))}"
            )
        if not fits(value, kinds[key]):
            wanted = known[key].annotation
            wanted = wanted if isinstance(wanted, str) else inspect.formatannotation(wanted)
            raise HeadError(f"the setting {key} of --head {name} is {wanted}, not {value!r}")
    return settings


@functools.cache
def module(name: str) -> ModuleType:
    """The file that fits `name`. Raises `HeadError` for an unknown one, with near matches."""
    if name not in names():
        raise HeadError(f"unknown head {name!r}; there are {', '.join(names())}.{near(name, names())}")
    return importlib.import_module(f"{heads.__name__}.{name}")


def check_heads(chosen: Sequence[tuple[str, Mapping[str, Any]]], source: Source) -> None:
    """Raise `HeadError`, before any image is computed, where the heads cannot be fitted on what `source` is labelled.

    It has no label, all training images have one class, or the labels are numbers that hardly two images share, as the
    target of a regression is; or a head refuses its settings, whatever it learns from. chosen: heads, with settings.
    """
    labels = Counter(filter(None, source.labels or []))
    if not labels:
        raise HeadError(
            f"{source.uri} has no labels: put the images into one folder a class, or name a manifest, or fit "
            "featx.HeadClassifier on features and labels"
        )
    if _like_measurements(labels) and not source.multilabel:
        raise HeadError(
            f"the labels of {source.uri} are {len(labels):,} different numbers for {labels.total():,} images "
            f"({some(list(labels))}), which looks like a regression, and featx answers with classes. Write a label for "
            "each range (such as low and high) in their place; if each number is a class, write a letter before it"
        )
    learners = [(name, settings) for name, settings in chosen if module(name).LEARNS]
    if learners and not source.multilabel:
        pairs = zip(source.labels or [], source.splits or [""] * len(source), strict=True)
        counts = Counter(label for label, split in pairs if label and split in ("", "train"))
        require_classes(counts, list(labels), source.notes)
        for _, settings in learners:
            if isinstance(weights := settings.get("class_weight"), Mapping):
                check_class_weight(weights, list(counts))

    for name, settings in learners:
        if settings:
            _rehearse(name, settings, source.multilabel)


def _rehearse(name: str, settings: Mapping[str, Any], several: bool) -> None:
    """Fit a head to 40 made-up rows: that takes milliseconds, where an extraction may take hours."""
    y = np.arange(40) % 2
    X = np.random.default_rng(0).normal(4.0 * y[:, None], size=(40, 3)).astype(np.float32)
    own = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}  # these name labels
    learn(name, Examples(X, np.stack([y, 1 - y], axis=1) if several else y), ["0", "1"], device="cpu", settings=own)


def require_classes(counts: Mapping[str, int], class_names: Sequence[str], notes: Sequence[str]) -> None:
    """Raise `HeadError` unless training images show at least two classes. counts: how many show each; notes: on the
    source, which may say why.
    """
    if not counts:
        raise HeadError("there are no training images; expected class folders, or train/ with class folders")
    if len(counts) < 2:
        (only, count), *_ = counts.items()
        others = sorted(repr(name) for name in class_names if name != only)
        none = f"; of {', '.join(others[:5])} there is none to learn from: add images" if others else ""
        why = f" ({'; '.join(notes)})" if notes else ""
        raise HeadError(
            f"all {count} training images are {only!r}, and a classifier needs at least two classes{none}{why}"
        )


def _like_measurements(labels: Mapping[str, int]) -> bool:
    """Whether labels, with the images of each, look like numbers to predict rather than names of classes."""
    if len(labels) < 20 or not all(map(_NUMBER.fullmatch, labels)):
        return False
    return len(labels) > sum(labels.values()) / 2 or not all(float(label).is_integer() for label in labels)


@ordinary()
def learn(
    name: str,
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Fitted:
    """Fit a head to examples. Raises `HeadError` for settings that it does not take, for a head that learns nothing,
    and for a table that is read by slices where the head needs it in memory.
    """
    settings, chosen = check_settings(name, settings or {}), module(name)
    if not chosen.LEARNS:
        raise HeadError(f"the {name} head learns nothing from training images; use {able('LEARNS')}")
    if not chosen.STREAMS and not isinstance(examples.X, np.ndarray):
        raise HeadError(
            f"--head {name} holds the features in memory, and {examples.X.shape[0]:,} rows of {examples.X.shape[1]} "
            f"take more than they may; use a head that reads them in parts ({able('STREAMS')}), or a larger --memory"
        )
    fitted: Fitted = chosen.fit(examples, class_names, seed=seed, device=device, **settings)
    return fitted
