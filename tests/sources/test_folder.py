"""Folders of images: which kind one is, what is ignored, and the odd things that people's disks hold."""

from __future__ import annotations

import os
import tracemalloc
from itertools import chain
from pathlib import Path

import pytest

from featx.errors import ImageError, SourceError
from featx.files import stat_row
from featx.shipping.prediction import expand
from featx.sources.opening import open_source
from featx.sources.source import EXTENSIONS, Source


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def table(source: Source) -> list[tuple[str, str, str]]:
    labels = source.labels or ["-"] * len(source)
    return list(zip(source.ids, labels, source.splits or ["-"] * len(source), strict=True))


def test_the_ants_and_bees_are_397_photographs_and_one_ignored_gif(photos: Path) -> None:
    source = open_source(photos)
    counts: dict[tuple[str, str], int] = {}
    for _, label, split in table(source):
        counts[split, label] = counts.get((split, label), 0) + 1
    assert counts == {("train", "ants"): 123, ("train", "bees"): 121, ("val", "ants"): 70, ("val", "bees"): 83}
    assert source.ignored == ["train/ants/imageNotFound.gif"]
    assert source.notes == []


def test_extensions_are_those_of_torchvisions_imagefolder_and_newer_ones() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert EXTENSIONS[: len(IMG_EXTENSIONS)] == IMG_EXTENSIONS and {".jfif", ".avif", ".heic"} < {*EXTENSIONS}


def test_images_labels_and_order_are_those_of_torchvisions_imagefolder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = touch(
        tmp_path,
        *("b/2.JPG", "b/1.jpeg", "b/deep/er/0.png", "b/deep-er/3.webp", "b/a.txt", "b/Z.tif", "b/10.bmp"),
        *("B/1.ppm", "a b/x y.pgm", "é/ü.TIFF", "a/1.jpg", "a/1.gif"),
    )
    (root / "a" / "linked").symlink_to(root / "é", target_is_directory=True)
    expected = ImageFolder(str(root))
    source = open_source(root)
    assert [str(source.path(i)) for i in range(len(source))] == [path for path, _ in expected.imgs]
    assert source.labels == [expected.classes[i] for _, i in expected.imgs]
    assert len(source) == 11


def test_files_that_are_not_images_are_ignored_and_named(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        *("cat/1.jpg", "cat/1.gif", "cat/.DS_Store", "cat/Thumbs.db", "cat/._1.jpg", "cat/jpg", "cat/1.jpg~"),
        *("cat/sub/notes.txt", "README.md", ".git/HEAD", "cat/.ipynb_checkpoints/1.jpg", "dog/2.jpg"),
    )
    source = open_source(root)
    assert table(source) == [("cat/1.jpg", "cat", "-"), ("dog/2.jpg", "dog", "-")]
    assert sorted(source.ignored) == sorted(
        [
            *("README.md", ".git/", "cat/.DS_Store", "cat/._1.jpg", "cat/.ipynb_checkpoints/"),
            *("cat/1.gif", "cat/1.jpg~", "cat/Thumbs.db", "cat/jpg", "cat/sub/notes.txt"),
        ]
    )


def test_split_folders_go_by_the_usual_names_in_any_case(tmp_path: Path) -> None:
    root = touch(tmp_path, "Train/cat/1.jpg", "valid/cat/2.jpg", "TEST/cat/deep/3.jpg")
    assert table(open_source(root)) == [
        ("TEST/cat/deep/3.jpg", "cat", "test"),
        ("Train/cat/1.jpg", "cat", "train"),
        ("valid/cat/2.jpg", "cat", "val"),
    ]


def test_a_test_split_may_have_no_labels(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/3.jpg", "test/4.jpg")
    source = open_source(root)
    assert table(source)[:2] == [("test/3.jpg", "", "test"), ("test/4.jpg", "", "test")]
    assert source.notes == ["images directly in test/ have no label: 3.jpg, 4.jpg"]


def test_a_split_class_that_train_has_not_is_noted(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/ants/1.jpg", "val/ant/2.jpg", "val/ants/3.jpg")
    assert open_source(root).notes == ["val has classes that train has not: ant"]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "b.jpg", "a.PNG", "notes.txt"))
    assert (source.ids, source.labels, source.splits) == (["a.PNG", "b.jpg"], None, None)
    assert source.ignored == ["notes.txt"] and source.notes == []


def test_a_manifest_beside_flat_images_is_pointed_out(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "a.jpg", "metadata.csv"))
    assert source.notes == ["metadata.csv is ignored; give its own path to use the labels in it"]


@pytest.mark.parametrize("where", ["", "train/"])
def test_images_beside_class_folders_are_refused_as_ambiguous(tmp_path: Path, where: str) -> None:
    root = touch(tmp_path, f"{where}loose.jpg", f"{where}cat/1.jpg", f"{where}dog/2.jpg")
    with pytest.raises(SourceError, match=r"images itself \(loose.jpg\) and folders with images \(cat, dog\)"):
        open_source(root)


def test_splits_beside_other_folders_are_refused_as_ambiguous(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/1.jpg", "cat/1.jpg")
    with pytest.raises(SourceError, match=r"named as splits \(train\) beside others \(cat\)"):
        open_source(root)


def test_a_folder_without_images_beside_splits_is_only_noted(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/1.jpg", "docs/readme.txt")
    source = open_source(root)
    assert table(source) == [("train/cat/1.jpg", "cat", "train")]
    assert source.ignored == ["docs/readme.txt"]
    assert source.notes == ["folder 'docs' has no images; ignored"]


def test_empty_class_folders_are_noted(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/cat/1.jpg")
    (root / "train" / "dog").mkdir()
    (root / "val").mkdir()
    assert sorted(open_source(root).notes) == [
        "folder 'train/dog' has no images; ignored",
        "folder 'val' has no images; ignored",
    ]


def test_classes_one_level_too_deep_are_pointed_out(tmp_path: Path) -> None:
    root = touch(tmp_path, "pets/cat/1.jpg", "pets/dog/2.jpg", "docs/a.txt")
    source = open_source(root)
    assert set(source.labels or []) == {"pets"}
    assert any("all images have one class, 'pets'" in note and "(cat, dog)" in note for note in source.notes)


def test_a_folder_without_any_image_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no image in .*, or anything else\. Expected class folders, `.*<class>"):
        open_source(tmp_path)
    touch(tmp_path, "cat/1.gif", "cat/2.psd", "cat/3.txt", "cat/4.txt")
    with pytest.raises(SourceError, match=r"it holds cat/1.gif, cat/2.psd, cat/3.txt and 1 more\. .* manifest"):
        open_source(tmp_path)


def test_symlink_loops_end_and_list_every_image_once(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "cat/1.jpg", "cat/sub/2.jpg", "dog/3.jpg")
    (root / "cat" / "sub" / "up").symlink_to("..", target_is_directory=True)
    (root / "cat" / "aaa").symlink_to("sub", target_is_directory=True)
    (root / "dog" / "root").symlink_to(root, target_is_directory=True)
    source = open_source(root)
    assert source.ids == ["cat/1.jpg", "cat/sub/2.jpg", "dog/3.jpg"]
    assert sorted(source.notes) == [
        "folder 'cat/aaa' leads back to one that is listed already",
        "folder 'cat/sub/up' leads back to one that is listed already",
        "folder 'dog/root' leads back to one that is listed already",
    ]


def test_folders_that_all_link_to_each_other_do_not_explode(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = [f"f{i:02d}" for i in range(12)]
    for name in names:
        touch(root / "cat" / name, "1.jpg")
        for other in names:
            (root / "cat" / name / f"to-{other}").symlink_to(f"../{other}", target_is_directory=True)
    assert open_source(root).ids == [f"cat/{name}/1.jpg" for name in names]


def test_one_folder_linked_into_two_places_is_listed_in_both(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "1.jpg")
    for split in ("train", "test"):
        (tmp_path / "root" / split).mkdir(parents=True)
        (tmp_path / "root" / split / "cat").symlink_to(store, target_is_directory=True)
    assert table(open_source(tmp_path / "root")) == [
        ("test/cat/1.jpg", "cat", "test"),
        ("train/cat/1.jpg", "cat", "train"),
    ]


def test_linked_files_are_read_and_broken_links_are_skipped_by_name(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "cat/1.jpg")
    (root / "cat" / "2.jpg").symlink_to(touch(tmp_path, "elsewhere.jpg") / "elsewhere.jpg")
    (root / "cat" / "3.jpg").symlink_to("nothing.jpg")
    (root / "cat" / "4.jpg").symlink_to("4.jpg")
    source = open_source(root)
    assert source.ids == [f"cat/{i}.jpg" for i in (1, 2, 3, 4)]
    assert source.stats is not None and source.stats[:, 0].tolist() == [9, 13, -1, -1]
    assert source.read(1) == b"elsewhere.jpg"
    with pytest.raises(ImageError, match=r"^a link to nothing$"):
        source.read(2)
    with pytest.raises(ImageError, match=r"^the file cannot be read \(Too many levels of symbolic links\)"):
        source.read(3)


def test_a_pipe_named_as_an_image_is_ignored_and_a_folder_named_so_is_a_folder(tmp_path: Path) -> None:
    root = touch(tmp_path, "cat/1.jpg", "cat/folder.jpg/2.jpg")
    os.mkfifo(root / "cat" / "pipe.jpg")
    source = open_source(root)
    assert source.ids == ["cat/1.jpg", "cat/folder.jpg/2.jpg"]
    assert source.ignored == ["cat/pipe.jpg"]


def test_names_that_are_not_utf8_are_listed_and_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        root = touch(tmp_path, f"cat/{name}", os.fsdecode(b"zo\xeb/two\nlines.jpg"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_source(root)
    assert source.ids == [f"cat/{name}", os.fsdecode(b"zo\xeb/two\nlines.jpg")]
    assert source.labels == ["cat", "zo\\udceb"]  # labels go into files and graphs: always valid text
    assert source.read(0) == b"cat/caf\xe9.jpg"
    source.path(0).unlink()
    with pytest.raises(ImageError, match=r"^the file is not there$"):
        source.read(0)


def test_a_folder_that_vanishes_while_it_is_listed_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path, "cat/1.jpg", "dog/2.jpg")
    real = os.open

    def opened(path: str, flags: int) -> int:
        if path.endswith("cat"):
            (root / "dog" / "2.jpg").unlink()
            (root / "dog").rmdir()
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(SourceError, match=r"dog cannot be listed \(No such file or directory\)"):
        open_source(root)


def own_output(root: Path) -> None:
    """A cache, a run with its figures and a sweep, as featx lays them out, with nothing in their files."""
    digest = "0123456789abcdef"
    touch(
        root,
        f"cache/features/tiny-{digest}/spec.json",
        f"cache/memo/{digest * 2}",
        f"cache/memo/{digest * 2}.2/{digest}-{digest}",
        f"cache/engines/{digest * 4}.winograd1.json",
    )
    touch(root, "export/photos-tiny/plots/confusion.png", "export/photos-tiny/plots/map.png", "export/mine/model.onnx")
    (root / "export/photos-tiny/config.json").write_text('{"data_digest": "ab", "featx": "0.1.0"}')
    touch(root, "export/photos-sweep/runs/tiny/plots/map.png", "export/photos-sweep/plots/trade-off.png")
    (root / "export/photos-sweep/sweep.json").write_text('{"points": [], "winner": "runs/tiny"}')


@pytest.mark.parametrize("place", ["", "ants/", "ants/2021/"])
def test_what_featx_has_written_among_the_images_is_left_out_and_said_once(tmp_path: Path, place: str) -> None:
    root = touch(tmp_path, "ants/1.jpg", "ants/2021/2.jpg", "bees/3.jpg")
    before = table(open_source(root))
    own_output(root / place)
    source = open_source(root)
    assert table(source) == before
    (note,) = source.notes
    assert note.startswith(f"left out, since featx wrote them: {place}cache/") and note.endswith(" and 2 more")
    assert source.ignored == [f"{place}export/mine/model.onnx"]
    assert [Path(str(path)).name for path in expand(root)] == ["1.jpg", "2.jpg", "3.jpg"]


def test_output_beside_splits_and_around_a_folder_of_photographs_is_left_out(tmp_path: Path) -> None:
    root = touch(tmp_path, "photos/train/ants/1.jpg", "photos/val/ants/2.jpg")
    for place in (root, root / "photos", root / "photos/train"):
        own_output(place)
        assert table(open_source(root)) == [
            ("photos/train/ants/1.jpg", "ants", "train"),
            ("photos/val/ants/2.jpg", "ants", "val"),
        ]
    with pytest.raises(SourceError, match=r"there is no image in .*; it holds plots"):
        open_source(root / "export/photos-tiny")


def test_a_class_may_be_called_like_the_folders_that_featx_writes(tmp_path: Path) -> None:
    names = ("cache", "export", "plots", "features", "memo", "runs", "engines")
    root = touch(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)), "plots/confusion.png")
    (root / "cache/config.json").write_text('{"model_type": "vit"}')
    source = open_source(root)
    assert set(source.labels or []) == set(names) and len(source) == 15
    assert not any("left out" in note for note in source.notes)
    assert len(list(expand(root))) == 15


def test_rows_follow_the_order_of_whole_paths_whatever_order_folders_are_looked_at(tmp_path: Path) -> None:
    paths = ["cat/a/2.jpg", "cat/a b/3.JPEG", "cat/a-b/4.png", "cat/1.jpg", "cat/a.jpg/5.jpg", "cat/a/b/6.jpg"]
    root = touch(tmp_path, *paths, "dog/1.jpg")
    source = open_source(root)
    walked = [sorted(path for path in [*paths, "dog/1.jpg"] if os.path.dirname(path) == folder)
              for folder in sorted({os.path.dirname(path) for path in [*paths, "dog/1.jpg"]})]  # fmt: skip
    assert source.ids == list(chain.from_iterable(walked))
    assert source.labels == [id[:3] for id in source.ids]
    assert source.stats is not None
    assert [tuple(row) for row in source.stats.tolist()] == [stat_row(os.stat(root / id)) for id in source.ids]


def test_listing_takes_at_most_100_bytes_a_file_beside_its_name_at_its_peak(tmp_path: Path) -> None:
    for folder in range(20):
        touch(tmp_path, *(f"{folder}/{i:030d}.jpg" for i in range(100)), *(f"{folder}/{i}.txt" for i in range(100)))
    open_source(tmp_path)
    tracemalloc.start()
    try:
        source = open_source(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(source), len(source.ignored)) == (2000, 2000)
    names = sum(len(name) for name in (*source.ids, *source.ignored))
    assert peak - names < 100 * len(source) + (1 << 17)  # and what is the same for a million files
