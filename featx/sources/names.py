"""Names in data sets: which say a split, which are one class."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

from featx.text import printable

# what people call their splits, as a folder or in a manifest's column, in any case; words such as `set` may be added
SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "evaluation", "holdout", "pred", "prediction"), "test"),
}
# words that say no more of a folder, or of a split, than that images are in it
PLAIN = {
    *("set", "sets", "data", "dataset", "datasets", "split", "images", "image", "imgs", "img", "pictures", "photos"),
    *("files", "folder", "jpg", "jpeg", "jpegs", "png", "raw", "categories", "samples"),
}
_OWNERS = {"my", "our", "public", "private"}
_FUSED = re.compile(rf"({'|'.join(SPLITS)})({'|'.join(PLAIN)})")
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


def words(name: str) -> list[str]:
    """The words of a name, in lower case and without numbers: `Test Set_2`, `testSet` and `testset` are two."""
    name = re.sub(r"(?i)h[eo]ld[\W_]?out", "holdout", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    parts = re.findall(r"[^\W\d_]+", name)
    fused = [_FUSED.fullmatch(part.lower()) for part in parts]
    return [word for part, two in zip(parts, fused, strict=True) for word in (two.groups() if two else [part.lower()])]


@functools.lru_cache(4096)
def split_of(name: str) -> tuple[str, str]:
    """The split that a name says, or ""; and its other words: `cars_train` may be a split, or trains of a kind.

    Beside a word such as `set` or `images`, other words do not count: `cars_train_images` is a split.
    """
    found = words(name)
    said = [word for word in found if word in SPLITS]
    others = [word for word in found if word not in SPLITS and word not in _OWNERS and len(word) > 1]
    if len(said) != 1:
        return "", ""
    return SPLITS[said[0]], " ".join(others) if PLAIN.isdisjoint(others) else ""


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Those of these names that are called like splits, and which: `cars_train` only if `cars_test` is there, too."""
    said = {name: split_of(name) for name in names}
    kinds = set(said.values())
    several = {rest for split, rest in kinds if split and any(rest == r and s not in ("", split) for s, r in kinds)}
    return {name: split for name, (split, rest) in said.items() if split and (not rest or rest in several)}


@functools.lru_cache(4096)
def class_name(text: str) -> str:
    """A class's name as it is learned: names that look alike are one (NFC; blanks once, at no end; nothing invisible).

    Always valid text.
    """
    return printable(" ".join(unicodedata.normalize("NFC", text.translate(_INVISIBLE)).split()))


def differ_in_case(names: Iterable[str]) -> list[str]:
    """A sentence for each pair of classes that differ in upper and lower case alone: most are one class, misspelt."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(name.casefold(), name), name) for name in sorted(set(names))]
    return [f"{a!r} and {b!r} are two classes, which differ in upper and lower case alone" for a, b in pairs if a != b]
