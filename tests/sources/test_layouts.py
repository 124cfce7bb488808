"""The layouts of the downloads that most people start from: each is understood, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from featx.errors import SourceError
from featx.sources.names import splits_among
from featx.sources.opening import open_source


def laid_out(root: Path, files: str) -> Path:
    for name in files.split():
        path = root / name.replace("~", " ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def rows(root: Path) -> set[str]:
    """`split:label` of each image, without repeats."""
    source = open_source(root)
    labels, splits = source.labels or [""] * len(source), source.splits or [""] * len(source)
    return {f"{split}:{label}" for label, split in zip(labels, splits, strict=True)}


UNDERSTOOD = {
    "Kaggle cats and dogs": (
        "training_set/training_set/cats/1.jpg training_set/training_set/dogs/2.jpg test_set/test_set/cats/3.jpg "
        "test_set/test_set/dogs/4.jpg",
        {"train:cats", "train:dogs", "test:cats", "test:dogs"},
        "read as splits: test_set is test, training_set is train",
    ),
    "Intel scenes": (
        "seg_train/seg_train/sea/1.jpg seg_train/seg_train/street/2.jpg seg_test/seg_test/sea/3.jpg "
        "seg_pred/seg_pred/4.jpg",
        {"train:sea", "train:street", "test:sea", "test:"},
        "images directly in seg_pred/seg_pred/ have no label: 4.jpg",
    ),
    "chest X-rays": (
        "chest_xray/train/NORMAL/1.jpeg chest_xray/train/PNEUMONIA/2.jpeg chest_xray/val/NORMAL/3.jpeg "
        "chest_xray/test/PNEUMONIA/4.jpeg __MACOSX/chest_xray/._train",
        {"train:NORMAL", "train:PNEUMONIA", "val:NORMAL", "test:PNEUMONIA"},
        "chest_xray/ holds all images, and is read as the data set",
    ),
    "imagenette": (
        "imagenette2/train/n01440764/1.JPEG imagenette2/val/n01440764/2.JPEG imagenette2/noisy_imagenette.csv",
        {"train:n01440764", "val:n01440764"},
        "imagenette2/ holds all images",
    ),
    "ImageNet": (
        "ILSVRC/Data/CLS-LOC/train/n1/1.JPEG ILSVRC/Data/CLS-LOC/train/n2/2.JPEG ILSVRC/Data/CLS-LOC/val/3.JPEG "
        "ILSVRC/Annotations/CLS-LOC/val/3.xml LOC_val_solution.csv",
        {"train:n1", "train:n2", "val:"},
        "LOC_val_solution.csv is ignored; give its own path to use the labels in it",
    ),
    "Tiny ImageNet": (
        "train/n1/images/n1_0.JPEG train/n1/n1_boxes.txt val/images/val_0.JPEG val/val_annotations.txt "
        "test/images/test_0.JPEG",
        {"train:n1", "val:", "test:"},
        "images directly in val/images/ have no label: val_0.JPEG",
    ),
    "Food-101": (
        "food-101/images/pie/1.jpg food-101/images/sushi/2.jpg food-101/meta/train.txt food-101/meta/test.txt",
        {":pie", ":sushi"},
        "food-101/meta/test.txt, food-101/meta/train.txt may say which images are held out; featx does not read it",
    ),
    "CUB-200": (
        "images/001.Auk/1.jpg images/002.Jay/2.jpg train_test_split.txt images.txt",
        {":001.Auk", ":002.Jay"},
        "train_test_split.txt may say which images are held out; featx does not read it",
    ),
    "Caltech-101": (
        "101_ObjectCategories/ant/1.jpg 101_ObjectCategories/BACKGROUND_Google/2.jpg",
        {":ant", ":BACKGROUND_Google"},
        "101_ObjectCategories/ holds all images",
    ),
    "new plant diseases": (
        "New~Plant~(Augmented)/New~Plant~(Augmented)/train/Rust/1.jpg "
        "New~Plant~(Augmented)/New~Plant~(Augmented)/valid/Rust/2.jpg",
        {"train:Rust", "val:Rust"},
        "New Plant (Augmented)/New Plant (Augmented)/ holds all images",
    ),
    "CIFAR-10 as PNG, and what fastai, Ultralytics and Roboflow write": (
        "train/cat/1.png valid/cat/2.png test/cat/3.png README.roboflow.txt",
        {"train:cat", "val:cat", "test:cat"},
        "",
    ),
    "Stanford Cars by class": (
        "car_data/car_data/train/Audi/1.jpg car_data/car_data/test/Audi/2.jpg anno_train.csv names.csv",
        {"train:Audi", "test:Audi"},
        "",
    ),
    "Stanford Cars as published": (
        "cars_train/1.jpg cars_test/2.jpg devkit/cars_meta.mat",
        {"train:", "test:"},
        "images directly in cars_train/ have no label",
    ),
    "YOLO": (
        "images/train/1.jpg images/val/2.jpg labels/train/1.txt labels/val/2.txt",
        {"train:", "val:"},
        "images directly in images/train/ have no label",
    ),
    "Oxford flowers": ("jpg/image_00001.jpg setid.mat imagelabels.mat", {":"}, "jpg/ holds all images"),
    "dog breeds": (
        "train/1.jpg test/2.jpg labels.csv",
        {"train:", "test:"},
        "labels.csv is ignored; give its own path to use the labels in it",
    ),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_well_known_layout_is_understood(name: str, tmp_path: Path) -> None:
    files, expected, note = UNDERSTOOD[name]
    root = laid_out(tmp_path, files)
    assert rows(root) == expected
    assert any(note in each for each in open_source(root).notes) or not note


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("Train/0/1.png Test/2.png Meta/3.png", "named as splits (Test, Train) beside others (Meta)"),  # GTSRB
        ("chest_xray/train/a/1.jpg train/a/1.jpg test/a/2.jpg", "named as splits (test, train) beside others"),
        ("images/Abyssinian_1.jpg annotations/trimaps/Abyssinian_1.png", "give that one"),  # Oxford pets
        ("train/1.jpg bus/2.jpg car/3.jpg", "named as splits (train) beside others (bus, car)"),
        ("simpsons_dataset/bart/1.jpg kaggle_simpson_testset/2.jpg", "named as splits (kaggle_simpson_testset)"),
        ("cat/train/1.jpg cat/test/2.jpg dog/train/3.jpg", "cat holds folders named as splits (test, train)"),
        ("bottle/train/good/1.png bottle/test/bad/2.png bottle/ground_truth/3.png", "Give it alone"),  # MVTec's
        ("train/train/a/1.jpg train/test/a/2.jpg val/a/3.jpg", "train, a split, holds folders named as splits"),
    ],
)
def test_a_layout_that_could_be_two_things_is_refused_with_what_to_do(files: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as refused:
        open_source(laid_out(tmp_path, files))
    assert words in str(refused.value)
    assert "Move one kind elsewhere" in str(refused.value) or "ive " in str(refused.value)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("Training Testing", "train test"),
        ("Test~Set TrainingData my_validation", "test train val"),
        ("train2017 val2017 images_test", "train val test"),
        ("trainset testset", "train test"),
        ("asl_alphabet_train asl_alphabet_test", "train test"),
        ("PublicTest PrivateTest", "test test"),
        ("training validation evaluation", "train val test"),
        ("test_a test_b Hold-out", "test test test"),
        *((name, "") for name in ("test_tube beaker", "bullet_train steam_train car", "training_shoe boot")),
        *((name, "") for name in ("train_station contest latest", "train_val_test developer", "2017 2018")),
    ],
)
def test_names_are_splits_by_their_words_and_ordinary_classes_are_none(names: str, splits: str) -> None:
    given = [name.replace("~", " ") for name in names.split()]
    assert splits_among(given) == (dict(zip(given, splits.split(), strict=True)) if splits else {})


def test_trains_are_a_class_inside_a_split(tmp_path: Path) -> None:
    root = laid_out(tmp_path, "train/train/1.jpg train/bus/2.jpg val/train/3.jpg val/bus/4.jpg")
    assert rows(root) == {"train:train", "train:bus", "val:train", "val:bus"}


def test_a_class_that_has_folders_of_its_own_stays_one_and_is_pointed_out(tmp_path: Path) -> None:
    root = laid_out(tmp_path, "cat/2021/1.jpg cat/2022/2.jpg")
    assert rows(root) == {":cat"}
    assert "if its folders (2021, 2022) are the classes, give" in open_source(root).notes[0]


def test_folders_deeper_than_one_that_may_be_the_classes_are_pointed_out(tmp_path: Path) -> None:
    root = laid_out(tmp_path, "eurosat/2750/Forest/1.jpg eurosat/2750/River/2.jpg eurosat/EuroSAT.zip")
    assert rows(root) == {":eurosat"}
    (note,) = open_source(root).notes
    assert "one class, 'eurosat'" in note and f"(Forest, River) are the classes, give {root / 'eurosat/2750'}" in note


@pytest.mark.parametrize("names", ["horse-or-human validation-horse-or-human", "trn tst", "Testdaten Trainingsdaten"])
def test_classes_that_all_hold_the_same_folders_are_pointed_out(names: str, tmp_path: Path) -> None:
    first, second = names.split()
    laid_out(tmp_path, f"{first}/horse/1.jpg {first}/human/2.jpg {second}/horse/3.jpg {second}/human/4.jpg")
    assert f"the classes {first}, {second} all hold the same folders (horse, human)" in open_source(tmp_path).notes[0]


def test_a_folder_for_the_images_in_every_class_needs_no_note(tmp_path: Path) -> None:
    assert open_source(laid_out(tmp_path, "cat/images/1.jpg dog/images/2.jpg")).notes == []
