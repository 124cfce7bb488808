"""Extraction on a Ray cluster: three nodes on this machine, of which one is lost; a driver that is killed; an image
that ends its process; and what a cluster lacks, said in seconds.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine, write_images
from sharing import environment, session_folder

import featx
from featx.cache.memo import KeyMemo
from featx.cache.store import FeatureStore
from featx.errors import FeatxError, StoreError
from featx.extraction.cluster import MOST_LOST, Part, Progress, Task, after, compute_task, ranges
from featx.extraction.job import prepare
from featx.extraction.nodes import Shared, connected, fits_on, look_around, sample_of, visible
from featx.extraction.pipeline import sync
from featx.options import complete
from featx.sources.opening import open_source
from featx.sweeping import sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install featx[ray]")
TESTS = Path(__file__).parents[1]


class Cluster:
    """`ray_cluster.py`, running."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "ray_cluster.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings(),
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def surroundings() -> dict[str, str]:
    """Ray writes a token into the home folder."""
    return environment(HOME=str(session_folder()), RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_images(tmp_path_factory.mktemp("ray") / "images", per_class=60)
    time.sleep(2.1)  # keys of files that changed this shortly before are not remembered
    return made


def driver(images: Path, cache: Path, cluster: Cluster, seconds: float, killer: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / "ray_driver.py"), str(images), str(cache), cluster.address]
    command += [str(cache.parent / "log"), str(seconds), killer]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings())


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(out)
    return found


def wait_until(true: object, what: str, seconds: float = 120) -> None:
    assert callable(true)
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, what
        time.sleep(0.05)


def test_a_lost_node_loses_no_photograph_and_changes_no_byte(
    cluster: Cluster, photos: Path, photo_run: Path, squeezenet_weights: Path, tmp_path: Path
) -> None:
    reference = photo_run.parent / "cache"
    shutil.copytree(reference, tmp_path / "cache", ignore=shutil.ignore_patterns("features", "memo"))
    command = [sys.executable, "-m", "featx", "extract", str(photos), "-b", "squeezenet1_1", "--json"]
    command += ["--weights", str(squeezenet_weights), "--cache", str(tmp_path / "cache")]
    command += ["--on", "ray", "--address", cluster.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings())
    wait_until(lambda: len(list(tmp_path.glob("cache/features/*/*.h5"))) >= 3, "no chunk was done")
    cluster.tell("kill")
    report = report_of(process)
    cluster.tell("add")

    assert (report["found"], report["extracted"], report["skipped"]) == (397, 397, 0)
    spec = prepare(photos, "squeezenet1_1", complete({"weights": squeezenet_weights, "cache": reference})).specs[0]
    alone, spread = FeatureStore(reference, spec), FeatureStore(tmp_path / "cache", spec)
    assert len(alone) == len(spread) == 397
    np.testing.assert_array_equal(spread.read(alone.keys()), alone.read(alone.keys()))


def test_after_a_killed_driver_only_unfinished_chunks_are_read_again_and_an_image_that_ends_its_process_is_named(
    cluster: Cluster, images: Path, tmp_path: Path
) -> None:
    def known() -> int:
        source = open_source(images)
        assert source.stats is not None
        return int(KeyMemo(tmp_path / "cache", source.root).lookup(source.ids, source.stats)[1].sum())

    first = driver(images, tmp_path / "cache", cluster, seconds=0.1)
    wait_until(lambda: known() >= 24, "no chunk was done")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(2)  # its tasks end
    finished, log = known(), tmp_path / "log"
    assert 24 <= finished < 120
    log.write_text("")

    report = report_of(driver(images, tmp_path / "cache", cluster, seconds=0.0, killer="warm/059.png"))
    (skipped,) = report["skipped_images"]
    assert skipped["id"] == "warm/059.png" and "the process that computed it ended" in skipped["reason"]
    assert report["found"] == 120 and report["cached"] + report["extracted"] == 119 and report["cached"] >= finished
    assert len(set(log.read_text().split("\n")) - {""}) == 119 - finished  # it ends the process before it is logged


def test_a_cluster_without_what_is_asked_for_is_said_in_seconds(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from conftest import COLOURS, ColourEngine; from featx.extraction.pipeline import sync\n"
        "for options in ({'device': 'cuda'}, {'device': 'cuda:1'}, {'workers': 9}):\n"
        "    try: sync(sys.argv[1], COLOURS, engine=ColourEngine(), on='ray', address=sys.argv[2], cache=sys.argv[3],"
        " **options)\n"
        "    except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(images), cluster.address, str(tmp_path / "cache")]
    said = subprocess.run(command, capture_output=True, text=True, env=surroundings(), timeout=120).stdout.splitlines()
    assert said == [
        "--device cuda: the cluster has no GPU (its 3 nodes have 3 cores and 0 GPUs); use --device cpu",
        "--device cuda:1: on a cluster a task takes the GPU it is given; use --device cuda",
        "--workers 9 takes more cores than any node has (its 3 nodes have 3 cores and 0 GPUs); use fewer",
    ]
    assert not (tmp_path / "cache" / "features").exists()


def test_an_address_that_no_cluster_answers_at_is_said_in_seconds() -> None:
    def said(address: str) -> str:
        with pytest.raises(FeatxError, match="no Ray cluster answers at") as error, connected(address):
            pass
        return str(error.value)

    begin = time.monotonic()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "refused" in said(f"127.0.0.1:{closed.getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as other:  # a web server, say
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")).start()
        assert "what answers there does not speak Ray's protocol" in said(f"127.0.0.1:{other.getsockname()[1]}")
    assert "`ray start --head` printed" in said("nowhere.invalid:6379")
    for odd in ("..:6379", f"{'x' * 70}:6379", "127.0.0.1:99999"):  # which no name server takes
        said(odd)
    assert time.monotonic() - begin < 30


def test_a_node_that_does_not_see_what_it_needs_says_what(images: Path, tmp_path: Path) -> None:
    source = open_source(images)
    job = prepare(source, COLOURS, complete({"cache": tmp_path / "cache"}))
    job = replace(job, engine="onnxruntime")
    sample, key = sample_of(source, np.arange(7, 9))
    assert sample is not None and key == hashlib.sha256((images / "cold" / "007.png").read_bytes()).digest()
    with visible(tmp_path / "cache") as token:
        shared = Shared(job, None, token, sample, key)
        assert look_around(pickle.dumps(shared), featx.__version__) == shared.missing() == ""
        assert "has featx" in look_around(pickle.dumps(shared), "0.0.1")
        assert "has other images in" in replace(shared, key=bytes(32)).missing()
        moved = replace(shared, sample=replace(sample, root=tmp_path / "elsewhere")).missing()
        assert "cannot read cold/007.png" in moved and "the file is not there" in moved
        lost = job.request.at(tmp_path / "net.pth")
        weights = replace(shared, job=replace(job, engine="torch-cpu", request=lost)).missing()
        assert "does not see the weights" in weights
        assert replace(shared, job=replace(job, request=lost)).missing() == ""  # its export is in the cache
    assert "does not see the cache" in shared.missing()
    found = compute_task(pickle.dumps(shared), source, here="node-9")  # a node that joined later
    assert isinstance(found, FeatxError) and "on node-9: the node does not see the cache" in str(found)


def test_what_follows_a_lost_task_depends_on_why_it_was_lost() -> None:
    exceptions, task = ray.exceptions, Task(np.arange(5))
    crash, gone = exceptions.WorkerCrashedError(), exceptions.NodeDiedError("power cut")
    again = after(task, crash, exceptions)
    assert len(again) == 1 and again[0].crashed and (again[0].numbers == np.arange(5)).all()
    halves = after(again[0], crash, exceptions)
    assert [half.numbers.tolist() for half in halves] == [[0, 1, 2], [3, 4]] and all(half.crashed for half in halves)
    assert after(Task(np.array([4]), crashed=True), crash, exceptions) == []

    for lost in range(MOST_LOST - 1):
        (task,) = after(task, gone, exceptions)
        assert task.lost == lost + 1 and not task.crashed
    with pytest.raises(FeatxError, match=r"20 times a node was lost.*What is computed is kept"):
        after(task, gone, exceptions)
    with pytest.raises(exceptions.TaskCancelledError):
        after(task, exceptions.TaskCancelledError(), exceptions)


def test_a_node_that_can_run_a_task_is_alive_and_has_all_of_what_it_asks_for() -> None:
    class Nodes:
        def nodes(self) -> list[dict[str, Any]]:
            resources = ({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0, "GPU": 8.0})
            return [{"Alive": i < 2, "Resources": each} for i, each in enumerate(resources)]

    wanted = [(1, 0, 2), (3, 0, 1), (5, 0, 0), (2, 1, 1), (3, 1, 0)]
    for cores, gpus, expected in wanted:
        assert fits_on(Nodes(), {"num_cpus": cores, "num_gpus": gpus}) == expected


def test_rows_of_several_kinds_of_processor_are_named() -> None:
    progress = Progress()
    keys, known = np.zeros((4, 32), np.uint8), np.ones(4, bool)
    for numbers, node, kind in ((range(4), "a-1", "EPYC"), (range(8, 12), "b-2", "Xeon"), (range(4, 8), "a-1", "EPYC")):
        progress.add(Task(np.array(numbers)), Part(keys, known, {}, node, kind))
    computed, differ = progress.notes()
    assert computed.startswith("computed on a Ray cluster: a-1 ") and "b-2 " in computed
    assert differ == (
        "rows of different processors or versions may differ in their last bits (EPYC: images 0-7; Xeon: images 8-11)"
    )
    assert ranges(np.arange(0, 40, 2), most=2) == "0-0, 2-2 and 18 more ranges"


def test_a_task_returns_its_error_with_the_node(images: Path, tmp_path: Path) -> None:
    job = prepare(images, COLOURS, complete({"cache": tmp_path / "cache"}))
    with FeatureStore(job.cache, job.specs[0]) as store:
        store.computed_by("another")
        store.append(np.zeros((1, 32), np.uint8), np.zeros((1, 48), np.float32))
    with visible(job.cache) as token:
        shared = Shared(job, ColourEngine(), token, None, b"")
        found = compute_task(pickle.dumps(shared), job.source, here="node-1")
    assert isinstance(found, StoreError) and "on node-1: the features in" in str(found)


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FeatxError, match=r'pip install "featx\[ray\]"'), connected(None):
        pass


def test_an_address_alone_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatxError, match="add --on ray"):
        sync(images, COLOURS, engine=ColourEngine(), address="head:6379", cache=tmp_path / "cache")
    with pytest.raises(FeatxError, match="HOST:PORT"):
        sync(images, COLOURS, engine=ColourEngine(), on="ray", address="head", cache=tmp_path / "cache")
    with pytest.raises(FeatxError, match="on is one of ray"):
        sync(images, COLOURS, engine=ColourEngine(), on="dask", cache=tmp_path / "cache")


def test_fits_and_sweeps_ask_the_cluster_for_images_without_a_row(images: Path, tmp_path: Path) -> None:
    nobody = {"engine": ColourEngine(), "cache": tmp_path / "cache", "on": "ray", "address": "127.0.0.1:1"}
    with pytest.raises(FeatxError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        featx.fit(images, COLOURS, "ncm", output=tmp_path / "run", **nobody)
    with pytest.raises(FeatxError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        sweep(images, [COLOURS], ["ncm"], output=tmp_path / "sweep", **nobody)
    sync(images, COLOURS, engine=ColourEngine(), cache=tmp_path / "cache")  # nothing is left to compute
    assert featx.fit(images, COLOURS, "ncm", output=tmp_path / "run", **nobody).report["extract"]["cached"] == 120


def test_an_export_asks_the_cluster_for_images_without_a_row(photo_run: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("ants", "bees"):
        (tmp_path / name).mkdir()
        photo = min((photos / "val" / name).glob("*.jpg"))
        (tmp_path / name / "new.jpg").write_bytes(photo.read_bytes() + b"\0")
    with pytest.raises(FeatxError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        featx.export(photo_run, data=tmp_path, output=tmp_path / "m.onnx", on="ray", address="127.0.0.1:1")
