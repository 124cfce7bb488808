"""`Job`: one extraction, as any process can open it: which images, by which backbone, into which cache."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneInfo, BackboneRequest, preprocessing
from featx.cache.store import FeatureStore
from featx.devices import available_threads, choose_device, decoding_device
from featx.engines.engine import Engine
from featx.engines.opening import open_engine
from featx.errors import FeatxError
from featx.extraction.calibrating import int8_fields
from featx.extraction.loader import Loaded, Loader
from featx.features import FeatureSpec
from featx.options import home, plain
from featx.pixels.preprocess import DECODERS, GPU
from featx.pixels.views import view_names
from featx.sources.opening import open_source
from featx.sources.source import Source

Data = str | Path | Source | Iterable[Any]
"""A folder, a manifest, a source, or images without labels: paths, or what `featx.predict` takes in memory."""
Backbone = str | BackboneRequest | BackboneInfo
"""A name, a request, or the `BackboneInfo` of an earlier run, for which nothing is loaded."""


@dataclass(frozen=True, eq=False)
class Job:
    """What to compute, and where to store it. Picklable; running it twice computes nothing twice."""

    source: Source
    request: BackboneRequest
    info: BackboneInfo
    specs: tuple[FeatureSpec, ...]
    """The centre crop's, then one for each augmented view."""
    cache: Path
    device: str
    batch_size: int | None
    workers: int | None
    """Decoding threads; None for one per core of the machine that opens the job."""
    seconds: float = 0.0
    """Time spent on listing the images and resolving the backbone."""
    cores: int | None = None
    """Cores to use; None for all that the process may use."""
    engine: str | None = None
    """The engine of all processes that share the job; None for the one that the rule chooses."""

    @property
    def available(self) -> int:
        """How many cores it may use here."""
        return self.cores or available_threads()

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's rows in all stores."""
        return math.prod(self.info.row_shape) * np.dtype(self.specs[0].dtype).itemsize * len(self.specs)

    @property
    def threads(self) -> int:
        """How many threads decode here."""
        return self.workers or self.available

    def open_stores(self, *, light: bool = False) -> list[FeatureStore]:
        """One store for each spec. light: for a process that only adds rows."""
        return [FeatureStore(self.cache, spec, light=light) for spec in self.specs]

    def open_engine(self, stores: list[FeatureStore], images: int = 0) -> Engine:
        """The engine for this machine, to run so many images for each store.

        Raises `StoreError` or `FeatxError` if another one computed the stores' rows.
        """
        recorded = next((store.engine for store in stores if store.engine), self.engine)
        for store in stores:
            if recorded:
                store.computed_by(recorded)
        return open_engine(
            self.request,
            self.info,
            cache=self.cache,
            device=self.device,
            precision=self.specs[0].precision,
            calibration=self.specs[0].calibration,
            batch_size=self.batch_size,
            engine=recorded or self.specs[0].engine or None,
            threads=self.cores,
            images=images * len(self.specs),
        )

    def load(self, loader: Loader, numbers: np.ndarray, engine: Engine) -> Generator[Loaded]:
        """The images `numbers`, `int [M]`, decoded by `loader`, and on the GPU if the job says so."""
        if self.info.preprocess.pixels != GPU:
            return loader(numbers)
        from featx.extraction.gpu import GpuDecoder

        return GpuDecoder(loader, self.device, engine)(numbers)


def prepare(data: Data, backbone: Backbone, options: dict[str, Any], engine: Engine | None = None) -> Job:
    """Resolve the backbone, list the images; options: all of `featx.options.Options`; engine: the caller's own, if any.

    For int8, find the calibration, or make it, which decodes up to 512 images.

    Raises `SourceError`, `BackboneError`, and `FeatxError` for a GPU that is not here.
    """
    begin = time.perf_counter()
    cache = Path(options["cache"]).absolute()  # stores are read later, perhaps from another working folder
    request = request_of(backbone, options)
    if isinstance(data, str | os.PathLike) and not os.path.exists(home(data)):
        open_source(data)  # says so before weights are loaded
    if not options["on"]:  # a cluster may have what this machine has not
        check_place(request, cache, options["device"])
    if isinstance(backbone, BackboneInfo):
        info = replace(backbone, preprocess=request.override(backbone.preprocess))
    else:
        info = resolve(request, cache)
    source = open_source(data)
    names = view_names(options["seed"], options["views"])
    computed = {name: options[name] for name in ("precision", "dtype")}
    if options["precision"] == "int8":
        computed |= int8_fields(source, request, info, cache, options, engine)
    elif given := [f"--{name} {options[name]}" for name in ("calibration", "runtime") if options[name] != "auto"]:
        raise FeatxError(f"{given[0]} is for --precision int8, not {options['precision']}; leave it out")
    specs = tuple(info.spec(view=name, **computed) for name in names)
    seconds = time.perf_counter() - begin
    return Job(
        source, request, info, specs, cache, options["device"], options["batch_size"], options["workers"], seconds
    )


def request_of(backbone: Backbone, options: dict[str, Any]) -> BackboneRequest:
    """The backbone that the options ask for."""
    if isinstance(backbone, BackboneInfo):
        request = BackboneRequest(backbone.name, options["weights"], backbone.layer, options["seed"])
    elif isinstance(backbone, BackboneRequest):
        request = BackboneRequest.from_dict(plain(backbone.to_dict()))
    else:
        request = BackboneRequest(backbone, options["weights"], options["layer"], options["seed"])
    asked = preprocessing(options)
    if options["decode"] != "exact":
        asked["pixels"] = DECODERS[options["decode"]]
    return replace(request, preprocess=tuple((dict(request.preprocess) | asked).items()))


def check_place(request: BackboneRequest, cache: Path, device: str) -> None:
    """Raise `FeatxError` for a GPU that is not here, before weights are loaded; a filled cache may need none."""
    if (cache / "features").exists():
        return
    if ("pixels", GPU) in request.preprocess:
        decoding_device(device)
    else:
        choose_device(device)
