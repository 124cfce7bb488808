"""What else runs in the process, or was set in it, makes no difference: threads, forks, settings of torch and numpy."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from forks import run_in_a_fork

import featx
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneRequest
from featx.devices import available_threads, group_memory
from featx.engines.opening import open_engine
from featx.state import Together

SMALL = {"backbone": "small:backbone_normed", "weights": "random"}


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def reduced_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def raised_warnings() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        before = list(warnings.filters)
        yield
        assert warnings.filters == before


def of_the_process() -> list[AbstractContextManager[object]]:
    return [default_dtype(), reduced_precision(), np.errstate(all="raise"), raised_warnings()]


def of_the_thread() -> list[AbstractContextManager[object]]:
    return [torch.device("meta"), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("state") / "images")


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    return everything(images, tmp_path_factory.mktemp("plain"))


def everything(images: Path, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features by torch, and a head that torch trains on them."""
    request = BackboneRequest(SMALL["backbone"], SMALL["weights"])
    engine = open_engine(request, resolve(request, cache), cache=cache, precision="bf16", engine="torch-cpu")
    features = featx.extract(images, **SMALL, precision="bf16", cache=cache, engine=engine)
    head = featx.HeadClassifier("linear", settings={"epochs": 2, "weight_decay": 0.01})
    return features.X, head.fit(features.X, features.y).head_.weight


@pytest.mark.parametrize("settings", [of_the_process, of_the_thread])
def test_what_a_notebook_has_set_changes_nothing_and_stays_set(
    settings: Callable[[], list[AbstractContextManager[object]]],
    images: Path,
    plain: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    drawn = torch.random.get_rng_state()
    with ExitStack() as stack:
        for setting in settings():
            stack.enter_context(setting)
        found = everything(images, tmp_path)
    for mine, expected in zip(found, plain, strict=True):
        assert mine.dtype == np.float32 and np.array_equal(mine, expected)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_network_made_under_another_default_dtype_is_the_same_and_can_be_trained() -> None:
    request = BackboneRequest(SMALL["backbone"], "random")
    expected = load_backbone(request).info
    with default_dtype(), torch.inference_mode():
        loaded = load_backbone(request)
    assert loaded.info == expected
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in loaded.network.parameters())


def test_threads_that_extract_at_once_share_one_export_and_spoil_nothing(images: Path, tmp_path: Path) -> None:
    paths = sorted(images.glob("*/*.png"))
    alone = featx.ImageFeatures(**SMALL, cache=tmp_path / "alone").transform(paths)
    start = threading.Barrier(4)

    def part(k: int) -> np.ndarray:
        start.wait(20)
        return featx.ImageFeatures(**SMALL, cache=tmp_path / "shared").transform(paths[3 * k : 3 * k + 3])

    with default_dtype(), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that torch runs where the export failed
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            found = np.concatenate(list(pool.map(part, range(4))))
        assert warnings.filters == before
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    records = [path.read_text() for path in (tmp_path / "shared" / "engines").glob("*.json")]
    assert records and not any('"never"' in text for text in records)


def test_the_last_of_several_threads_brings_the_settings_back() -> None:
    log: list[str] = []

    @contextmanager
    def setting() -> Iterator[None]:
        log.append("set")
        yield
        log.append("back")

    together, other = Together(setting), threading.Event()
    entered = threading.Event()

    def work() -> None:
        with together:
            entered.set()
            assert other.wait(20)

    thread = threading.Thread(target=work)
    with together:
        thread.start()
        assert entered.wait(20)
    assert log == ["set"]
    other.set()
    thread.join(20)
    assert log == ["set", "back"]


def test_a_forked_child_runs_networks_that_its_parent_has_run(images: Path, tmp_path: Path) -> None:
    request = BackboneRequest(SMALL["backbone"], "random")
    module = load_backbone(request).module
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # threads that the child will not have
    with torch.inference_mode():
        expected = module(pixels).numpy()
    torch.set_num_threads(before)

    def child() -> None:
        rows = load_backbone(request).module(pixels).detach().numpy()
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
        assert featx.extract(images, **SMALL, cache=tmp_path).X.shape == (12, 8)  # a fresh cache: it exports

    run_in_a_fork(child)


def groups(root: Path, own: str, files: dict[str, str]) -> Path:
    """A file system with control groups: the process's own, as /proc says it, and what their files hold."""
    for name, text in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "cores", "bytes"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n", "memory.max": "900\n", "memory.current": "100\n"}, 1, 800),
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "max\n", "memory.current": "1\n"}, 2, None),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, None),
        ("0::/outer/inner\n", {"outer/cpu.max": "100000 100000", "outer/inner/cpu.max": "max 100000"}, 1, None),
        (
            "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "100000\n",  # a container sees its own group at the top
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "memory/docker/1/memory.limit_in_bytes": "5000\n",
                "memory/docker/1/memory.usage_in_bytes": "2000\n",
            },
            1,
            3000,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        ("what is this", {}, None, None),
    ],
)
def test_the_quotas_of_containers_limit_threads_and_memory(
    own: str, files: dict[str, str], cores: int | None, bytes: int | None, tmp_path: Path
) -> None:
    root = groups(tmp_path, own, files)
    free = available_threads(tmp_path / "nowhere")
    assert available_threads(root) == min(free, cores or free)
    assert group_memory(root) == (bytes or float("inf"))
