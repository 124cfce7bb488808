"""Fixtures that many tests share: the real photographs and weights, small image folders, a runner."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sharing import made_once

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.pixels.preprocess import Preprocess

# one environment for all: no progress bars, no network, no threads beyond the machine's
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests may import onnxruntime before featx, which sets it
os.environ.setdefault("FEATX_FIT_REPORT", "0")  # seconds of drawing; the report has tests of its own
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and "FEATX_TEST_CORES" not in os.environ and hasattr(os, "sched_setaffinity"):  # not in its children
    # Each worker has cores of its own, or every library would start a thread a core in every worker, and
    # these spend most of their time waiting for each other.
    cores, number = sorted(os.sched_getaffinity(0)), int(worker[2:])
    mine = cores[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or [cores[number % len(cores)]]
    os.sched_setaffinity(0, mine)
    os.environ["FEATX_TEST_CORES"] = str(len(mine))
    os.environ.setdefault("OMP_NUM_THREADS", str(len(mine)))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(len(mine)))

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = Path(os.environ.get("FEATX_TEST_DATA", ROOT.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Make one folder for what is costly and shared, such as exported networks, before any worker starts."""
    if not hasattr(config, "workerinput"):
        os.environ["FEATX_TEST_SESSION"] = folder = tempfile.mkdtemp(prefix="featx-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def _real(path: str) -> Path:
    found = TEST_DATA / path
    if not found.exists():
        reason = f"{found} is not there; set FEATX_TEST_DATA to the folder that holds {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def photos() -> Path:
    """The ants and bees: `{train,val}/{ants,bees}/*.jpg`, 244 + 153 photographs."""
    return _real("data/hymenoptera_data")


@pytest.fixture(scope="session")
def groups() -> Path:
    """Features `X` `[N, 1280]` of photographs of twenty groups, their `y`, and which are to `train` on."""
    return _real("faults/00-cross-validated-head-is-not-the-one-shipped/features.npz")


@pytest.fixture(scope="session")
def squeezenet_weights() -> Path:
    """SqueezeNet 1.1 with real ImageNet weights, a torchvision state dict."""
    return _real("weights/squeezenet1_1-imagenet1k.pth")


def write_images(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cold", "warm"), seed: int = 0) -> Path:
    """A folder of small PNG files, one sub-folder a class, each class with its own colours."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            low = 120 * number // max(1, len(classes) - 1)
            pixels = rng.integers(low, low + 120, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two classes, `cold` and `warm`, of six PNG files each."""
    return write_images(tmp_path / "tiny")


class ColourEngine:
    """A backbone without torch: the mean colour of a 4 x 4 grid, 48 numbers; counts the images it is given."""

    name = "colour"
    batch_size = 4

    def __init__(self) -> None:
        self.images = 0
        self.interrupt_at: int | None = None
        """Raise `KeyboardInterrupt` once so many images were computed."""
        self.announced = 0
        """How many images it was opened for, where `everywhere` opens it."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self.images == self.interrupt_at:
            raise KeyboardInterrupt
        assert images.dtype == np.uint8
        assert images.shape[1:] == (3, 32, 32)
        self.images += len(images)
        cells = images.reshape(len(images), 3, 4, 8, 4, 8).astype(np.float32)
        return cells.mean(axis=(3, 5)).reshape(len(images), 48) / 255

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        rows = self(images)
        return lambda: rows

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Peers of scikit-learn run on one thread, as featx's solver does: on small matrices, more wait for each other."""
    if request.path.parent.name != "heads":
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


COLOURS = BackboneInfo(
    name="custom/colours",
    weights_digest="00" * 32,
    layer="features",
    preprocess=Preprocess(resize=36, crop=32),
    row_shape=(48,),
    class_names=None,
    affine=False,
    parameters=0,
    weights_note="colours",
)
"""What `ColourEngine` runs: `sync(data, COLOURS, engine=ColourEngine(), ...)`."""


@pytest.fixture
def engine() -> ColourEngine:
    """A new `ColourEngine`, to be given to `sync` and its like."""
    return ColourEngine()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> ColourEngine:
    """A `ColourEngine` that runs any backbone by name, for commands, which cannot be given an engine."""
    made = ColourEngine()

    def resolve(request: BackboneRequest, cache: Path | None) -> BackboneInfo:
        preprocess = request.override(COLOURS.preprocess)
        return replace(COLOURS, name=f"custom/{request.name}", layer=request.layer, preprocess=preprocess)

    monkeypatch.setattr("featx.extraction.job.resolve", resolve)

    def opened(*_: object, images: int, **__: object) -> ColourEngine:
        made.announced = images
        return made

    monkeypatch.setattr("featx.extraction.job.open_engine", opened)
    return made


@pytest.fixture(scope="session")
def photo_run(photos: Path, squeezenet_weights: Path) -> Path:
    """A run on the photographs (squeezenet1_1, logreg), exported, with its cache beside it. Copy it to change it."""
    import featx

    def make(root: Path) -> None:
        weights = str(squeezenet_weights)
        run = featx.fit(photos, "squeezenet1_1", "logreg", weights=weights, cache=root / "cache", output=root / "run")
        featx.export(run.path)

    return made_once("photo-run", make) / "run"
