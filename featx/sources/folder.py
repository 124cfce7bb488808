"""Lists a folder: class folders, class folders inside train, val and test, or images without labels."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from featx.errors import SourceError
from featx.files import INT64
from featx.sources.columns import Names, Texts
from featx.sources.names import PLAIN, SPLITS, class_name, differ_in_case, split_of, splits_among, words
from featx.sources.own import is_own
from featx.sources.source import EXTENSIONS, NO_STAT, Source
from featx.text import printable, some

# Folders that hold all images of a set and name no class: beside other folders, those are no classes either.
WRAPPERS = {"images", "image", "imgs", "img", "jpg", "jpeg"}
# Words, and kinds, of the files in which some downloads list their splits.
LISTED, LISTS = {*SPLITS, "split", "splits", "setid"}, (".csv", ".json", ".jsonl", ".mat", ".parquet", ".tsv", ".txt")
# The suffixes in every mixture of cases: a look into a set is faster than `lower().endswith()`.
_SUFFIXES = {"".join(cased) for each in EXTENSIONS for cased in product(*({c, c.upper()} for c in each))}
Tree = dict[str, "_Folder"]  # every folder at and below one, by its path under the root


@dataclass
class _Folder:
    """What lies directly in one folder; its images are in the listing's columns."""

    folders: list[str]
    """Sorted."""
    links: set[str]
    """Those of `folders` that are symbolic links."""
    images: range
    """Their rows, sorted by name."""


@dataclass
class _Listing:
    """The columns, filled as folders are looked at; and which folders' rows follow each other in the data set."""

    root: str
    names: BytesIO = field(default_factory=BytesIO)
    """Of all images, as `Texts` packs them: a list of names would take most of the memory."""
    stats: array[int] = field(default_factory=lambda: array("q"))
    """Four numbers an image."""
    others: BytesIO = field(default_factory=BytesIO)
    other_count: int = 0
    rows: list[range] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """One for each range of rows, as are the splits."""
    splits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    """Folders that featx has written."""

    def add(self, found: _Folder, label: str, split: str) -> None:
        if found.images:
            self.rows.append(found.images)
            self.labels.append(label)
            self.splits.append(split)

    def packed(self) -> tuple[Texts, np.ndarray, list[int]]:
        """The ids, their stats, and how many there are for each label."""
        counts = [len(rows) for rows in self.rows]
        ids = Texts.packed(self.names.getvalue(), sum(counts))
        stats = np.frombuffer(self.stats, np.int64).reshape(-1, 4)
        if any(rows.start > after.start for rows, after in pairwise(self.rows)):
            order = np.concatenate([np.arange(rows.start, rows.stop) for rows in self.rows])
            ids, stats = ids.take(order), stats[order]
        return ids, stats, counts

    def images(self, found: _Folder) -> Sequence[str]:
        """The names of a folder's images."""
        ids = Texts.packed(self.names.getvalue(), len(self.stats) // 4)
        return [os.path.basename(id) for id in ids[found.images.start : found.images.stop]]


def open_folder(path: str) -> Source:
    """List the folder at `path`; its kind is found by looking.

    Images directly in it: a flat folder, without labels. Images below sub-folders that are all called
    train, val, valid, test or the like: splits, each with class folders or flat. Any other sub-folders:
    classes; whatever lies deeper belongs to the class, as in torchvision's `ImageFolder`, and the
    order is `ImageFolder`'s too. A folder around all of these is looked through. What featx itself has written is
    left out. Raises `SourceError` where two of these fit, or none.
    """
    listing = _Listing(path)
    top = _scan(listing, "")
    assert top
    trees = {name: _tree(listing, name, [path]) for name in top.folders}
    place = ""  # where the classes or splits lie, below the root
    while True:
        full = [name for name, tree in trees.items() if any(found.images for found in tree.values())]
        for name in [name for name in trees if name not in full]:
            _empty(listing, name)
        if top.images or len(full) != 1 or not _wraps(trees[full[0]], full[0]):
            break
        listing.add(top, "", "")
        tree, place = trees[full[0]], f"{full[0]}/"
        top = tree[full[0]]
        trees = {f"{place}{child}": _below(tree, f"{place}{child}") for child in top.folders}

    named = _named(listing, place, top, full)
    listing.add(top, "", "")
    for name in full:
        if named:
            _split(listing, name, trees[name], named[name])
        else:
            label, within = class_name(os.path.basename(name)), splits_among(_inner(trees[name], name))
            if len(set(within.values())) > 1:
                raise SourceError(
                    f"{printable(os.path.join(path, name))} holds folders named as splits ({some([*within])}): it is "
                    "unclear whether it is a class. Give it alone, or lay the images out as train/<class>, test/<class>"
                )
            for found in trees[name].values():
                listing.add(found, label, "")
    ignored = Texts.packed(listing.others.getvalue(), listing.other_count)
    _remark(listing, ignored, place, named, {name: trees[name] for name in full})
    ids, stats, counts = listing.packed()
    labels = Names.repeated(listing.labels, counts) if any(listing.labels) else None
    splits = Names.repeated(listing.splits, counts) if named else None
    return Source(path, Path(path), ids, labels, splits, stats, ignored, listing.notes)


def _named(listing: _Listing, place: str, top: _Folder, full: list[str]) -> dict[str, str]:
    """Which split each folder is; empty where they are classes. Raises `SourceError` where that is unclear."""
    here, names = os.path.join(listing.root, place).rstrip("/"), [name.removeprefix(place) for name in full]
    if top.images and full:
        raise SourceError(_both(here, listing.images(top), names))
    named = splits_among(names)
    others = [name for name in names if name not in named]
    if named and others:
        raise SourceError(
            f"{printable(here)} holds folders named as splits ({some([*named])}) beside others "
            f"({some(others)}): it is unclear whether those are classes. Move one kind elsewhere, "
            "rename it, or list the images in a manifest"
        )
    if len(names) > 1 and (around := [name for name in names if set(words(name)) and set(words(name)) <= WRAPPERS]):
        raise SourceError(
            f"{printable(here)} holds {some(around)} beside {some([n for n in names if n not in around])}: it is "
            f"unclear whether these are classes. If the images lie in one of them, give that one, "
            f"{printable(os.path.join(here, around[0]))}; else rename it"
        )
    return {place + name: split for name, split in named.items()}


def _wraps(tree: Tree, name: str) -> bool:
    """Whether `name`, the only folder with images, names no class: the classes, or splits, are the folders in it."""
    inner, last = _inner(tree, name), os.path.basename(name)
    if inner and not tree[name].images and len(splits_among(inner)) == len(inner):
        return True
    if split_of(last)[0]:
        return False
    if tree[name].images:
        return not inner and bool(words(last)) and set(words(last)) <= PLAIN
    if len(inner) == 1:
        return inner[0].casefold() == last.casefold() or _wraps(tree, f"{name}/{inner[0]}")
    return not PLAIN.isdisjoint(words(last))


def _empty(listing: _Listing, name: str) -> None:
    """Pass over a folder without images; one that holds nothing but what featx has written is named elsewhere."""
    if not any(own == name or own.startswith(f"{name}/") for own in listing.own):
        listing.notes.append(f"folder {printable(name)!r} has no images; ignored")


def _remark(listing: _Listing, ignored: Texts, place: str, named: dict[str, str], trees: dict[str, Tree]) -> None:
    """Note what looks like a mistake in the layout. Raises `SourceError` where there is no image."""
    path = listing.root
    if listing.own:
        listing.notes.append(f"left out, since featx wrote them: {some(listing.own)}")
    if not listing.rows:
        names = [*listing.own, *ignored]
        others = f"; it holds {some(names)}" if names else ", or anything else"
        raise SourceError(
            f"there is no image in {printable(path)}{others}. Expected class folders, "
            f"`{printable(os.path.basename(os.path.normpath(path)))}/<class>/*.jpg`; featx takes "
            f"{', '.join(EXTENSIONS)}; a manifest can name .gif files and other names too"
        )
    if place:
        listing.notes.append(f"{printable(place)} holds all images, and is read as the data set")
    if not all(listing.labels):
        tables = [name for name in ignored if name.lower().endswith((".csv", ".jsonl", ".parquet"))]
        if tables:
            listing.notes.append(f"{some(tables)} is ignored; give its own path to use the labels in it")
    if named:
        _compare_splits(listing)
        odd = [f"{printable(n)} is {split}" for n, split in named.items() if os.path.basename(n).lower() not in SPLITS]
        listing.notes += [f"read as splits: {', '.join(odd)}"] if odd else []
    elif lists := [n for n in ignored[:9999] if n.lower().endswith(LISTS) and LISTED & {*words(Path(n).stem)}]:
        listing.notes.append(
            f"{some(lists)} may say which images are held out; featx does not read it, but a manifest's column split"
        )
    name, tree = next(iter(trees.items()), ("", {}))
    while len(inner := _inner(tree, name)) == 1 and not tree[name].images:
        name = f"{name}/{inner[0]}"
    among = {tuple(_inner(tree, name)) for name, tree in trees.items()}
    if not named and len(trees) > 1 and len(among) == 1 and len(min(among)) > 1:
        listing.notes.append(
            f"the classes {some([*trees])} all hold the same folders ({some([*among.pop()])}): if those are the "
            "classes and these are splits, rename these to train, val and test"
        )
    if not named and len(trees) == 1 and len(inner) > 1:
        listing.notes.append(
            f"all images have one class, {max(listing.labels)!r}, the only folder with images; if its "
            f"folders ({some(inner)}) are the classes, give {printable(os.path.join(path, name))}"
        )
    listing.notes += differ_in_case(filter(None, listing.labels))


def _split(listing: _Listing, name: str, tree: Tree, split: str) -> None:
    """Add one split's folder: class folders, or images without labels (as a test set may be)."""
    base = name
    while len(full := _inner(tree, base)) == 1 and not tree[base].images and _nested(base, full[0], split):
        base = f"{base}/{full[0]}"
    where = os.path.join(listing.root, base)
    if tree[base].images and full:
        raise SourceError(_both(where, listing.images(tree[base]), full))
    if len(full) > 1 and len(among := splits_among(full)) == len(full):
        raise SourceError(
            f"{printable(where)}, a split, holds folders named as splits ({some([*among])}): it is unclear which are "
            "meant. Give one of both folders, or list the images in a manifest"
        )
    if tree[base].images:
        listing.notes.append(f"images directly in {printable(base)}/ have no label: {some(listing.images(tree[base]))}")
    for child in tree[base].folders:
        if child not in full:
            _empty(listing, f"{base}/{child}")
    labels = {child: class_name(child) for child in tree[base].folders}
    for below, found in tree.items():
        child = below.removeprefix(base).split("/")[1] if below.startswith(f"{base}/") else ""
        listing.add(found, labels.get(child, ""), split)


def _nested(base: str, child: str, split: str) -> bool:
    """Whether the only folder with images in a split is that split once more, or one such as images/."""
    said, rest = split_of(child)
    if said == split:
        return not rest or child.casefold() == os.path.basename(base).casefold()
    return bool(words(child)) and set(words(child)) <= WRAPPERS


def _below(tree: Tree, name: str) -> Tree:
    return {below: found for below, found in tree.items() if below == name or below.startswith(f"{name}/")}


def _inner(tree: Tree, name: str) -> list[str]:
    """The folders directly in `name` that hold an image at any depth."""
    deeper = [below[len(name) + 1 :] for below, found in tree.items() if found.images and below.startswith(f"{name}/")]
    return sorted({below.split("/")[0] for below in deeper})


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


def _tree(listing: _Listing, name: str, above: list[str]) -> Tree:
    """Every folder at and below `name`, by its path under the root, in `ImageFolder`'s order.

    Links are followed, but within one tree each folder is listed once, however many links lead to it:
    a loop ends, and so do the many ways through folders that link to each other.
    """
    seen = {_identity(folder) for folder in above}
    tree: Tree = {}
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
        found = _scan(listing, below)
        if not found:
            listing.own.append(below)
            continue
        tree[below] = found
        for child in reversed(found.folders):
            (links if child in found.links else waiting).append(f"{below}/{child}")
    return dict(sorted(tree.items()))


def _identity(path: str) -> tuple[int, int] | str:
    found = os.stat(path)
    # Windows file systems without inodes give 0
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _scan(listing: _Listing, below: str) -> _Folder | None:
    """Look at what lies directly in one folder, by its path under the root; None where featx has written it."""
    path = os.path.join(listing.root, below) if below else listing.root
    found = _Folder([], set(), range(0))
    names: list[str] = []
    others: list[str] = []
    handle = None
    try:
        if os.stat in os.supports_dir_fd:  # not on Windows; else each file's whole path is resolved again
            handle = os.open(path, os.O_RDONLY)
        with os.scandir(path if handle is None else handle) as entries:
            for entry in entries:
                name = entry.name
                # the suffix first: of an image, its stat will say whether it is a folder
                if name[0] != "." and (name[-4:] in _SUFFIXES or name[name.rfind(".") :] in _SUFFIXES):
                    names.append(name)
                    continue
                try:
                    inner = entry.is_dir()
                except OSError:  # a link to itself, or into a closed folder
                    inner = False
                if inner and name[0] != ".":
                    found.folders.append(name)
                else:
                    others.append(f"{name}/" if inner else name)
        names.sort()
        if below and is_own(path, found.folders, names, others):
            return None
        odd = _stat(names, "" if handle is not None else f"{path}/", handle, listing.stats)
    except OSError as error:
        raise _unlisted(path, error) from error
    finally:
        if handle is not None:
            os.close(handle)
    names = [name for name in names if name not in odd] if odd else names
    for name, inner in odd.items():
        (found.folders if inner else others).append(name)
    found.folders.sort()
    found.links = {name for name in found.folders if os.path.islink(os.path.join(path, name))}

    first = len(listing.stats) // 4 - len(names)
    found.images = range(first, first + len(names))
    listing.other_count += len(others)
    for column, texts in ((listing.names, names), (listing.others, sorted(others))):
        if texts:
            prefix, more = f"{below}/" if below else "", "\0" if column.tell() else ""
            column.write((more + prefix + f"\0{prefix}".join(texts)).encode("utf-8", "surrogatepass"))
    return found


def _stat(names: list[str], above: str, handle: int | None, stats: array[int]) -> dict[str, bool]:
    """Add the `stat_row` of each plain file to `stats`; return the other names, and which of them are folders."""
    put, look, plain, odd = stats.append, os.stat, stat.S_IFREG, {}
    for name in names:
        try:
            found = look(above + name, dir_fd=handle)
        except OSError:  # vanished, or a link to nothing: reading it says so
            stats.extend(NO_STAT)
            continue
        if found.st_mode & 0o170000 != plain:
            odd[name] = stat.S_ISDIR(found.st_mode)
            continue
        put(found.st_size)  # `stat_row` without its tuple
        put(found.st_mtime_ns)
        put(found.st_ctime_ns)
        put(found.st_ino & INT64)
    return odd


def _unlisted(path: str, error: OSError) -> SourceError:
    return SourceError(
        f"the folder {printable(path)} cannot be listed ({error.strerror}); "
        "make it readable (`chmod +rx`), or move it elsewhere"
    )


def _both(path: str, images: Sequence[str], folders: list[str]) -> str:
    return (
        f"{printable(path)} holds images itself ({some(images)}) and folders with images "
        f"({some(folders)}): it is unclear what the images' class is. Move them into a class folder, or "
        "elsewhere, or list all in a manifest"
    )
