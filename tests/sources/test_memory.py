"""Images that a caller holds: every kind gives its pixels once, and what is no image is named with what is near."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, ColourEngine, write_images
from PIL import Image, ImageSequence

from featx.errors import HeadError, RunError, SourceError
from featx.extraction.pipeline import sync
from featx.fitting import fit
from featx.pixels.decoding import decode
from featx.runs import open_run
from featx.sources.memory import Images, one_by_one


class Frame:
    """A table as pandas and polars have them."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = list(columns)
        self.values = np.array(list(columns.values()), dtype=object).T

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


class Column:
    """One of its columns: an array, and iterable."""

    def __init__(self, values: list[Any]) -> None:
        self.values = np.array(values, dtype=object)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class NAType:
    """pandas.NA, which is not even equal to itself."""

    def __eq__(self, other: object) -> Any:
        raise TypeError("boolean value of NA is ambiguous")


class Endless:
    """A data set with a length that answers any number, as torch's may: read by its iterator it never ends."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Any:
        return self.item


class Lengthless:
    """A data set that is still being written: it has numbers, and no length."""

    def __getitem__(self, number: int) -> Any:
        raise AssertionError("was asked for an image")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("memory"), 1, ("only",)) / "only/000.png"


@pytest.fixture(scope="module")
def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def seen(given: Any) -> list[np.ndarray]:
    source = Images.of(given)
    return [np.asarray(decode(source.read(i))) for i in range(len(source))]


KINDS = {
    "a path": lambda path, pixels: path,
    "a path as text of numpy": lambda path, pixels: np.str_(path),
    "bytes": lambda path, pixels: path.read_bytes(),
    "a bytearray": lambda path, pixels: bytearray(path.read_bytes()),
    "a memoryview": lambda path, pixels: memoryview(path.read_bytes()),
    "the bytes as an array": lambda path, pixels: np.fromfile(path, np.uint8),
    "a Pillow image": lambda path, pixels: Image.open(path),
    "an open file that was read": lambda path, pixels: _read(io.BytesIO(path.read_bytes())),
    "an array": lambda path, pixels: pixels,
    "a tensor": lambda path, pixels: torch.from_numpy(pixels.copy()),
    "a batch": lambda path, pixels: np.stack([pixels] * 3),
    "a batch of torch": lambda path, pixels: torch.from_numpy(np.stack([pixels] * 3)),
    "a list of several kinds": lambda path, pixels: [path, pixels, path.read_bytes()],
    "an image that is there twice": lambda path, pixels: [Image.open(path)] * 2,
    "an array of paths": lambda path, pixels: np.array([str(path)] * 2),
    "an array [N, 1]": lambda path, pixels: np.array([[str(path)]] * 2, dtype=object),
    "a column": lambda path, pixels: Column([path, path]),
    "a table of one column": lambda path, pixels: Frame(path=[str(path)] * 2),
    "a data set with numbers alone": lambda path, pixels: Endless(pixels),
}


def _read(file: io.BytesIO) -> io.BytesIO:
    file.read(10)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_gives_its_pixels(kind: str, file: Path, pixels: np.ndarray) -> None:
    count = 3 if "batch" in kind or "several" in kind or "data set" in kind else 1 + ("[N" in kind or "table" in kind)
    found = seen(KINDS[kind](file, pixels))
    assert len(found) == (2 if kind in ("an image that is there twice", "an array of paths", "a column") else count)
    assert all(np.array_equal(each, pixels) for each in found)


def test_a_generator_that_fills_one_image_again_gives_each_frame(pixels: np.ndarray) -> None:
    def frames() -> Iterator[np.ndarray]:
        buffer = np.empty_like(pixels)
        for level in range(4):
            buffer[:] = level
            yield buffer

    assert [int(each[0, 0, 0]) for each in seen(frames())] == [0, 1, 2, 3]
    film, images = io.BytesIO(), [Image.new("L", (9, 9), 60 * level) for level in range(3)]
    images[0].save(film, "GIF", save_all=True, append_images=images[1:])
    assert [int(each[0, 0, 0]) for each in seen(ImageSequence.Iterator(Image.open(film)))] == [0, 60, 120]


def test_missing_cells_are_found_whatever_they_are_called(file: Path) -> None:
    cells = [None, float("nan"), np.float32("nan"), NAType(), np.datetime64("NaT"), file]
    assert list(one_by_one(cells)) == [None] * 5 + [str(file)]
    assert Images.of(cells).ids == ["row 0", "row 1", "row 2", "row 3", "row 4", str(file)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"None; expected paths, Pillow images"),
        (7, r"of type int; expected paths"),
        ({"a.jpg"}, r"of type set"),
        ({"image": 1, "label": 2}, r"of type dict, with image, label \(the images alone may be one of these values\)"),
        ([["a.jpg"]], r"image 0 of those given is of type list"),
        (["a.jpg", 3], r"image 1 of those given is of type int"),
        (Endless(("an image", 0)), r"type tuple and length 2 \(images alone would be `\[image for image, label in"),
        ([{"image": b""}], r"image 0 .* with image"),
        (Frame(path=["a.jpg"], label=["ant"]), r"columns path, label .* a manifest: table.to_csv\('data.csv', index=F"),
        (np.array([["a.jpg", "b.jpg"]]), r"image 0 of those given is of type ndarray \[2\]"),
        (np.arange(3), r"image 0 .* int64"),
        (zipfile.ZipFile(io.BytesIO(), "w"), r"ZipFile cannot be read \(.* 'name'"),
        (Lengthless(), r"what was given is of type Lengthless"),
        (io.StringIO("text"), r"StringIO gives no bytes; open image files by open\(path, 'rb'\)"),
        ([], r"there are no images among those given"),
    ],
)
def test_what_is_no_image_is_named_with_what_is_near(given: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Images.of(given)


def test_lists_of_paths_are_extracted_as_their_folder_is_and_need_labels_to_be_fitted(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    paths = sorted(tiny.glob("*/*.png"))
    whole = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").features()
    assert engine.images == 12
    assert isinstance(whole.X, np.memmap)  # joblib hands it to other processes by the name of its file
    assert Path(str(whole.X.filename)).is_relative_to(tmp_path / "cache") and Path(str(whole.X.filename)).is_file()
    given = sync([*paths, None], COLOURS, engine=engine, cache=tmp_path / "cache")
    assert engine.images == 12  # the same bytes: nothing is computed
    assert np.array_equal(given.features().X, whole.X) and given.report.skipped_images[0]["id"] == "row 12"
    with pytest.raises(HeadError, match=r"has no labels.*featx.HeadClassifier on features"):
        fit(paths, COLOURS, engine=engine, cache=tmp_path / "cache", output=tmp_path / "run")


def test_a_cache_is_found_from_another_working_folder_and_a_run_says_that_it_is_not(
    tiny: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extraction = sync(tiny, COLOURS, engine=engine, cache="cache")
    run = fit(tiny, COLOURS, "ncm", engine=engine, cache="cache", output="run")
    monkeypatch.chdir("/")
    assert extraction.features().X.shape == (12, 48)
    with pytest.raises(RunError, match=r"run any more; if the working folder changed, open the run again"):
        open_run(run)
