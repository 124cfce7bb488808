"""Lists a folder: class folders, class folders inside train, val and test, or images without labels."""

from __future__ import annotations

import os
import stat
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featx.errors import SourceError
from featx.files import stat_row
from featx.sources.source import EXTENSIONS, NO_STAT, SPLITS, Source
from featx.text import printable, some


@dataclass
class _Folder:
    """What lies directly in one folder, each list sorted."""

    images: list[str] = field(default_factory=list)
    stats: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """`int64 [N, 4]`, of `images`."""
    folders: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    """Those of `folders` that are symbolic links."""
    others: list[str] = field(default_factory=list)


@dataclass
class _Listing:
    """The columns, filled folder by folder."""

    root: str
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    stats: list[np.ndarray] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, prefix: str, found: _Folder, label: str, split: str) -> None:
        self.ids += [prefix + name for name in found.images]
        self.labels += [label] * len(found.images)
        if split:  # all images have one, or none has
            self.splits += [split] * len(found.images)
        self.stats.append(found.stats)
        self.ignored += [prefix + name for name in found.others]
        del found.images[1:]  # from now on it only matters whether there are any


def open_folder(path: str) -> Source:
    """List the folder at `path`; its kind is found by looking.

    Images directly in it: a flat folder, without labels. Images below sub-folders that are all called
    train, val, valid, test or the like: splits, each with class folders or flat. Any other sub-folders:
    classes; whatever lies deeper belongs to the class, as in torchvision's `ImageFolder`, and the
    order is `ImageFolder`'s too. Raises `SourceError` where two of these fit, or none.
    """
    top = _scan(path)
    listing = _Listing(path)
    trees = {name: _tree(listing, name, [path]) for name in top.folders}
    full = [name for name, tree in trees.items() if any(found.images for found in tree.values())]
    named = [name for name in full if name.lower() in SPLITS]
    if top.images and full:
        raise SourceError(_both(path, top.images, full))
    if named and len(named) < len(full):
        classes = [name for name in full if name not in named]
        raise SourceError(
            f"{printable(path)} holds folders named as splits ({some(named)}) beside others "
            f"({some(classes)}): it is unclear whether those are classes. Move one kind elsewhere, "
            "rename it, or list the images in a manifest"
        )
    listing.add("", top, "", "")
    for name in top.folders:
        if name not in full:
            for below, found in trees[name].items():
                listing.add(f"{below}/", found, "", "")
            listing.notes.append(f"folder {printable(name)!r} has no images; ignored")
        elif named:
            _split(listing, name, trees[name])
        else:
            label = printable(name)
            for below, found in trees[name].items():
                listing.add(f"{below}/", found, label, "")
    _remark(listing, path, top, full, named, trees)
    return Source(
        uri=path,
        root=Path(path),
        ids=listing.ids,
        labels=listing.labels if any(listing.labels) else None,
        splits=listing.splits if named else None,
        stats=np.concatenate(listing.stats),
        ignored=listing.ignored,
        notes=listing.notes,
    )


def _remark(
    listing: _Listing, path: str, top: _Folder, full: list[str], named: list[str], trees: dict[str, dict[str, _Folder]]
) -> None:
    """Note what looks like a mistake in the layout. Raises `SourceError` where there is no image."""
    if not listing.ids:
        others = f"; it holds {some(listing.ignored)}" if listing.ignored else ", or anything else"
        raise SourceError(
            f"there is no image in {printable(path)}{others}. Expected class folders, "
            f"`{printable(os.path.basename(os.path.normpath(path)))}/<class>/*.jpg`; featx takes "
            f"{', '.join(EXTENSIONS)}; a manifest can name .gif files and other names too"
        )
    if not full:
        tables = [name for name in top.others if name.lower().endswith((".csv", ".jsonl", ".parquet"))]
        if tables:
            listing.notes.append(f"{some(tables)} is ignored; give its own path to use the labels in it")
    if named:
        _compare_splits(listing)
    elif len(full) == 1 and len(inner := _inner(trees[full[0]], full[0])) > 1:
        listing.notes.append(
            f"all images have one class, {printable(full[0])!r}, the only folder with images; if its "
            f"folders ({some(inner)}) are the classes, give {printable(os.path.join(path, full[0]))}"
        )


def _split(listing: _Listing, name: str, tree: dict[str, _Folder]) -> None:
    """Add one split's folder: class folders, or images without labels (as a test set may be)."""
    split = SPLITS[name.lower()]
    full = _inner(tree, name)
    if tree[name].images and full:
        raise SourceError(_both(os.path.join(listing.root, name), tree[name].images, full))
    if tree[name].images:
        listing.notes.append(f"images directly in {name}/ have no label: {some(tree[name].images)}")
    for child in tree[name].folders:
        if child not in full:
            listing.notes.append(f"folder {printable(f'{name}/{child}')!r} has no images; ignored")
    labels = {child: printable(child) for child in tree[name].folders}
    for below, found in tree.items():
        label = "" if below == name else labels[below.split("/")[1]]
        listing.add(f"{below}/", found, label, split)


def _inner(tree: dict[str, _Folder], name: str) -> list[str]:
    """The folders directly in `name` that hold an image at any depth."""
    return sorted({below.split("/")[1] for below, found in tree.items() if found.images and below != name})


def _compare_splits(listing: _Listing) -> None:
    """Note the classes that a split has and `train` has not: most are misspelt."""
    seen: dict[str, set[str]] = {}
    for label, split in set(zip(listing.labels, listing.splits, strict=True)):
        if label:
            seen.setdefault(split, set()).add(label)
    for split in ("val", "test"):
        unknown = sorted(seen.get(split, set()) - seen.get("train", set()))
        if unknown and "train" in seen:
            listing.notes.append(f"{split} has classes that train has not: {some(unknown)}")


def _tree(listing: _Listing, name: str, above: list[str]) -> dict[str, _Folder]:
    """Every folder at and below `name`, by its path under the root, in `ImageFolder`'s order.

    Links are followed, but within one tree each folder is listed once, however many links lead to it:
    a loop ends, and so do the many ways through folders that link to each other.
    """
    seen = {_identity(folder) for folder in above}
    tree: dict[str, _Folder] = {}
    waiting = [name]
    links: list[str] = []
    while waiting or links:
        # links last, so that a folder keeps its own name rather than a link's
        below = waiting.pop() if waiting else links.pop()
        path = os.path.join(listing.root, below)
        try:
            identity = _identity(path)
        except OSError as error:
            raise _unlisted(path, error) from error
        if identity in seen:
            listing.notes.append(f"folder {printable(below)!r} leads back to one that is listed already")
            continue
        seen.add(identity)
        tree[below] = found = _scan(path)
        for child in reversed(found.folders):
            (links if child in found.links else waiting).append(f"{below}/{child}")
    return dict(sorted(tree.items()))


def _identity(path: str) -> tuple[int, int] | str:
    found = os.stat(path)
    # Windows file systems without inodes give 0
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _scan(path: str) -> _Folder:
    found = _Folder()
    names: list[str] = []
    stats = array("q")  # not a tuple of integers for each image: ten times the memory
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                hidden = name[0] == "."
                try:
                    inner = entry.is_dir()
                except OSError:  # a link to itself, or into a closed folder
                    inner = False
                if inner and not hidden:
                    found.folders.append(name)
                    if entry.is_symlink():
                        found.links.add(name)
                elif inner or hidden or not name.lower().endswith(EXTENSIONS):
                    found.others.append(f"{name}/" if inner else name)
                else:
                    try:
                        status = entry.stat()
                    except OSError:  # vanished, or a link to nothing: reading it says so
                        names.append(name)
                        stats.extend(NO_STAT)
                        continue
                    if stat.S_ISREG(status.st_mode):
                        names.append(name)
                        stats.extend(stat_row(status))
                    else:
                        found.others.append(name)
    except OSError as error:
        raise _unlisted(path, error) from error
    order = sorted(range(len(names)), key=names.__getitem__)
    found.images = [names[i] for i in order]
    found.stats = np.array(stats, np.int64).reshape(-1, 4)[order]
    found.folders.sort()
    found.others.sort()
    return found


def _unlisted(path: str, error: OSError) -> SourceError:
    return SourceError(
        f"the folder {printable(path)} cannot be listed ({error.strerror}); "
        "make it readable (`chmod +rx`), or move it elsewhere"
    )


def _both(path: str, images: list[str], folders: list[str]) -> str:
    return (
        f"{printable(path)} holds images itself ({some(images)}) and folders with images "
        f"({some(folders)}): it is unclear what the images' class is. Move them into a class folder, or "
        "elsewhere, or list all in a manifest"
    )
