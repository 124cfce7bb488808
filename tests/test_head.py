"""The head's file: written whole or not at all, and every other file is refused in one way."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from featx.head import Head

HEAD = Head(np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32), ("a", "ü"), "sigmoid", 0.25)
METADATA = {"class_names": '["a", "b"]', "activation": "softmax", "threshold": "null"}


def test_a_head_is_read_as_it_was_written() -> None:
    read, sealed = Head.from_bytes(HEAD.to_bytes())
    assert (read.weight == HEAD.weight).all() and (read.bias == HEAD.bias).all() and sealed
    assert (read.class_names, read.activation, read.threshold) == (("a", "ü"), "sigmoid", 0.25)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_head_cut_short_is_refused(kept: int) -> None:
    with pytest.raises(ValueError):
        Head.from_bytes(HEAD.to_bytes()[:kept])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"class_names": '["a", '}, "Expecting value"),
        ({"class_names": "5"}, "class_names: Expected `array`"),
        ({"class_names": '["a"]'}, "do not map features"),
        ({"threshold": "half"}, "Expecting value"),
        ({"threshold": "1.5"}, r"a threshold is a probability in \[0, 1\], not 1.5"),
        ({"activation": "tanh"}, "activation: Invalid enum value 'tanh'"),
    ],
)
def test_damaged_metadata_is_refused(damage: dict[str, str], message: str) -> None:
    tensors = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
    older, sealed = Head.from_bytes(save(tensors, METADATA))
    assert older.class_names == ("a", "b") and not sealed
    with pytest.raises(ValueError, match=message):
        Head.from_bytes(save(tensors, METADATA | damage))


def test_tensors_that_are_not_an_affine_map_are_refused() -> None:
    ones = np.ones((2, 3), np.float32)
    for weight, message in (
        (np.ones((), np.float32), "do not map features"),
        (np.ones((3, 3), np.float32), "do not map features"),
        (np.full((2, 3), np.nan, np.float32), "NaN or infinite weights"),
        (ones.astype(np.float64), "not float32"),
    ):
        with pytest.raises(ValueError, match=message):
            Head.from_bytes(save({"weight": weight, "bias": np.ones(2, np.float32)}, METADATA))
    with pytest.raises(ValueError, match="lacks 'bias'"):
        Head.from_bytes(save({"weight": ones}, METADATA))


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
