"""What a Ray cluster has: connecting to it, its cores and GPUs, and whether every node sees what it needs."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featx import __version__
from featx.devices import available_threads
from featx.engines.engine import Engine
from featx.engines.opening import NEEDS
from featx.engines.openvino import installed
from featx.errors import FeatxError, ImageError, StoreError
from featx.extraction.job import Job
from featx.features import content_key
from featx.files import aside_name, make_folder
from featx.sources.source import Source
from featx.text import printable, some

# No telemetry; and Ray does not print the state of lost nodes on standard output, which is for results.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
ANSWERS = 5.0  # seconds in which a cluster's address must answer
LOOKS = 90.0  # seconds in which each node must have started a process and looked around


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster. What is started here is ended here. Raises `FeatxError`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)  # before the import; users may say otherwise
    try:
        import ray
    except ImportError as error:
        raise FeatxError(f'--on ray needs Ray, which cannot be imported ({error}): pip install "featx[ray]"') from error
    if ray.is_initialized():  # the caller's own connection
        yield ray
        return

    own = {"num_cpus": available_threads()} if address is None else {"address": address}
    if address is not None:
        require_answer(address)
    try:
        ray.init(include_dashboard=None if address else False, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        what = f"the Ray cluster at {address} cannot be used" if address else "Ray cannot be started here"
        raise FeatxError(
            f"{what} ({_line(error, 0)}); run this on one of its nodes, with the same Ray and Python"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def require_answer(address: str) -> None:
    """Raise `FeatxError` unless something at HOST:PORT speaks HTTP/2, as Ray does: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and no settings
    trouble = "what answers there does not speak Ray's protocol"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWERS) as connection:
            connection.sendall(hello)
            answer = connection.recv(9)
            if len(answer) > 3 and answer[3] == 4:  # its own settings
                return
    except (OSError, OverflowError, ValueError) as error:
        trouble = str(getattr(error, "strerror", None) or error)
    raise FeatxError(
        f"no Ray cluster answers at {address} ({trouble}); give the HOST:PORT that `ray start --head` printed"
    )


def _line(error: Exception, place: int) -> str:
    """A line of an error's text, by its place."""
    return (str(error).strip() or type(error).__name__).splitlines()[place]


def demand(ray: Any, job: Job) -> dict[str, float]:
    """What a task asks of a node. Raises `FeatxError` where no node has it."""
    total, cores = ray.cluster_resources(), job.workers or 1
    recorded = next((spec.engine for spec in job.specs if spec.engine), job.engine)
    on_gpu = job.device.startswith("cuda") or (
        job.device == "auto" and total.get("GPU", 0) > 0 and (recorded is None or recorded == "torch-cuda")
    )
    asked: dict[str, float] = {"num_cpus": cores, "num_gpus": int(on_gpu)}
    count = sum(node["Alive"] for node in ray.nodes())
    have = f"its {count} nodes have {total.get('CPU', 0):g} cores and {total.get('GPU', 0):g} GPUs"
    if job.device.startswith("cuda:"):
        raise FeatxError(f"--device {job.device}: on a cluster a task takes the GPU it is given; use --device cuda")
    if on_gpu and not fits_on(ray, {"num_cpus": 0, "num_gpus": 1}):
        raise FeatxError(f"--device {job.device}: the cluster has no GPU ({have}); use --device cpu")
    if not fits_on(ray, asked):
        raise FeatxError(f"--workers {cores} takes more cores than any node has ({have}); use fewer")
    return asked


def fits_on(ray: Any, options: dict[str, float]) -> int:
    """How many nodes have what a task asks for."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    return sum(all(node.get(name, 0) >= count for name, count in asked.items()) for node in alive)


def slots_of(ray: Any, options: dict[str, float]) -> int:
    """How many tasks can run at once."""
    total = ray.cluster_resources()
    slots = total.get("CPU", 0) // options["num_cpus"]
    return max(1, int(min(slots, total.get("GPU", 0)) if options["num_gpus"] else slots))


@dataclass(frozen=True, eq=False)
class Shared:
    """What all tasks have in common; pickled, it goes to every process."""

    job: Job
    """Without its images."""
    engine: Engine | None
    """The caller's own, if any."""
    token: Path
    """A file in the cache, as long as the run takes."""
    sample: Source | None
    """One image."""
    key: bytes
    """Its key."""

    def missing(self) -> str:
        """What is missing on the node where this is called, as the rest of a sentence; empty where nothing is."""
        cache, sample, file = self.job.cache, self.sample, self.job.request.file
        if not self.token.exists():
            return f"does not see the cache {cache}: put it where all nodes see it under this path"
        if not os.access(cache, os.W_OK):
            return f"may not write to the cache {cache}"
        try:
            if sample is not None and content_key(sample.read(0)) != self.key:
                return f"has other images in {sample.root}: {printable(sample.ids[0])} differs"
        except ImageError as error:
            assert sample is not None
            where = f"{printable(sample.ids[0])} in {sample.root}"
            return f"cannot read {where} ({error}): put the images where all nodes see them"
        if self.job.engine == "openvino" and not installed():
            return f"lacks OpenVINO, which computes these features: {NEEDS['openvino']}"
        if file and str(self.job.engine).startswith("torch") and not file.exists():
            return f"does not see the weights {file}: put them where all nodes see them"
        return ""


@contextmanager
def visible(cache: Path) -> Iterator[Path]:
    """An empty file in the cache, by which nodes see that it is the same one."""
    token = cache / aside_name()
    try:
        make_folder(cache)
        token.write_bytes(b"")
    except OSError as error:
        raise StoreError(f"cannot write to the cache {cache} ({error.strerror}); give another --cache") from error
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def sample_of(source: Source, numbers: np.ndarray) -> tuple[Source | None, bytes]:
    """One of these images that can be read here, and its key; None where none of a few can."""
    for number in numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), 8)).astype(int)].tolist():
        with suppress(ImageError):
            return source.take(np.array([number])), content_key(source.read(number))
    return None, b""


def look_at_nodes(ray: Any, shared: bytes) -> None:
    """Raise `FeatxError` where a node lacks something of what is `Shared`."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look, asked = ray.remote(num_cpus=0, max_retries=0)(look_around), {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ref = look.options(scheduling_strategy=strategy).remote(shared, __version__)
            asked[ref] = f"{node['NodeManagerHostname']}-{node['NodeID'][:4]}"

    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=LOOKS)
    troubles = [f"{asked[ref]} has started no process in {LOOKS:g} s" for ref in late]
    for ref in done:
        try:
            found = ray.get(ref)
        except ray.exceptions.RayError as error:
            found = f"cannot run featx ({_line(error, -1)}): install the same version there"
        troubles += [f"{asked[ref]} {found}"] if found else []
    if troubles:
        raise FeatxError(f"not every node of the cluster can take part: {some(troubles)}")


def look_around(shared: bytes, wanted: str) -> str:
    """What is missing on the node where this runs, as the rest of a sentence; empty where nothing is."""
    if __version__ != wanted:
        return f"has featx {__version__}, not {wanted}: install the same version there"
    found: str = pickle.loads(shared).missing()
    return found
