"""What featx has written beside the images, recognised: nothing learns from it, and `predict` does not answer it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection

from featx.files import read_plain

# The figures of a run and of a sweep, in their folder plots/.
FIGURES = ("confusion", "reliability", "map", "curves", "path", "learning", "mistakes", "predictions", "batch")
FIGURE = re.compile(rf"({'|'.join(FIGURES)})\.png")
# The folders of a cache beside the features; the next run makes again what it needs of them.
MADE_AGAIN = ("engines", "memo", "plans", "rates", "resolved")
# What featx calls everything in a cache's folders.
_CACHED = re.compile(r"[\w.-]*-[0-9a-f]{16}|([0-9a-f]{32}){1,2}(\..*)?|\..*", re.ASCII)
# Files of a run and of a sweep whose names could be anybody's, and what each holds.
_MARKS = {"config.json": (b'"featx"', b'"data_digest"'), "sweep.json": (b'"winner"', b'"points"')}
_MARK_BYTES = 1 << 24


def is_own(path: str, folders: Collection[str], images: Collection[str], others: Collection[str]) -> bool:
    """Whether this folder, which holds these, is a run, a sweep, the figures of one, or one of a cache's folders.

    Its name alone never decides, since a class may be called so; no image is opened.
    """
    name = os.path.basename(path)
    if name in ("features", *MADE_AGAIN) and not images:
        inside = [*folders, *others]
        return bool(inside) and all(_CACHED.fullmatch(each.rstrip("/")) for each in inside)
    if name == "plots" and images:
        return all(FIGURE.fullmatch(each) or each == "trade-off.png" for each in images)
    for mark, words in _MARKS.items():
        if mark in others:
            with contextlib.suppress(OSError):
                data = read_plain(os.path.join(path, mark), _MARK_BYTES)
                return all(word in data for word in words)
    return False
