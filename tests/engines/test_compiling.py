"""A network that only torch can run is compiled for a long run; its rows stay, and nothing else does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sharing import session_cache
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneRequest
from featx.engines.opening import open_engine
from featx.engines.torch import CpuEngine
from featx.features import TOLERANCE, difference

DECIDING = BackboneRequest("small:backbone_deciding", weights="random")
# Saves the compiler seconds: what the processor has is believed, and headers are not compiled by themselves.
CHEAP = {"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}
BROKEN = """#!/bin/sh
case "$*" in *--version*|*" -E "*) exec g++ "$@";; esac
echo "a.cpp:1: fatal error: Python.h: no such file" >&2
exit 1
"""


def opened(name: str = "deciding") -> CpuEngine:
    return CpuEngine(load_backbone(BackboneRequest(f"small:backbone_{name}", weights="random")), "fp32", 4, 2)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(100, 256, (count, 3, 32, 32), dtype=np.uint8)


def in_batches(engine: CpuEngine, images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([engine(images[start : start + size]) for start in range(0, len(images), size)])


def outside() -> list[Path]:
    """What torch has in the folder that it would take by itself."""
    return sorted(Path(default_cache_dir()).rglob("*"))


def test_a_compiled_network_gives_its_rows_for_any_batch_and_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, images, before = opened(), noise(9), (outside(), os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
    eager, generator = in_batches(engine, images, 4), torch.random.get_rng_state()
    with inductor.patch(CHEAP):
        with pytest.warns(RuntimeWarning, match=r"rows would be off by 2.\de-06, and 1e-06 is allowed.*uncompiled"):
            engine.compile(tmp_path / "engines", tolerance=1e-6)
        assert np.array_equal(in_batches(engine, images, 4), eager)
        with warnings.catch_warnings(action="error"):
            engine.compile(tmp_path / "engines")

    rows, graphs = in_batches(engine, images, 4), counters["stats"]["unique_graphs"]
    np.testing.assert_allclose(rows, eager * (1 + 2e-6), rtol=5e-7)  # compiled, and not beside it
    assert np.array_equal(in_batches(engine, images, 1), rows) and np.array_equal(in_batches(engine, images, 3), rows)
    dark = engine(np.zeros_like(images[:4]))
    assert (dark > 1).all() and np.array_equal(dark[0], dark[3])  # the other way through the network
    assert counters["stats"]["unique_graphs"] == graphs  # was not compiled for it

    assert list(tmp_path.rglob("*")) == [tmp_path / "engines"]
    assert (outside(), os.environ.get("TORCHINDUCTOR_CACHE_DIR")) == before
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler", "InvalidCxxCompiler: No working C[+][+] compiler"), ("broken", "fatal error: Python.h: no")],
)
def test_where_compiling_fails_the_reason_is_told_and_the_rows_are_the_eager_ones(
    compiler: str, why: str, tmp_path: Path
) -> None:
    if compiler == "broken":
        compiler = str(tmp_path / compiler)
        Path(compiler).write_text(BROKEN)
        Path(compiler).chmod(0o755)
    engine, images, before = opened("plain"), noise(4), outside()
    eager = engine(images)
    with (
        inductor.patch({"cpp.vec_isa_ok": True, "cpp.cxx": (None, compiler)}),
        pytest.warns(RuntimeWarning, match=rf"cannot compile this network here .*{why}.*uncompiled, slower") as told,
    ):
        engine.compile(tmp_path / "engines")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert np.array_equal(engine(images), eager)
    assert list((tmp_path / "engines").iterdir()) == [] and outside() == before


def test_a_folder_that_the_compiler_cannot_write_to_is_told(tmp_path: Path) -> None:
    engine, images = opened(), noise(4)
    with pytest.warns(RuntimeWarning, match=r"cannot write to .*my engines; use a --cache without spaces"):
        engine.compile(tmp_path / "my engines")
    assert difference(engine(images), opened()(images)) <= TOLERANCE and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "threads", "precision", "compiles"),
    [(0, 1, "fp32", 0), (2000, 2, "fp32", 0), (10**9, 2, "fp32", 1), (10**9, 1, "bf16", 0)],
)
def test_a_network_is_compiled_for_a_run_that_would_take_minutes(
    images: int, threads: int, precision: str, compiles: int, tmp_path: Path
) -> None:
    info = resolve(DECIDING, session_cache())
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        warnings.catch_warnings(record=True, action="always") as told,
    ):
        engine = open_engine(
            DECIDING, info, cache=tmp_path, precision=precision, engine="torch-cpu", threads=threads, images=images
        )
    assert engine.name == "torch-cpu"
    assert ["cannot compile" in str(each.message) for each in told] == compiles * [True]
