"""What a feature's identity is, and that splits come from the images' content alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from featx.backbones.request import BackboneInfo
from featx.errors import FeatxError, NewerError
from featx.features import VALIDATION_SHARE, Features, FeatureSpec, assign_splits, content_key, groups, hash_fraction
from featx.identity import ADDED
from featx.pixels.preprocess import Preprocess

SPEC = FeatureSpec(backbone="torchvision/resnet18", weights="00" * 32)


def random_keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def keys_at(*fractions: float) -> np.ndarray:
    """Keys whose `hash_fraction` is as given; equal fractions give equal keys."""
    rows = [int(f * 2**64).to_bytes(8, "big") + b"\0" * 24 for f in fractions]
    return np.array([list(row) for row in rows], np.uint8).reshape(-1, 32)


def split_of(
    keys: np.ndarray, y: list[int] | np.ndarray, given: list[str] | None = None
) -> tuple[list[str], list[str]]:
    labels = np.asarray(y, np.int64)
    names = [f"c{i}" for i in range(max(int(labels.max(initial=0)) + 1, 1))]
    splits, notes = assign_splits(keys, labels, np.array(given or [""] * len(keys), dtype="U5"), names)
    return splits.tolist(), notes


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_is_the_sha256_of_the_bytes() -> None:
    # FIPS 180-2, appendix B.1
    assert content_key(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_fraction_is_the_first_eight_bytes_as_a_share() -> None:
    keys = np.concatenate([random_keys(200), np.zeros((1, 32), np.uint8), np.full((1, 32), 255, np.uint8)])
    expected = [int.from_bytes(bytes(key[:8]), "big") / 2**64 for key in keys]
    found = hash_fraction(keys)
    assert np.allclose(found, expected, rtol=1e-15)
    assert found.min() == 0 and found.max() < 1
    assert hash_fraction(np.zeros((0, 32), np.uint8)).shape == (0,)


def test_rows_with_equal_keys_share_a_group_and_others_do_not() -> None:
    distinct = random_keys(40)
    distinct[1] = distinct[0]
    distinct[1, 31] ^= 1  # one bit of the last byte apart
    distinct[2, 16:] = 0
    distinct[3] = distinct[2]
    distinct[3, 31] = 1  # a trailing zero counts
    picks = np.random.default_rng(1).integers(0, 40, 300)
    found = groups(distinct[picks])
    assert found.dtype == np.int64 and found.shape == (300,)
    assert ((found[:, None] == found[None, :]) == (picks[:, None] == picks[None, :])).all()
    assert groups(np.zeros((0, 32), np.uint8)).shape == (0,)


# --- splits ---------------------------------------------------------------------------------------


def test_validation_is_a_fifth_of_each_class_in_expectation() -> None:
    y = np.random.default_rng(0).integers(0, 3, 30_000)
    splits, notes = split_of(random_keys(30_000), y)
    for label in range(3):
        share = np.mean(np.array(splits)[y == label] == "val")
        assert abs(share - VALIDATION_SHARE) < 0.02
    assert set(splits) == {"train", "val"} and notes == []


def test_an_image_is_validation_where_its_hash_is_below_a_fifth() -> None:
    assert split_of(keys_at(0.0, 0.19999, 0.2001, 0.99), [0, 0, 0, 0])[0] == ["val", "val", "train", "train"]


def test_adding_removing_and_reordering_images_moves_no_other_image() -> None:
    keys, y = random_keys(2000), np.random.default_rng(0).integers(0, 5, 2000)
    whole = np.array(split_of(keys, y)[0])
    some = np.random.default_rng(1).permutation(2000)[:500]
    assert split_of(keys[some], y[some])[0] == whole[some].tolist()


def test_duplicates_never_straddle_even_when_they_are_borrowed() -> None:
    distinct = random_keys(30)
    distinct[::7, 0] = 255  # class 0 has no image below a fifth, and must borrow
    picks = np.random.default_rng(0).integers(0, 30, 400)
    y = picks % 7
    splits, notes = split_of(distinct[picks], y)
    assert len(notes) == 1
    for image in range(30):
        assert len({s for s, p in zip(splits, picks, strict=True) if p == image}) <= 1
    for label in range(7):
        assert {s for s, p in zip(splits, y, strict=True) if p == label} == {"train", "val"}


def test_a_class_without_validation_borrows_its_nearest_hash_and_says_so() -> None:
    splits, notes = split_of(keys_at(0.9, 0.4, 0.3, 0.3, 0.1, 0.5), [0, 0, 0, 0, 1, 1])
    assert splits == ["train", "train", "val", "val", "val", "train"]
    assert notes == ["class 'c0' had no image in val and borrows its nearest hash from train"]


def test_a_class_without_training_borrows_too() -> None:
    splits, notes = split_of(keys_at(0.01, 0.15, 0.1), [0, 0, 0])
    assert splits == ["val", "train", "val"]
    assert notes == ["class 'c0' had no image in train and borrows its nearest hash from val"]


def test_a_class_of_one_image_stays_on_one_side_and_is_named() -> None:
    splits, notes = split_of(keys_at(0.7, 0.1, 0.6, 0.05, 0.05), [0, 1, 1, 2, 2])
    assert splits == ["train", "val", "train", "train", "train"]  # else it could never be answered
    assert notes == [
        "class 'c0' has one distinct image, in train: its val side stays empty",
        "class 'c2' has one distinct image, in train: its val side stays empty",
    ]


def test_an_image_under_two_labels_is_not_borrowed_while_there_is_another() -> None:
    # the image at 0.3 is all that class 0 has; class 1 borrows its other image, though that is farther
    splits, notes = split_of(keys_at(0.3, 0.3, 0.5), [0, 1, 1])
    assert splits == ["train", "train", "val"]
    assert len(notes) == 2


def test_given_splits_are_kept_and_the_rest_is_train() -> None:
    given = ["val", "test", "train", "", ""]
    splits, notes = split_of(keys_at(0.9, 0.1, 0.1, 0.1, 0.1), [0, 0, 0, 0, -1], given)
    assert splits == ["val", "test", "train", "train", ""] and notes == []


def test_without_a_given_validation_it_is_taken_out_of_train_and_never_out_of_test() -> None:
    splits, notes = split_of(keys_at(0.1, 0.3, 0.1, 0.8, 0.1), [0, 0, 0, 0, 0], ["train", "train", "test", "test", ""])
    assert splits == ["val", "train", "test", "test", "val"] and notes == []


def test_images_without_labels_belong_to_no_split() -> None:
    assert split_of(keys_at(0.1, 0.9), [-1, -1]) == (["", ""], [])
    assert split_of(keys_at(), []) == ([], [])


def test_what_was_given_is_not_changed_in_place() -> None:
    given = np.array(["", ""], dtype="U5")
    assign_splits(keys_at(0.1, 0.9), np.array([0, 0]), given, ["c"])
    assert given.tolist() == ["", ""]


# --- the spec -------------------------------------------------------------------------------------


ODD = Preprocess(342, 299, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.25, 0.125), "nvjpeg/1")
INFO = BackboneInfo("timm/vit_tiny", "ab" * 32, "blocks.3", ODD, (192,), ("ant", "bee"), True, 5, "note", "mit")


def sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        (SPEC, "e3d4a46dec3f1a7ce901a8a556fdb8809f8aeaced43492874c102f02dbc264f9"),
        (replace(SPEC, preprocess=ODD), "f208ce5b6b2bebbbae95321c2310e67f28e07bd5b94206091ab66ef635bd71b3"),
        (replace(SPEC, view="crop-flip/seed=0/3"), "378565d7f999eeb14bbb3ea33e3a2f3837263a52be7f3ef7896949e6a46b5e1b"),
        (
            replace(SPEC, layer="logits", precision="bf16", dtype="float16"),
            "7be3deafffd3b245b349d666598e73c27bb940350d398e47ae28c83c017f69bf",
        ),
        (
            INFO.spec(precision="fp16", dtype="float16"),
            "7a021245b56710ba546e7f46f7cc4c029d9aff2fd8003fe31b0334dbef5178fa",
        ),
    ],
    ids=("plain", "pixels", "view", "stored", "info"),
)
def test_the_digests_of_version_1_are_pinned(spec: FeatureSpec, digest: str) -> None:
    """If this fails, every cache in the world is cold: raise `FORMAT_VERSION` on purpose, or undo it."""
    assert spec.version == 1
    assert spec.digest == digest == sha256(spec.to_dict())


def test_the_json_of_preprocessing_and_backbones_is_pinned() -> None:
    assert sha256(Preprocess().to_dict()) == "d0424e188aac983ef292ad45b0f9ee0ab389e5eb217381ff81b87d15825cacee"
    assert sha256(ODD.to_dict()) == "0b4dc7c5c0eea43d95ea2d9e76f64a3e2cf155a75443d9f139fbec2071461495"
    assert sha256(INFO.to_dict()) == "beeb0874e31e589ed3cd22e88efa56ffea9dc3664dee938dbf566c7a7d76910a"


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "torchvision/resnet34"},
        {"weights": "01" * 32},
        {"layer": "logits"},
        {"preprocess": Preprocess(resize=232)},
        {"preprocess": Preprocess(crop=192)},
        {"preprocess": Preprocess(interpolation="bicubic")},
        {"preprocess": Preprocess(mean=(0.5, 0.5, 0.5))},
        {"preprocess": Preprocess(std=(0.5, 0.5, 0.5))},
        {"preprocess": Preprocess(pixels="pillow/2")},
        {"view": "crop-flip/seed=0/3"},
        {"precision": "bf16"},
        {"dtype": "float16"},
        {"version": 2},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_whatever_changes_a_feature_changes_the_digest(change: dict[str, Any]) -> None:
    assert replace(SPEC, **change).digest != SPEC.digest


def test_a_spec_survives_json() -> None:
    again = FeatureSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC and again.digest == SPEC.digest


@dataclass(frozen=True)
class GrownPreprocess(Preprocess):
    mode: str = field(default="center", metadata=ADDED)


@dataclass(frozen=True)
class GrownSpec(FeatureSpec):
    tokens: tuple[int, ...] = field(default=(), metadata=ADDED)


def test_a_field_added_later_changes_a_digest_only_where_it_is_used() -> None:
    weights = "00" * 32
    assert GrownSpec(SPEC.backbone, weights, preprocess=GrownPreprocess()).digest == SPEC.digest
    used = [
        GrownSpec(SPEC.backbone, weights, tokens=(1, 2)),
        GrownSpec(SPEC.backbone, weights, preprocess=GrownPreprocess(mode="squash")),
    ]
    assert len({SPEC.digest, *(spec.digest for spec in used)}) == 3
    assert GrownSpec.from_dict(json.loads(json.dumps(used[0].to_dict()))) == used[0]
    assert GrownSpec.from_dict(SPEC.to_dict()) == GrownSpec(SPEC.backbone, weights)
    assert replace(INFO, preprocess=GrownPreprocess(**vars(ODD))).to_dict() == INFO.to_dict()
    for spec, name in zip(used, ("tokens", "mode"), strict=True):
        with pytest.raises(NewerError, match=rf"does not know \({name}\).*newer one; update featx"):
            FeatureSpec.from_dict(spec.to_dict())


def test_a_spec_that_lacks_a_field_of_version_1_is_refused() -> None:
    values = SPEC.to_dict()
    del values["layer"]
    with pytest.raises(FeatxError, match="FeatureSpec lacks layer"):
        FeatureSpec.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "not 'float64'"),
        ({"precision": "int4"}, "not 'int4'"),
        ({"precision": "int8"}, "name their calibration"),
        ({"calibration": "00" * 32, "engine": "openvino"}, "and no others"),
    ],
)
def test_a_spec_of_another_precision_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatxError, match=message):
        replace(SPEC, **change)


# --- the table ------------------------------------------------------------------------------------


def table() -> Features:
    return Features(
        rows=np.arange(12, dtype=np.float32).reshape(4, 3),
        y=np.array([0, 1, -1, 1]),
        ids=["a", "b", "c", "d"],
        class_names=["ant", "bee"],
        splits=np.array(["train", "val", "", "train"]),
        keys=random_keys(4),
        spec=SPEC,
    )


def test_taking_rows_takes_all_their_columns() -> None:
    found = table().take(np.array([3, 0]))
    assert found.X.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert (found.y.tolist(), found.ids, found.splits.tolist()) == ([1, 0], ["d", "a"], ["train", "train"])
    assert (found.keys == random_keys(4)[[3, 0]]).all() and found.class_names == ["ant", "bee"]
    assert table().split("train").ids == ["a", "d"] and len(table().split("test")) == 0


def test_the_data_digest_knows_content_labels_and_splits_but_no_names_and_no_order() -> None:
    first = table()
    assert replace(first, ids=["w", "x", "y", "z"]).digest == first.digest
    assert first.take(np.array([2, 0, 3, 1])).digest == first.digest
    assert replace(first, rows=first.X + 1).digest == first.digest
    others = [
        replace(first, y=np.array([1, 1, -1, 1])),
        replace(first, splits=np.array(["train", "val", "", "test"])),
        replace(first, class_names=["ant", "wasp"]),
        replace(first, keys=random_keys(4, seed=1)),
        first.take(np.array([0, 1, 2])),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 6
