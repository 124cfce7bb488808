"""Text for people and programs: names made printable, lists made short, near matches, JSON."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from featx.errors import FeatxError

DEEPEST = 64
"""How deep JSON may be nested that is read."""
# Brackets, and texts, whose brackets do not count. A text without an end goes on to the last character: were it tried
# again from its next quote, a crafted file would take hours.
_BRACKETS = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.?)*+"?', re.S)

# Controls, and what hides or turns around the letters near it on a terminal: bidi marks, line ends, empty letters.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
# What a spreadsheet would compute, and a number, which it may.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)


def near(name: object, known: Iterable[str], most: int = 3) -> str:
    """Name what `name` may have meant, as the end of a message: ` Did you mean a, b?`, or nothing."""
    matches = difflib.get_close_matches(str(name), list(known), n=most, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def assigned(pairs: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs as a dict; a value is JSON where it reads as JSON, else text. Raises `FeatxError`."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise FeatxError(f"{pair!r} is not NAME=VALUE")
        try:
            values[name] = from_json(text)
        except ValueError:
            values[name] = text
    return values


def printable(name: str) -> str:
    """`name` as text that any UTF-8 terminal or file takes: bytes that are not UTF-8, control characters and those
    that hide or turn letters around are written as escapes, `caf\\udce9.jpg`, `two\\x0alines.jpg`, `\\u202e`."""
    return _HIDDEN.sub(lambda found: ("\\x%02x" if found[0] < "\xff" else "\\u%04x") % ord(found[0]), encodable(name))


def cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would compute, `=1+1`, has `'` before it, and is `printable`."""
    if not isinstance(value, str):
        return value
    return "'" * bool(_FORMULA.match(value) and not _NUMBER.fullmatch(value)) + printable(value)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, for a message: `a, b, c and 7 more`."""
    text = ", ".join(printable(name) for name in names[:most])
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text


def prose(text: str) -> str:
    """Lines for people, which stay lines: within one, control characters and bytes that are not UTF-8 are escaped.

    A name that goes into several lines goes through `printable` first, or its own line ends would count.
    """
    return "\n".join(printable(line) for line in text.split("\n"))


def encodable(text: str) -> str:
    """Text for programs, which any UTF-8 stream takes: undecodable bytes of a file's name as `\\udcNN`."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_json(values: Any) -> str:
    """JSON that any reader takes: names in their own letters, but bytes of a file's name that are not UTF-8
    (lone surrogates in Python) as `\\udcXX`, which reads back as it was; NaN is refused."""
    return encodable(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def escaped(json_text: str, encoding: str) -> str:
    """JSON as a stream of this encoding takes it: letters that it has not are `\\u` escapes, which read the same."""
    try:
        json_text.encode(encoding)
    except UnicodeEncodeError:
        return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], json_text)
    return json_text


def from_json(data: bytes | str) -> Any:
    """JSON as RFC 8259 has it: without NaN and Infinity, numbers of at most 64 bits, nested at most `DEEPEST` deep.

    Raises `ValueError`.
    """
    text = data.decode() if isinstance(data, bytes) else data
    if text.count("[") + text.count("{") > DEEPEST:
        depth = 0
        for found in _BRACKETS.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
    return json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:40]} has more than 64 bits")
    return int(text)
