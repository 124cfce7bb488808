"""The heads that can be fitted, their settings, checked, and `learn`, which fits one."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import shlex
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np

from featx import heads
from featx.errors import HeadError
from featx.head import Fitted
from featx.options import fits, plain
from featx.solvers.examples import Examples
from featx.state import ordinary
from featx.text import assigned, near


def parse_head(text: str) -> tuple[str, dict[str, Any]]:
    """`logreg class_weight=balanced folds=10` as a name and settings; a value is JSON where it reads as such.

    Raises `HeadError` for any other text, and for a head or a setting that does not exist.
    """
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
