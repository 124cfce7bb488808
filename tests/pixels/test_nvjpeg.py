"""Decoding by torchvision, with the device alone left open, against Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import asked, encoded, photo, repeated
from PIL import Image

from featx.errors import FeatxError
from featx.pixels import nvjpeg
from featx.pixels.jpeg import Encoded, Header
from featx.pixels.nvjpeg import Gpu, decoded
from featx.pixels.preprocess import Preprocess

pytestmark = [  # `Decoder` keeps these to itself
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]


def repeating(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor | None]:
    return [torch.from_numpy(repeated(data)) for data in files]


def test_whether_a_decoder_repeats_chroma_is_asked_of_it() -> None:
    assert not Gpu(Preprocess(36, 32), "cpu").repeats
    assert Gpu(Preprocess(36, 32), "cpu", repeating).repeats
    with pytest.raises(FeatxError, match=r"does not work on cpu.*use --decode exact"):
        Gpu(Preprocess(36, 32), "cpu", lambda files, device: [None] * len(files))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_is_turned_upright_and_cropped_as_by_pillow(orientation: int, mode: str) -> None:
    preprocess = Preprocess(36, 32)
    data = encoded(photo(mode=mode), orientation=orientation)
    ((found,),) = [views for views in Gpu(preprocess, "cpu")(asked([data], preprocess)) if views]
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - preprocess(data)).max() <= 2


def test_a_torchvision_without_the_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(FeatxError, match=r"has no decode_jpeg.*--decode exact"):
        Gpu(Preprocess(), "cpu")


def test_one_file_that_fails_fails_alone_in_parts_of_any_size() -> None:
    preprocess = Preprocess(36, 32)
    good, other = encoded(photo()), encoded(photo(50, 40), quality=95)
    bad = encoded(photo(64, 48))
    tables = bad.index(b"\xff\xc4"), bad.index(b"\xff\xda")
    bad = bad[: tables[0]] + b"\xff\xc4\x00\x05\x00\xff\xff" + bad[tables[1] :]
    found = Gpu(preprocess, "cpu")(asked([good, bad, other], preprocess))
    assert [views is None for views in found] == [False, True, False]

    calls: list[int] = []

    def counting(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor | None]:
        calls.append(len(files))
        return decoded(files, device)

    again = Gpu(preprocess, "cpu", counting, at_once=1)(asked([good, bad, other], preprocess))
    assert calls == [1, 1, 1, 1]  # the first asks about chroma
    assert all(a is b or (a and b and (a[0] == b[0]).all()) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("orientation", [1, 6])
def test_chroma_that_a_decoder_repeats_is_interpolated_before_the_image_is_turned(orientation: int) -> None:
    preprocess = Preprocess(36, 32)
    files = [encoded(photo(low=90, high=170, seed=i), orientation=orientation, subsampling=2) for i in range(3)]
    gpu = Gpu(preprocess, "cpu", repeating)
    exact = np.stack([preprocess(data) for data in files]).astype(int)
    apart = {}
    for gpu.repeats in (False, True):
        found = np.stack([views[0].numpy() for views in gpu(asked(files, preprocess)) if views])
        apart[gpu.repeats] = np.abs(found - exact)
    assert apart[False].max() > 3 and apart[True].max() <= 2


def test_a_mirrored_look_is_the_other_way_round() -> None:
    preprocess = Preprocess(36, 32)
    (image,) = asked([encoded(photo())], preprocess)
    (number, box, _) = image.looks[0]
    both = Encoded(image.data, image.header, [(number, box, False), (number, box, True)])
    ((plain, mirrored),) = [views for views in Gpu(preprocess, "cpu")([both]) if views]
    assert (plain.int() - mirrored.flip(2)).abs().max() <= 1 and (plain != mirrored).any()


def test_images_that_the_devices_memory_does_not_hold_are_left_to_pillow() -> None:
    preprocess = Preprocess(36, 32)

    def full(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor | None]:
        images = decoded(files, device)
        if any(image is not None and image.shape[2] > 100 for image in images):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return images

    gpu = Gpu(preprocess, "cpu", full, at_once=1)
    found = gpu(asked([encoded(photo(size, 40)) for size in (60, 120, 61)], preprocess))
    assert [views is None for views in found] == [False, True, False]


def test_pixels_of_another_size_than_the_headers_are_not_taken() -> None:
    preprocess = Preprocess(36, 32)
    right, wrong = asked([encoded(photo()), encoded(photo())], preprocess)
    found = Gpu(preprocess, "cpu")([right, Encoded(wrong.data, Header(62, 37, (2, 2)), wrong.looks)])
    assert found[0] is not None and found[1] is None


def test_a_batch_of_tensors_and_arrays_keeps_its_order() -> None:
    ones = torch.ones((3, 4, 4), dtype=torch.uint8)
    batch = nvjpeg.stacked([ones, np.zeros((3, 4, 4), np.uint8), ones])
    assert batch.dtype == torch.uint8 and batch.float().mean((1, 2, 3)).tolist() == [1, 0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_the_gpus_decoder_is_near_pillows(subsampling: str, photos: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: nvJPEG is untested on this machine")
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("val/*/*.jpg"))[::8]]
    files = [
        encoded(image, orientation=1 + i % 8, quality=90, subsampling=subsampling) for i, image in enumerate(images)
    ]
    files.append(encoded(images[0].convert("L")))
    preprocess = Preprocess()
    exact = np.stack([preprocess(data) for data in files]).astype(int)
    gpu = Gpu(preprocess, "cuda:0")
    asked_of_it, apart = gpu.repeats, {}
    for gpu.repeats in (False, True):
        found = gpu(asked(files, preprocess))
        assert all(views is not None and views[0].device.type == "cuda" for views in found)
        apart[gpu.repeats] = np.abs(np.stack([views[0].cpu().numpy() for views in found if views]) - exact).mean()
    assert apart[asked_of_it] < 0.3  # luma alone may differ by a level here and there
    if subsampling != "4:4:4":
        assert apart[asked_of_it] < apart[not asked_of_it] / 2


@pytest.mark.gpu
def test_a_mixed_batch_is_put_together_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: mixed batches are untested on this machine")
    ones = torch.ones((3, 4, 4), dtype=torch.uint8, device="cuda:0")
    batch = nvjpeg.stacked([ones, np.zeros((3, 4, 4), np.uint8), ones])
    assert batch.device.type == "cuda" and batch.float().mean((1, 2, 3)).tolist() == [1, 0, 1]
