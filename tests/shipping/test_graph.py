"""The exported graph: its pixels against Pillow's, its sizes against torchvision's, its parts and its refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_files import SMALL, WIDTH, average_backbone, some_head
from PIL import Image

from featx.errors import ExportError
from featx.pixels.decoding import decode
from featx.pixels.preprocess import MAX_ASPECT, RESAMPLE, Preprocess
from featx.shipping import graph

# width, height: 1 px sides, the most extreme aspect ratios, upscaling, exact and nearly exact sizes
SIZES = [
    (1, 1),
    (1, 64),
    (64, 1),
    (2, 127),
    (3, 5),
    (31, 17),
    (100, 100),
    (224, 224),
    (256, 256),
    (255, 257),
    (256, 341),
    (341, 256),
    (257, 255),
    (333, 500),
    (500, 375),
    (289, 865),
    (40, 2560),
    (1201, 1600),
]


def session(model: onnx.ModelProto, *outputs: str) -> onnxruntime.InferenceSession:
    """A session that gives inner values of the graph."""
    if outputs:
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs)
        for value in model.graph.output:
            value.ClearField("type")
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def pixels_of(preprocess: Preprocess) -> onnxruntime.InferenceSession:
    return session(graph.build(average_backbone(preprocess.crop), some_head(), preprocess), graph.PIXELS)


def by_pillow(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """torchvision's `Resize` and `CenterCrop` written out: the whole image across, then down; `uint8 [3, c, c]`."""
    resample = RESAMPLE[preprocess.interpolation]
    short, long = sorted(image.size)
    other = int(preprocess.resize * long / short)
    width, height = (preprocess.resize, other) if image.width <= image.height else (other, preprocess.resize)
    whole = np.asarray(image.resize((width, image.height), resample).resize((width, height), resample))
    top, left = (round((side - preprocess.crop) / 2.0) for side in (height, width))
    return whole[top : top + preprocess.crop, left : left + preprocess.crop].transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["noise", "extremes"])
def test_pixels_are_within_a_level_of_pillows_at_every_size(interpolation: str, kind: str) -> None:
    preprocess = Preprocess(interpolation=interpolation)
    run = pixels_of(preprocess).run
    rng = np.random.default_rng(0)
    total = 0.0
    for width, height in SIZES:
        array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if kind == "extremes":  # only black and white: bicubic overshoots at every edge
            array = np.where(array < 128, 0, 255).astype(np.uint8)
        (found,) = run(None, {"images": array[None]})[0]
        assert found.shape == (3, 224, 224)
        for expected in (by_pillow(Image.fromarray(array), preprocess), preprocess(array)):
            apart = np.abs(found.astype(int) - expected)
            # 224 -> 256 has exact halves in both passes: 1 in 100,000 pixels of noise is 2 levels off
            ties = (width, height, kind) == (224, 224, "noise")
            assert apart.max() <= (2 if ties or interpolation == "bicubic" else 1), (width, height)
            assert (apart > 1).mean() < 2e-5
        total += apart.mean()
    assert total / len(SIZES) < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_are_within_a_level_of_the_training_pixels(photos: Path, interpolation: str) -> None:
    preprocess = Preprocess(interpolation=interpolation)
    run = pixels_of(preprocess).run
    files = sorted((photos / "val" / "bees").glob("*.jpg"))[:12]
    assert len(files) == 12
    for file in files:
        image = decode(file.read_bytes())
        (found,) = run(None, {"images": np.asarray(image)[None]})[0]
        assert np.abs(found.astype(int) - preprocess(image)).max() <= 1


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (342, 299), (518, 518), (225, 224), (7, 4)])
def test_sizes_and_offsets_are_torchvisions(resize: int, crop: int) -> None:
    preprocess = Preprocess(resize=resize, crop=crop)
    part = graph.pixels_part(preprocess)
    pixels = {f"preprocess/{name}" for name in ("resized", "cropped", "channels_first", "pixels")}
    arithmetic = helper.make_graph(
        [node for node in part.nodes if node.name not in pixels],
        "sizes",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
        [],
        part.initializers,
    )
    model = helper.make_model(arithmetic, opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=10)
    run = session(model, "preprocess/resized_size", "preprocess/offset").run
    rng = np.random.default_rng(resize)
    sizes = rng.integers(1, 5000, (300, 2)).tolist() + [[a, b] for a in range(1, 9) for b in range(1, 9)]
    looked_at = 0
    for width, height in sizes:
        if max(width, height) > MAX_ASPECT * min(width, height):
            continue
        found, offset = run(None, {"images": np.zeros((1, height, width, 3), np.uint8)})
        short, long = sorted((width, height))
        other = int(resize * long / short)  # as torchvision's _compute_resized_output_size
        expected = (other, resize) if width <= height else (resize, other)
        assert tuple(found) == expected, (width, height)
        assert preprocess.resized(width, height) == expected[::-1]
        assert offset.tolist() == [round((side - crop) / 2.0) for side in expected]  # as center_crop
        looked_at += 1
    assert looked_at > 250


def test_a_batch_gives_what_its_images_give_alone() -> None:
    run = session(graph.build(average_backbone(32), some_head(), SMALL)).run
    images = np.random.default_rng(0).integers(0, 256, (5, 50, 71, 3), dtype=np.uint8)
    together = run(None, {"images": images})
    for i in range(5):
        for whole, alone in zip(together, run(None, {"images": images[i : i + 1]}), strict=True):
            np.testing.assert_allclose(whole[i], alone[0], rtol=1e-6, atol=1e-6)
    empty = run(None, {"images": images[:0]})
    assert [len(values) for values in empty] == [0, 0, 0]


def test_a_square_of_the_resize_target_is_not_resized_again() -> None:
    array = np.random.default_rng(0).integers(0, 256, (36, 36, 3), dtype=np.uint8)
    (found,) = pixels_of(SMALL).run(None, {"images": array[None]})[0]
    np.testing.assert_array_equal(found, array[2:34, 2:34].transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (0, 0), (1, 65), (129, 2), (1, 100_000)])
def test_empty_and_extreme_images_are_refused_by_name_before_any_memory_is_taken(height: int, width: int) -> None:
    run = session(graph.build(average_backbone(32), some_head(), SMALL)).run
    with pytest.raises(Exception, match=graph.GUARD):
        run(None, {"images": np.zeros((1, height, width, 3), np.uint8)})
    run(None, {"images": np.zeros((1, 64, 1, 3), np.uint8)})


def test_pixels_that_were_normalised_before_are_refused_by_type() -> None:
    run = session(graph.build(average_backbone(32), some_head(), SMALL)).run
    with pytest.raises(Exception, match=r"tensor\(float\).*uint8"):
        run(None, {"images": np.zeros((1, 50, 50, 3), np.float32)})


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_head_inside_is_the_head_outside(activation: str) -> None:
    head = some_head(activation=activation, threshold=0.6)
    names = ("probabilities", "logits", "accepted")
    run = session(graph.build(None, head, SMALL, input="features", outputs=names)).run
    X = np.random.default_rng(0).normal(size=(200, WIDTH)).astype(np.float32)
    probabilities, logits, accepted = run(None, {"features": X})
    np.testing.assert_allclose(logits, head(X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(probabilities, head.probabilities(head(X)), atol=1e-6)
    np.testing.assert_array_equal(accepted, probabilities.max(axis=1) >= np.float32(0.6))
    assert 0 < accepted.sum() < 200


@pytest.mark.parametrize(
    ("outputs", "input", "message"),
    [
        ((), "pixels", "one or more"),
        (("labels",), "pixels", "labels"),
        (("logits", "logits"), "pixels", "each once"),
        (("accepted",), "pixels", "no rejection threshold"),
        (("features",), "features", "takes features in"),
        (("logits",), "image", "pixels, tensor, features"),
    ],
)
def test_choices_that_cannot_be_are_refused(outputs: tuple[str, ...], input: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        graph.build(average_backbone(32), some_head(), SMALL, input=input, outputs=outputs)


def test_a_backbone_of_another_form_is_refused() -> None:
    old = average_backbone(32)
    old.opset_import[0].version = 17
    with pytest.raises(ExportError, match="operator set 17"):
        graph.build(old, some_head(), SMALL)
    other = average_backbone(32)
    other.graph.input[0].name = "input0"
    with pytest.raises(ExportError, match="input0"):
        graph.build(other, some_head(), SMALL)


@pytest.mark.parametrize("input", graph.INPUTS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_files_pass_the_checker_and_load_without_a_warning(
    input: str, interpolation: str, capfd: pytest.CaptureFixture[str]
) -> None:
    preprocess = Preprocess(36, 32, interpolation)
    names = tuple(name for name in graph.OUTPUTS if input != "features" or name != "features")
    model = graph.build(average_backbone(32), some_head(threshold=0.5), preprocess, input=input, outputs=names)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [v.name for v in session(model).get_outputs()] == list(names)
    assert capfd.readouterr().err == ""


def test_a_part_keeps_its_digest_until_one_of_its_weights_changes() -> None:
    pixels, tensor, alone = (
        graph.part_digests(graph.build(average_backbone(32), some_head(), SMALL, input=i, outputs=("logits",)).graph)
        for i in graph.INPUTS
    )
    assert pixels["backbone"] == tensor["backbone"] != alone["backbone"]
    assert pixels["head"] == tensor["head"]
    assert pixels["preprocess"] != tensor["preprocess"]
    model = graph.build(average_backbone(32), some_head(), SMALL, outputs=("logits",))
    weight = next(t for t in model.graph.initializer if t.name == "backbone/mix")
    data = bytearray(weight.raw_data)
    data[40] ^= 1
    weight.raw_data = bytes(data)
    changed = graph.part_digests(model.graph)
    assert {name for name in changed if changed[name] != pixels[name]} == {"backbone"}


def test_what_an_exporter_notes_about_its_machine_is_not_in_the_file() -> None:
    noted = average_backbone(32)
    noted.graph.node[0].metadata_props.add(key="stack_trace", value="/home/someone/project/model.py")
    noted.graph.node[1].doc_string = "/home/someone"
    noted.graph.initializer[0].doc_string = "/home/someone"
    noted.metadata_props.add(key="source", value="/home/someone")
    assert b"/home/someone" in noted.SerializeToString()
    assert b"/home/someone" not in graph.build(noted, some_head(), SMALL).SerializeToString()


def test_names_of_a_backbone_do_not_clash_with_ours() -> None:
    model = average_backbone(32)
    for node in model.graph.node:
        node.input[:] = ["logits" if name == "normal" else name for name in node.input]
        node.output[:] = ["logits" if name == "normal" else name for name in node.output]
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    found = session(graph.build(model, some_head(), SMALL)).run(["logits"], {"images": images})[0]
    expected = session(graph.build(average_backbone(32), some_head(), SMALL)).run(["logits"], {"images": images})[0]
    np.testing.assert_array_equal(found, expected)
    assert math.isfinite(float(found.sum()))
