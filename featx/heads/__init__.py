"""The heads that can be fitted: one file each, whose name is what users type; their settings, checked."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import numpy as np

from featx.errors import HeadError
from featx.text import near

# What a setting's annotation takes, by its words; settings of other kinds (sequences, mappings) check themselves.
KINDS: dict[str, Any] = {"int": Integral, "float": Real, "bool": (bool, np.bool_), "str": str, "None": type(None)}


def names() -> list[str]:
    """The heads there are: the names of the files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings that a head's `fit` takes, by name. Raises `HeadError` for an unknown head.

    Where a default of None stands for one in the head's `DEFAULTS`, that one is given.
    """
    given = ("groups", "seed", "device", "scored")  # by featx, not by the user
    found = inspect.signature(module(name).fit).parameters.values()
    usual = getattr(module(name), "DEFAULTS", {})
    return {
        p.name: p.replace(default=usual.get(p.name, p.default))
        for p in found
        if p.kind is p.KEYWORD_ONLY and p.name not in given
    }


def scoring(name: str, scored: np.ndarray) -> dict[str, np.ndarray]:
    """`scored` (`bool [N]`, the rows to measure on) as keywords for a head's `fit`: none if it measures nothing."""
    return {"scored": scored} if "scored" in inspect.signature(module(name).fit).parameters else {}


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise `HeadError` for settings that the head does not have, or that are of another kind than it wants."""
    known = settings_of(name)
    for key, value in settings.items():
        if key not in known:
            only = "; --restrict and --map are for --head pretrained" if key in ("restrict", "mapping") else ""
            raise HeadError(
                f"--head {name} has no setting {key!r}; there are {', '.join(known)}{only}.{near(key, list(known))}"
            )
        wanted = known[key].annotation
        wanted = wanted if isinstance(wanted, str) else inspect.formatannotation(wanted)
        if not _is(value, wanted):
            raise HeadError(f"the setting {key} of --head {name} is {wanted}, not {value!r}")


def _is(value: Any, wanted: str) -> bool:
    """Whether a value is of an annotation's kind; True and False are no numbers, whole numbers are floats."""
    words = re.sub(r"\[.*\]", "", wanted).replace(" ", "").split("|")
    if any(word not in KINDS for word in words):
        return "str" in words or not isinstance(value, str)
    return any(isinstance(value, KINDS[word]) and (word == "bool" or not isinstance(value, bool)) for word in words)


def module(name: str) -> ModuleType:
    """The file that fits `name`. Raises `HeadError` for an unknown one, with near matches."""
    if name not in names():
        raise HeadError(f"unknown head {name!r}; there are {', '.join(names())}.{near(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
