"""`--decode gpu` with torchvision's decoder on the CPU in the GPU's place, passed in."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import COLOURS

from featx.engines.engine import Engine
from featx.extraction.gpu import GpuDecoder
from featx.extraction.job import Backbone, Job, prepare
from featx.extraction.loader import Loaded, Loader
from featx.extraction.pipeline import run
from featx.extraction.result import Extraction
from featx.options import complete
from featx.pixels.nvjpeg import Decode, Gpu, decoded


@dataclass(frozen=True, eq=False)
class OnCpu(Job):
    """A job that decodes JPEGs as on a GPU."""

    decode: Decode = decoded
    limits: dict[str, Any] = field(default_factory=dict)
    """`group` and `group_bytes` of `GpuDecoder`, `at_once` of `Gpu`."""
    compares: bool = True

    def load(self, loader: Loader, numbers: np.ndarray, engine: Engine) -> Generator[Loaded]:
        limits = dict(self.limits)
        with warnings.catch_warnings():  # what the decoder says when it is tried
            warnings.simplefilter("ignore")
            gpu = Gpu(self.info.preprocess, "cpu", self.decode, limits.pop("at_once", None))
        kind = GpuDecoder if self.compares else Trusting
        return kind(loader, "cpu", engine, gpu=gpu, **limits)(numbers)


class Trusting(GpuDecoder):
    """Takes the first images to be near enough to Pillow's."""

    def _compare_with_pillow(self) -> None:
        pass


def decoded_on_cpu(
    data: Path,
    cache: Path,
    engine: Engine | None,
    backbone: Backbone = COLOURS,
    *,
    decode: Decode = decoded,
    limits: dict[str, Any] | None = None,
    compares: bool = True,
    **options: Any,
) -> Extraction:
    """`sync(data, backbone, decode="gpu", ...)`, without a GPU."""
    (cache / "features").mkdir(parents=True, exist_ok=True)  # else the GPU is asked for at once
    job = prepare(data, backbone, complete({"cache": cache, "decode": "gpu", **options}))
    return run(OnCpu(**vars(job), decode=decode, limits=limits or {}, compares=compares), engine)
