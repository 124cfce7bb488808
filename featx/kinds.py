"""Values that users give as settings: whether they have the type that is wanted, and how they are kept as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

NUMBERS: dict[Any, type] = {int: Integral, float: Real}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` has the type `kind`, as `typing.get_type_hints` gives it; items of containers are not checked.

    A whole number counts as a float, True and False do not count as numbers, and anything but text counts as a
    sequence, so that one number may stand for a sequence of one.
    """
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is Sequence:
        return not isinstance(value, str)
    if origin is bool:
        return isinstance(value, bool | np.bool_)
    if origin in NUMBERS:
        return isinstance(value, NUMBERS[origin]) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin)


def plain(value: Any) -> Any:
    """A setting as JSON gives it back: tuples and arrays are lists, numpy's numbers are Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
