"""The crop modes against timm's own evaluation transform, resized across, then down; in Pillow, the graph, on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_files import average_backbone, exported_file, some_head
from PIL import Image

from featx.errors import FeatxError
from featx.pixels.decoding import decode
from featx.pixels.preprocess import RESAMPLE, Preprocess
from featx.pixels.resample import resized
from featx.pixels.views import augmented, pixels
from featx.shipping import graph
from featx.shipping.prediction import predict

# crop, crop_pct: as timm's networks have them, and odd ones; timm's `center` is `pad` where the crop is larger
GEOMETRY = [(224, 1.0), (96, 0.9), (64, 0.951), (113, 1.15)]
MODES = ["squash", "border", "pad"]
SIZES = [(1, 1), (1, 64), (64, 1), (3, 5), (31, 17), (224, 224), (223, 224), (448, 389), (20, 1280), (333, 500)]


def preprocess_of(mode: str, crop: int, share: float, interpolation: str = "bicubic") -> Preprocess:
    return Preprocess(math.floor(crop / share), crop, interpolation, crop_mode=mode)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]
    return [decode(path.read_bytes()) for path in sorted(photos.glob("val/*/*.jpg"))[::80]] + noise


@pytest.fixture
def across_then_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's resize of a Pillow image in featx's order of passes; Pillow 13 takes the cheaper one."""
    from torchvision.transforms import functional as F

    def resize(image: Image.Image, size: Sequence[int] | int, interpolation: object, *_: object) -> Image.Image:
        given = [size] if isinstance(size, int) else list(size)
        if len(given) == 1:
            given = F._compute_resized_output_size((image.height, image.width), given)
        resample = RESAMPLE[interpolation.value]  # type: ignore[attr-defined]
        return image.resize((given[1], image.height), resample).resize((given[1], given[0]), resample)

    monkeypatch.setattr(F, "resize", resize)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_timms_own(
    mode: str, interpolation: str, pictures: list[Image.Image], across_then_down: None
) -> None:
    factory = pytest.importorskip("timm.data.transforms_factory", reason="the extra featx[timm] is not installed")
    for crop, share in GEOMETRY:
        preprocess = preprocess_of(mode, crop, share, interpolation)
        own = factory.transforms_imagenet_eval(
            crop, share, "center" if mode == "pad" else mode, None, interpolation, preprocess.mean, normalize=False
        )
        for image in pictures:
            assert np.array_equal(preprocess(image), own(image).numpy()), (crop, share, image.size)


@pytest.mark.parametrize("mode", MODES)
def test_the_graphs_pixels_are_within_a_level_and_a_fitted_image_goes_through_it_unchanged(
    mode: str, pictures: list[Image.Image]
) -> None:
    for crop, share in GEOMETRY[1:]:
        preprocess = preprocess_of(mode, crop, share)
        model = graph.build(average_backbone(crop), some_head(), preprocess)
        session = onnxruntime.InferenceSession(graph.resize_alone(model), providers=["CPUExecutionProvider"])
        for image in pictures:
            found, again = (
                session.run(None, {"images": np.asarray(given)[None]})[0][0].astype(int)
                for given in (image, preprocess.fitted(image))
            )
            assert np.abs(found - preprocess(image)).max() <= 1, (crop, share, image.size)
            assert np.array_equal(again, preprocess(image)), (crop, share, image.size)
        for shape in ((0, 5, 3), (1, 65, 3)):
            with pytest.raises(Exception, match=graph.GUARD):
                session.run(None, {"images": np.zeros((1, *shape), np.uint8)})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.9, 1.25])
def test_images_of_any_size_are_answered_alike_alone_and_together(
    mode: str, share: float, pictures: list[Image.Image], tmp_path: Path
) -> None:
    preprocess = preprocess_of(mode, 32, share)
    backbone = average_backbone(32)
    model = exported_file(tmp_path / "model.onnx", preprocess=preprocess)
    arrays = [np.asarray(image) for image in pictures[:6]]
    session = onnxruntime.InferenceSession(backbone.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"images": np.stack([preprocess(image) for image in pictures[:6]])})
    wanted = some_head().probabilities(some_head()(rows))
    together = [answer.probabilities for answer in predict(model, arrays)]
    alone = [next(predict(model, array)).probabilities for array in arrays]
    np.testing.assert_allclose(together, wanted, atol=1e-5)
    np.testing.assert_allclose(alone, wanted, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_resize_in_torch_leaves_the_same_ground_around_an_image(mode: str, pictures: list[Image.Image]) -> None:
    preprocess = preprocess_of(mode, 112, 1.15)
    images = pictures[:4]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    boxes = [preprocess.box(*image.size, 112) for image in images]
    for image, view in zip(images, resized(tensors, boxes, 112, "bicubic", preprocess.fill), strict=True):
        assert np.abs(view.numpy().astype(int) - preprocess(image)).max() <= 2
    assert preprocess.fill == ((124, 116, 104) if mode == "border" else (0, 0, 0))


def test_an_augmented_view_is_a_box_inside_the_image_in_every_mode(pictures: list[Image.Image]) -> None:
    views = [pixels(preprocess_of(mode, 64, 0.9), pictures[0], b"k" * 32, augmented(0, 1)) for mode in MODES]
    center = Preprocess(71, 64, "bicubic")
    assert all(np.array_equal(view, pixels(center, pictures[0], b"k" * 32, augmented(0, 1))) for view in views)


def test_the_mode_is_in_the_identity_and_only_where_it_is_another() -> None:
    assert "crop_mode" not in Preprocess().to_dict()
    squash = Preprocess(crop_mode="squash")
    assert Preprocess.from_dict(squash.to_dict()) == squash != Preprocess()
    with pytest.raises(FeatxError, match="Preprocess: crop_mode"):
        Preprocess.from_dict({**squash.to_dict(), "crop_mode": "zoom"})
    with pytest.raises(FeatxError, match=r"colour of the mean, which lies in \[0, 1\]"):
        Preprocess(crop_mode="border", mean=(123.7, 116.3, 103.5))


def test_timms_networks_that_squash_zoom_or_add_a_border_have_their_own_rule() -> None:
    timm = pytest.importorskip("timm", reason="the extra featx[timm] is not installed")
    from featx.backbones.zoos.timm import preprocessing

    modes = {"convnext_tiny.in12k_ft_in1k_384": "squash", "volo_d4_448.sail_in1k": "pad"}
    found = {name: preprocessing(name, timm.get_pretrained_cfg(name), {}) for name in modes}
    assert {name: each.crop_mode for name, each in found.items()} == modes
    assert (found["volo_d4_448.sail_in1k"].resize, found["volo_d4_448.sail_in1k"].crop) == (389, 448)
    bordered = timm.get_pretrained_cfg("convnext_tiny.in12k_ft_in1k_384")
    bordered.crop_mode = "border"
    assert preprocessing("x", bordered, {"size": 128}) == Preprocess(128, 128, "bicubic", crop_mode="border")
