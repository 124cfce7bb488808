"""Opens a data set: a folder, or a manifest by its suffix."""

from __future__ import annotations

import os
import stat
from typing import Any

from featx.errors import SourceError
from featx.options import home
from featx.sources.source import Source
from featx.text import near, printable


def open_source(uri: Any) -> Source:
    """List a data set: a folder of images, or a `.csv`, `.jsonl` or `.parquet` manifest; a `Source` is returned, and
    anything else holds images without labels, see `featx.sources.memory`.

    Folders: `root/class/**/*.jpg`, `root/{train,val,test}/class/**/*.jpg`, or images without labels
    directly in `root`. docs/data.md shows each. Raises `SourceError` for anything else.
    """
    if isinstance(uri, Source):
        return uri
    if not isinstance(uri, str | os.PathLike):
        from featx.sources.memory import Images

        return Images.of(uri)
    path = os.fspath(home(uri))
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise SourceError(f"{printable(path)} is a link to nothing") from None
        raise SourceError(f"there is no {printable(path) or 'data set with an empty name'}.{_near(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{printable(path)} cannot be opened ({reason})") from error
    if stat.S_ISDIR(found.st_mode):
        from featx.sources import folder

        return folder.open_folder(path)
    from featx.sources import manifest

    if os.path.splitext(path)[1].lower() not in manifest.READERS or not stat.S_ISREG(found.st_mode):
        raise SourceError(
            f"{printable(path)} is neither a folder of images nor a manifest "
            f"({', '.join(manifest.READERS)}); for one image, give the folder it lies in"
        )
    return manifest.open_manifest(path)


def _near(path: str) -> str:
    above, name = os.path.split(os.path.abspath(path))
    try:
        return near(name, os.listdir(above))
    except OSError:
        return f" Nor is there a folder {printable(above)}."
