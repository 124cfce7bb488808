"""The fonts that matplotlib finds here, without the list of them that it would write into the home folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Where matplotlib keeps its list instead; removed when the process ends."""


def names() -> set[str]:
    """The names of the installed fonts. To be called before matplotlib is imported: it asks once where to write.

    Where other code has imported matplotlib before, or its own `MPLCONFIGDIR` is set, all stays as it is. Only Linux
    and its like have variables for these places; elsewhere the list is written, once.
    """
    former = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        _KEPT.append(tempfile.TemporaryDirectory(prefix="featx-fonts-"))
        os.environ["XDG_CACHE_HOME"] = _KEPT[0].name
        settings = Path(former["XDG_CONFIG_HOME"] or Path.home() / ".config", "matplotlib")
        if not settings.is_dir():  # it would be made
            os.environ["XDG_CONFIG_HOME"] = _KEPT[0].name
    from matplotlib import font_manager

    for name, value in former.items() if _KEPT else ():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    return {font.name for font in font_manager.fontManager.ttflist}


THERE = names()
