"""From a JPEG file's bytes to the crop, by processor time of one thread: featx now, before, and other decoders.

    python benchmarks/bytes_to_crop.py PHOTOS [--rounds 10] [--page docs/benchmarks/bytes-to-crop.md]

All take turns, part by part of the files, and the least time of each part counts: other work on the machine slows
single parts. Pixels are compared before any time is taken.
"""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from featx.pixels import decoding
from featx.pixels.preprocess import FAST, REACH, RESAMPLE, Preprocess
from featx.pixels.readers import opened

sys.path[:0] = [str(Path(__file__).parent)]
from extraction import machine  # noqa: E402

PART = 33
Way = Callable[[Any], Any]
warnings.filterwarnings("ignore")


def before(preprocess: Preprocess, data: bytes) -> np.ndarray:
    """What featx did before: Pillow's `load`, and rows that Pillow leaves out by a pass of its own."""
    image = opened(data)
    with decoding.ROOM.take(decoding._prepared(image, data, None)):
        image.load()
        image = decoding._upright(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        side, resample = preprocess.crop, RESAMPLE[preprocess.interpolation]
        left, top, right, bottom = preprocess.box(*image.size, side)
        reach = REACH[preprocess.interpolation] * max((bottom - top) / side, 1) + 1
        first, last = max(0, int(top - reach)), min(image.height, int(bottom + reach) + 1)
        across = image.resize((side, last - first), resample, box=(left, first, right, last))
        down = across.resize((side, side), resample, box=(0, top - first, side, min(bottom - first, last - first)))
        return np.ascontiguousarray(np.asarray(down).transpose(2, 0, 1))


def milliseconds(ways: dict[str, Way], items: list[Any], rounds: int) -> dict[str, float]:
    """Processor time of this thread for one item, by each way."""
    parts = [items[at : at + PART] for at in range(0, len(items), PART)]
    least = {name: [np.inf] * len(parts) for name in ways}
    for _ in range(rounds):
        for number, part in enumerate(parts):
            for name, way in ways.items():
                begin = time.thread_time()
                for item in part:
                    way(item)
                least[name][number] = min(least[name][number], time.thread_time() - begin)
    return {name: 1e3 * float(np.sum(times)) / len(items) for name, times in least.items()}


def together(ways: dict[str, Way], files: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds of wall time for one file where two threads share the files, least of all rounds."""
    least = dict.fromkeys(ways, np.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            threads = [
                threading.Thread(target=lambda half=files[k::2], way=way: [way(x) for x in half]) for k in (0, 1)
            ]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - begin) / len(files))
    return least


def decoders() -> dict[str, Way]:
    """Decoders alone, from a file's bytes to their own kind of image."""

    def ours(data: bytes) -> None:
        with decoding.decoded(data):
            pass

    ways: dict[str, Way] = {
        "featx": ours,
        "Pillow": lambda data: opened(data).load(),
        "torchvision": lambda data: decode_jpeg(torch.frombuffer(data, dtype=torch.uint8)),
    }
    try:
        import simplejpeg
    except ImportError:
        return ways
    return {**ways, "simplejpeg": simplejpeg.decode_jpeg}


def differences(files: list[bytes]) -> list[str]:
    """What two faster ways would change, in levels of 255."""
    exact, fast = Preprocess(64, 56), Preprocess(64, 56, pixels=FAST)
    scaled = np.stack([exact(data).astype(int) - fast(data) for data in files])
    other, images = [], [decoding.decode(data) for data in files[::8]]
    for image in images:
        wide, high = Preprocess().resized(*image.size)
        ours = image.resize((wide, image.height), 2).resize((wide, high), 2)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        theirs = interpolate(tensor, (high, wide), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        other.append(np.abs(np.asarray(ours).astype(int) - theirs.numpy()).ravel())
    ways = {
        "`--decode fast`: the cosine transform at 1/2 or 1/4 of the size, with twice the pixels needed": np.abs(scaled),
        "torch's antialiased resize of `uint8`, whose weights have 16 bits": np.concatenate(other),
    }
    return [
        f"| {name} | {(x > 0).mean():.1%} | {x.mean():.3f} | {np.quantile(x, 0.999):.0f} | {x.max()} |"
        for name, x in ways.items()
    ]


TEXT = """\
# From a file's bytes to the crop

Written by `python benchmarks/bytes_to_crop.py`: {count} JPEG photographs in memory (0.2 megapixels, 120 KB), processor
time of one thread in milliseconds a file, in turns, least of {rounds} rounds for every {part} files. The pixels of both
ways are equal, bit by bit. A load above the number of cores says that the machine had other work.

{told}

| way | before | now | times as fast |
|---|---|---|---|
{ways}

*Before* opens and loads an image by Pillow. *Now* Pillow's decoder writes into an array, which nobody clears first and
whose rows are images without a copy. So the resize is given the rows that the crop needs; Pillow itself leaves rows out
by a second pass that changes nothing. The planes of colours are taken from the crop one by one.

| decoder alone | ms a file |
|---|---|
{decoders}

The decoders are builds of the same library, libjpeg-turbo, and give the same pixels.

| a faster way that is not taken: it changes pixels | pixels that differ | mean | 99.9 % | largest |
|---|---|---|---|---|
{differences}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    files = [
        data for path in sorted(options.photos.glob("*/*/*.jpg")) if (data := path.read_bytes())[:2] == b"\xff\xd8"
    ]
    large = [encoded(Image.open(path)) for path in sorted(options.photos.glob("val/*/*.jpg"))[::40]]
    rows = []
    for kind, some, interpolation in (
        ("bilinear", files, "bilinear"),
        ("bicubic", files, "bicubic"),
        ("12 megapixels", large, "bilinear"),
    ):
        preprocess = Preprocess(interpolation=interpolation)
        ways: dict[str, Way] = {"before": partial(before, preprocess), "now": preprocess}
        assert all(np.array_equal(before(preprocess, data), preprocess(data)) for data in some)
        found = {kind: milliseconds(ways, some, options.rounds)}
        if kind == "bilinear":
            found["bilinear, two threads, wall time"] = together(ways, files, options.rounds)
        rows += [
            f"| {k} | {v['before']:.2f} | {v['now']:.2f} | {v['before'] / v['now']:.2f} |" for k, v in found.items()
        ]
    told = machine()
    text = TEXT.format(
        count=len(files),
        rounds=options.rounds,
        part=PART,
        ways="\n".join(rows),
        told="\n".join(f"- {name}: {told[name]}" for name in ("processor", "system", "versions", "load before")),
        decoders="\n".join(f"| {k} | {v:.2f} |" for k, v in milliseconds(decoders(), files, options.rounds).items()),
        differences="\n".join(differences(files)),
    )
    print(text)
    if options.page:
        options.page.write_text(text)


def encoded(image: Image.Image) -> bytes:
    """A photograph enlarged to 12 megapixels, as a JPEG file."""
    buffer = io.BytesIO()
    image.convert("RGB").resize((4000, 3000)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
