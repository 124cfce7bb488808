"""The head's file: written whole or not at all, and every other file is refused in one way."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from featx.errors import HeadError
from featx.head import Head

HEAD = Head(np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32), ("a", "ü"), "sigmoid", 0.25)
METADATA = {"class_names": '["a", "b"]', "activation": "softmax", "threshold": "null"}


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    HEAD.save(tmp_path / "head.safetensors")
    read = Head.load(tmp_path / "head.safetensors")
    assert (read.weight == HEAD.weight).all() and (read.bias == HEAD.bias).all()
    assert (read.class_names, read.activation, read.threshold) == (("a", "ü"), "sigmoid", 0.25)
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_write_that_fails_leaves_the_old_head(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    HEAD.save(path)
    before = path.read_bytes()

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))  # the head's file is longer
    try:
        with pytest.raises(OSError, match="too large"):
            Head(HEAD.weight + 1, HEAD.bias, HEAD.class_names).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "head.safetensors"
    HEAD.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(HeadError, match=r"head\.safetensors holds no head that featx wrote"):
        Head.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"class_names": '["a", '},
        {"class_names": "5"},
        {"class_names": '["a"]'},
        {"threshold": "half"},
        {"activation": "tanh"},
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, damage: dict[str, str]) -> None:
    path = tmp_path / "head.safetensors"
    tensors = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
    path.write_bytes(save(tensors, METADATA))
    assert Head.load(path).class_names == ("a", "b")
    path.write_bytes(save(tensors, METADATA | damage))
    with pytest.raises(HeadError, match=r"head\.safetensors holds no head that featx wrote"):
        Head.load(path)


def test_tensors_that_are_not_an_affine_map_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    for weight in (np.ones((), np.float32), np.ones((3, 3), np.float32), np.full((2, 3), np.nan, np.float32)):
        path.write_bytes(save({"weight": weight, "bias": np.ones(2, np.float32)}, METADATA))
        with pytest.raises(HeadError, match=r"head\.safetensors holds no head that featx wrote"):
            Head.load(path)


def test_answers_are_one_class_or_every_class_that_is_probable_enough() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.6, 0.1]], np.float32)
    weight, bias = np.zeros((3, 1), np.float32), np.zeros(3, np.float32)
    one, several = (Head(weight, bias, ("a", "b", "c"), kind) for kind in ("softmax", "sigmoid"))
    assert one.answers(p).tolist() == [[False, True, False], [True, False, False]]
    assert several.answers(p).tolist() == [[False, True, False], [True, True, False]]


def test_logits_are_aligned_by_name_and_an_unknown_class_is_never_the_answer() -> None:
    head = Head(np.zeros((2, 1), np.float32), np.zeros(2, np.float32), ("b", "a"))
    logits = np.array([[1.0, 2.0], [90.0, 80.0]])
    found = head.aligned(logits, ["a", "x", "b"])
    assert found[:, [2, 0]].tolist() == logits.tolist()
    assert (head.probabilities(found)[:, 1] < 1e-15).all() and np.isfinite(found).all()
