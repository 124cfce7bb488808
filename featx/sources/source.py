"""`Source`: the list of a data set's images, and how one of them is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from featx.errors import ImageError, SourceError
from featx.options import home
from featx.sources.columns import Names, Texts

# The suffixes of images in a folder, in any case: those of torchvision.datasets.ImageFolder, and what phones, browsers
# and cameras write since.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe", ".mpo", ".avif", ".heic", ".heif", ".hif", ".pbm", ".pnm"),
)
# Suffixes of other pictures: a folder's user may think that featx reads them.
UNREAD = [".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".xcf", ".svg", ".eps", ".ico", ".tga", ".exr", ".hdr", ".dcm"]
UNREAD += [".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".raw"]  # of cameras
# more than any image within `readers.MAX_PIXELS` needs; a disk image named .jpg would fill the memory
MAX_BYTES = 2**31
# files beyond this are looked at before they are read whole
LARGE = 1 << 24
NO_STAT = (-1, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as columns, not as an object per image: a million images must list fast.

    Texts may be given as any sequence, such as a list; they are packed, and stay equal to what was given.
    Listing reads no image, so an image that cannot be read is found only when `read` is called.
    """

    uri: str
    """What the user gave."""
    root: Path
    """The folder that `ids` are relative to; a manifest's own folder."""
    ids: Sequence[str]
    """Paths under `root`, with `/`, unique. Bytes that are not UTF-8 are kept as lone surrogates: show
    ids to people through `printable`. A manifest may name files elsewhere: `../x.jpg`, `/data/x.jpg`."""
    labels: Sequence[str] | None = None
    """One per image, empty for an image without one; None where no image has one."""
    splits: Sequence[str] | None = None
    """`train`, `val`, `test` or empty; None where no image has one."""
    stats: np.ndarray | None = None
    """`int64 [N, 4]`: size in bytes, mtime and ctime in ns, inode; size -1 where there is no such file."""
    ignored: Sequence[str] = ()
    """Files under a folder that are not images, hidden ones among them, and hidden folders (`.git/`)."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the user should read."""
    multilabel: bool = False
    """A label is several names joined by `|` (`cat|indoor`); a lone `|` says that no class applies."""
    starts: np.ndarray | None = None
    """`int64`, ascending: rows where a container (a tar, a row group) begins; None where each image is a file of its
    own."""

    def __post_init__(self) -> None:
        for name, kind in (("ids", Texts), ("labels", Names), ("splits", Names), ("ignored", Texts)):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, kind.of(given))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, numbers: np.ndarray) -> Source:
        """The images with these numbers, `int [M]`, as a source of its own. A subclass with further columns
        overrides this to take them along. Raises `SourceError` for one that has such columns and does not.
        """
        known = {each.name for each in fields(Source)}
        for name, value in vars(self).items() if type(self).take is Source.take else ():
            if name not in known and isinstance(value, np.ndarray | list | tuple) and len(value) == len(self) > 1:
                raise SourceError(
                    f"{type(self).__name__} has a column of its own, {name}, which a part of it would not have: "
                    "override `take` (docs/extending.md)"
                )
        return replace(
            self,
            ids=Texts.of(self.ids).take(numbers),
            labels=None if self.labels is None else Names.of(self.labels).take(numbers),
            splits=None if self.splits is None else Names.of(self.splits).take(numbers),
            stats=None if self.stats is None else self.stats[numbers],
            starts=None,
        )

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the ids in their order: the same for the same listing."""
        return Texts.of(self.ids).digest()

    def path(self, i: int) -> Path:
        """Where image `i` lies."""
        return self.root / self.ids[i]

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises `ImageError`, whose text does not name the image."""
        return read_image(os.path.join(self.root, self.ids[i]))


def left_out(name: str) -> str | None:
    """Why a folder's picture with this name is left out; None for an image, and for what is no picture by its name."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".gif":
        return "a GIF is read only where a manifest or a command names it"
    return f"featx does not read {suffix}; convert it to JPEG or PNG" if suffix in UNREAD else None


def read_image(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file. Raises `ImageError`, whose text does not name the image."""
    try:
        # looked at before it is opened: opening a pipe would wait for ever
        found = os.stat(path := home(path))
        if not stat.S_ISREG(found.st_mode):
            kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, socket or device"
            raise ImageError(f"a {kind}, not a file")
        if found.st_size > MAX_BYTES:
            raise ImageError(f"{found.st_size:,} bytes are more than the {MAX_BYTES:,} of an image")
        with open(path, "rb", buffering=0) as file:  # a buffer would be put before the rest: twice the memory
            if found.st_size > LARGE:
                from featx.pixels import readers

                readers.kind(file.read(readers.HEAD_BYTES))
                file.seek(0)
            return file.read()
    except FileNotFoundError:
        raise ImageError("a link to nothing" if os.path.islink(path) else "the file is not there") from None
    except PermissionError:
        raise ImageError("the file may not be read by this user; try `chmod +r`") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ImageError(f"the file cannot be read ({getattr(error, 'strerror', None) or error})") from error
