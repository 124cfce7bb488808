"""`predict` and `Model` in memory and among processes: any kind of image, pickles, copies, forks."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import run_in_a_fork
from onnx_files import exported_file, some_head
from PIL import Image

from featx.errors import ExportError, FeatxError, SourceError
from featx.shipping.deployed import Model
from featx.shipping.prediction import predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_file(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_one_image_of_any_kind_gives_one_prediction(model: Path, pixels: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")  # its position is at the end now
    opened = Model(model)
    (expected,) = predict(opened, pixels)
    for image in (Image.fromarray(pixels), file, file.getvalue(), bytearray(file.getvalue())):
        (found,) = predict(opened, image)
        assert found.id == "image 0" and np.array_equal(found.probabilities, expected.probabilities)
    assert [each.label for each in predict(opened, np.stack([pixels, pixels]))] == [expected.label] * 2


def test_a_missing_cell_has_an_error_and_the_others_are_answered(model: Path, pixels: np.ndarray) -> None:
    first, second, third = predict(model, [pixels, None, pixels])
    assert (first.error, third.error) == (None, None) and first.label == third.label
    assert (second.id, second.error) == ("image 1", "a missing cell (None, NaN or NA)")
    with pytest.raises(SourceError, match="of type int; expected paths, Pillow images"):
        list(predict(model, 3))


@pytest.mark.parametrize("option", [{"batch_size": 2.5}, {"workers": -1}, {"top_k": None}])
def test_numbers_of_things_are_whole_and_from_1(model: Path, option: dict[str, Any]) -> None:
    with pytest.raises(FeatxError, match=f"{next(iter(option))} is a whole number from 1, not"):
        list(predict(model, "photos", **option))


def test_a_model_asks_for_a_batch_and_names_predict(model: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ExportError, match=r"uint8 \[N, H, W, 3\], got uint8 \[40, 60, 3\]; featx.predict\(model, "):
        Model(model)(pixels)


def test_a_model_is_pickled_and_copied_with_its_settings(
    model: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    opened = Model("model.onnx", threads=1)
    monkeypatch.chdir("/")
    expected = opened(pixels[None])["probabilities"]
    for again in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened), copy.copy(opened)):
        assert np.array_equal(again(pixels[None])["probabilities"], expected)
        assert again._again["threads"] == 1 and again.class_names == opened.class_names


def test_a_pickled_model_whose_file_was_replaced_says_so(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "model.onnx")
    pickled = pickle.dumps(Model(path))
    exported_file(path, some_head(4))
    with pytest.raises(ExportError, match=r"model.onnx is another export than the one this Model was made of"):
        pickle.loads(pickled)


def test_a_model_that_was_opened_before_a_fork_answers_in_the_child(model: Path, pixels: np.ndarray) -> None:
    opened = Model(model, threads=2)
    expected = opened(pixels[None])["probabilities"]

    def child() -> None:
        assert np.array_equal(opened(pixels[None])["probabilities"], expected)

    run_in_a_fork(child)
