"""Imports matplotlib for the names of the fonts here, without the list that it would write into the home folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Where matplotlib keeps its list instead; removed when the process ends."""


def find_fonts() -> set[str]:
    """The names of the installed fonts. Call it before anything imports matplotlib, which asks once where to write.

    Nothing is changed where other code has imported matplotlib before, or `MPLCONFIGDIR` is set. Only Linux and its
    like have variables for these places; elsewhere matplotlib writes its list, once.
    """
    former = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        _KEPT.append(tempfile.TemporaryDirectory(prefix="featx-fonts-"))
        os.environ["XDG_CACHE_HOME"] = _KEPT[0].name
        settings = Path(former["XDG_CONFIG_HOME"] or Path.home() / ".config", "matplotlib")
        if not settings.is_dir():  # matplotlib would make it
            os.environ["XDG_CONFIG_HOME"] = _KEPT[0].name
    from matplotlib import font_manager

    for name, value in former.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    return {font.name for font in font_manager.fontManager.ttflist}


FONTS = find_fonts()
