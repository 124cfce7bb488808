"""The dry run against the run itself, and what a run says about its own bottleneck."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.cache.store import FeatureStore
from featx.engines.opening import open_engine
from featx.errors import FeatxError, StoreError
from featx.extraction import computing
from featx.extraction.fidelity import faster, fidelity, rates_path
from featx.extraction.job import prepare
from featx.extraction.pipeline import sync
from featx.extraction.planning import plan
from featx.extraction.timing import Timing
from featx.options import Options, complete
from featx.records import write_record


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_dry_run_counts_what_the_run_then_does_and_writes_no_feature(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    (tiny / "warm" / "copy.png").write_bytes((tiny / "cold" / "000.png").read_bytes())
    (tiny / "notes.txt").write_text("no image")
    cache = tmp_path / "cache"
    before = plan(tiny, COLOURS, engine=engine, cache=cache)
    assert (before.found, before.cached, before.missing, before.duplicate) == (13, 0, 12, 1)
    assert before.ignored == 1 and before.unread == 0
    assert before.bytes == 12 * (48 * 4 + 32) and before.enough
    assert not (cache / "features").exists()
    report = sync(tiny, COLOURS, engine=engine, cache=cache).report
    assert (report.extracted, report.duplicate) == (before.missing, before.duplicate)
    listed = files(cache)
    after = plan(tiny, COLOURS, engine=engine, cache=cache)
    assert (after.cached, after.missing, after.duplicate, after.bytes) == (12, 0, 1, 0)
    assert files(cache) == listed


def test_the_time_is_measured_on_a_sample_or_is_the_last_runs_and_it_says_which(
    tmp_path: Path, engine: ColourEngine
) -> None:
    root, cache = write_images(tmp_path / "data", per_class=100), tmp_path / "cache"
    before = plan(root, COLOURS, engine=engine, cache=cache)
    assert before.basis == "measured now on 64 of the missing images"
    assert engine.images == 64
    assert before.seconds == pytest.approx(200 / before.images_per_second, abs=0.2)
    rate = sync(root, COLOURS, engine=engine, cache=cache).report.images_per_second
    write_images(root, per_class=50, classes=("new",), seed=5)
    after = plan(root, COLOURS, engine=engine, cache=cache)
    assert after.missing == 50 and after.images_per_second == pytest.approx(rate, abs=0.1)
    assert "last run" in after.basis
    assert engine.images == 64 + 200
    other = plan(root, COLOURS, engine=engine, cache=cache, workers=1 + (os.cpu_count() or 1))
    assert "measured" in other.basis


def test_what_a_dry_run_exports_is_named_and_exported_once(tiny: Path, tmp_path: Path) -> None:
    request, cache = BackboneRequest("small:backbone_plain", weights="random"), tmp_path / "cache"
    found = plan(tiny, request, cache=cache)
    exported = sum(path.stat().st_size for path in (cache / "engines").glob("*.onnx"))
    assert found.exported_bytes == exported > 0
    assert f"exported now: {exported / 1e6:.1f} MB in the cache" in found.text()
    again = plan(tiny, request, cache=cache)
    assert again.exported_bytes == 0 and "exported" not in again.text()


def test_an_engine_is_opened_for_the_images_that_the_run_lacks_with_their_views(
    tiny: Path, tmp_path: Path, everywhere: ColourEngine
) -> None:
    for run in (plan, sync):
        everywhere.announced = 0
        run(tiny, "colours", cache=tmp_path / "cache", views=1)
        assert everywhere.announced == 12 * 2


def test_a_gpu_that_is_not_here_is_missed_before_weights_are_loaded(tiny: Path, tmp_path: Path) -> None:
    options: list[Options] = [{"device": "cuda:99"}, {"decode": "gpu", "device": "cpu"}]
    for run in (plan, sync):
        for given in options:
            with pytest.raises(FeatxError, match=r"use --de(vice cpu|code exact)|no device cuda:99"):
                run(tiny, "no_such_network", cache=tmp_path / "cache", **given)
    assert not (tmp_path / "cache").exists()


def test_an_engine_that_cannot_run_here_ends_a_dry_run_as_it_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    request = BackboneRequest("small:backbone_plain", weights="random")
    info = resolve(request, tmp_path)
    with FeatureStore(tmp_path, info.spec(), engine="torch-cuda") as store:
        store.append(np.ones((1, 32), np.uint8), np.ones((1, *info.row_shape), np.float32))
    for run in (plan, sync):
        with pytest.raises(FeatxError, match=r"engine torch-cuda.*here onnxruntime.*use a GPU, another --cache"):
            run(tiny, request, cache=tmp_path, device="cpu")
    assert not (tmp_path / "engines").exists()  # nothing was opened, nor exported


def test_views_that_two_engines_computed_are_refused_before_any_is_opened(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    found = sync(tiny, COLOURS, engine=engine, cache=tmp_path, views=1)
    for store, name in zip(found.stores, ("one", "two"), strict=True):
        shutil.rmtree(store.folder)
        with FeatureStore(tmp_path, store.spec, engine=name) as filled:
            filled.append(found.keys[:1], np.ones((1, 48), np.float32))
    shutil.rmtree(tmp_path / "rates", ignore_errors=True)
    for run in (plan, sync):
        with pytest.raises(StoreError, match="come from the engine 'two', not 'one'"):
            run(tiny, COLOURS, cache=tmp_path, views=1)  # opening this backbone would be a BackboneError


def test_views_cost_their_own_disk(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    dry = plan(tiny, COLOURS, engine=engine, cache=tmp_path / "cache", views=2, dtype="float16")
    assert dry.missing == 12 and dry.bytes == 3 * 12 * (48 * 2 + 32)


def test_a_file_that_cannot_be_read_does_not_stop_a_dry_run(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    (tiny / "cold" / "gone.png").symlink_to(tmp_path / "nothing")
    dry = plan(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    assert dry.found == 13 and dry.unread == 1 and dry.missing == 13


def test_a_run_names_its_bottleneck_and_what_would_help(
    tiny: Path, tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featx.extraction.timing.TELLING", 0.0)
    report = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").report
    assert set(report.shares) == {"read", "decode", "embed", "store"}
    assert sum(report.shares.values()) == pytest.approx(1, abs=0.01)
    assert 0 <= report.used <= 1
    assert report.seconds["decode"] > 0  # although all were decoded while the engine opened
    assert "-bound" in report.advice
    assert sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache").report.advice == ""  # nothing was computed


def test_a_short_run_gives_no_advice() -> None:
    run = stages(decode=15.0, embed=4.0)
    assert run.advice()
    run.elapsed = 0.5
    assert run.advice() == ""


def stages(workers: int = 2, cores: int = 2, gpu: bool = False, **values: float) -> Timing:
    made = Timing(workers, cores, gpu)
    made.elapsed = 10.0
    made.starved, made.waited, made.blocked = (values.pop(k, 0.0) for k in ("starved", "waited", "blocked"))
    made.large, made.device = values.pop("large", 0.0), values.pop("device", 0.0)
    made.by_gpu = bool(values.pop("by_gpu", False))
    made.work |= values
    return made


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (stages(read=0.2, decode=4.0, embed=15.0, waited=8.0), "backbone-bound 78%: a GPU or a smaller backbone"),
        (stages(read=0.2, decode=15.0, embed=4.0, waited=2.0), "decode-bound 78%: more cores"),
        (stages(decode=15.0, embed=4.0, large=0.9), "use --decode fast"),
        (stages(workers=1, cores=8, decode=9.5, embed=4.0, starved=9.0), "decode-bound 95%: use --workers 8"),
        (stages(read=0.5, blocked=18.0, decode=1.0, embed=1.0, starved=9.0), "read-bound 92%: .* --workers 4"),
        (stages(decode=2.0, embed=5.0, waited=9.0), "35% of the cores' time, so other programs may hold them"),
        (stages(gpu=True, decode=19.0, starved=8.0, embed=1.0, waited=1.0), "decode-bound 95%"),
        (stages(gpu=True, decode=19.0, starved=8.0), "use --decode gpu if these are JPEGs, or more cores"),
        (stages(gpu=True, decode=19.0, starved=8.0, large=0.9), "use --decode fast, .* or --decode gpu"),
        (stages(1, 8, gpu=True, decode=9.5, starved=9.0), "decode-bound 95%: use --workers 8 or --decode gpu$"),
        (stages(1, 8, gpu=True, by_gpu=True, decode=9.5, starved=9.0), "decode-bound 95%: use --workers 8$"),
        (stages(gpu=True, by_gpu=True, decode=19.0, starved=8.0), "decode-bound 95%: more cores"),
        (stages(gpu=True, by_gpu=True, decode=11.0, device=9.7, starved=9.0), "decode-bound 97%: the GPU's decoder"),
        (stages(gpu=True, decode=4.0, embed=9.0, waited=9.0), "backbone-bound 90%: --precision bf16"),
        (stages(gpu=True, decode=4.0, store=8.0, waited=1.0), "store-bound 80%: .* --cache"),
    ],
)
def test_the_advice_follows_from_where_the_time_went(run: Timing, says: str) -> None:
    assert re.search(says, run.advice()), run.advice()
    name, share = run.bound()
    assert run.brief() == f"{name} {share:.0%}"


def test_the_progress_bar_shows_the_bottleneck(
    tmp_path: Path, engine: ColourEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    class Bar(computing.tqdm):  # type: ignore[misc, name-defined, type-arg]
        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            shown.append(s)

    monkeypatch.setattr(computing, "tqdm", Bar)
    sync(write_images(tmp_path / "data", per_class=20), COLOURS, engine=engine, cache=tmp_path / "cache")
    assert len(shown) == 40 // 4
    assert all(text.split()[0] in ("read", "decode", "embed", "store") and text.endswith("%") for text in shown)
    assert np.all([float(text.split()[1].rstrip("%")) <= 100 for text in shown])


def test_the_dry_run_says_how_much_time_bf16_would_save_from_what_was_measured(
    tiny: Path, tmp_path: Path, engine: ColourEngine
) -> None:
    """Of 1/50 s an image 1/80 s is the backbone's: with 1/400 s instead, half of the time is left."""
    job, native = prepare(tiny, COLOURS, complete({"cache": tmp_path})), frozenset({"bf16"})
    write_record(rates_path(job, "backbone", ["bf16"]), {"fp32": 80.0, "bf16": 400.0})
    assert faster(job, 50.0, native) == (
        "this processor multiplies bf16: --precision bf16 would take about 50% of the time "
        "(measured: the backbone runs 400 images/s, 80 in fp32)"
    )
    assert "take about 25% of the time" in faster(job, 100.0, native)  # faster than the backbone: 1/400 s remains
    assert faster(job, 10.0, native) == ""  # decoding takes the time
    assert faster(job, 50.0, frozenset({"int8"})) == ""


@pytest.mark.parametrize(("machine", "named"), [("x86_64", True), ("aarch64", False)])
def test_openvino_is_named_only_where_it_is_missing_and_would_help(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, named: bool
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("platform.machine", lambda: machine)
    said = faster(prepare(tiny, COLOURS, complete({"cache": tmp_path})), 50.0, frozenset({"bf16"}))
    assert ('pip install "featx[openvino]"' in said) == bool(said) == named


def test_a_run_in_less_than_fp32_says_how_far_its_rows_are_from_fp32s(tiny: Path, tmp_path: Path) -> None:
    backbone = BackboneRequest("small:backbone_normed", weights="random")
    job = prepare(tiny, backbone, complete({"cache": tmp_path, "precision": "bf16"}))
    engine = open_engine(backbone, job.info, cache=tmp_path, precision="bf16", engine="torch-cpu")
    said = fidelity(job, engine, job.open_stores(), np.arange(12))
    found = re.fullmatch(
        r"bf16 features of 12 images are ([\d.]+)% of their length from fp32's at the median, ([\d.]+)% at most; "
        r"smallest cosine ([\d.]+)",
        said,
    )
    assert found is not None
    median, most, cosine = map(float, found.groups())
    assert 0 < median <= most < 3 and 0.999 < cosine <= 1
