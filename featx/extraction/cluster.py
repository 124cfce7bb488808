"""An extraction on a Ray cluster: chunks of what is missing become Ray Core tasks, which write to one shared cache.

Paths go in, keys and counts come out. Ray's own retries are off: what to do next depends on why a task ended.
"""

from __future__ import annotations

import functools
import pickle
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from featx.cache.index import KEY_BYTES
from featx.cache.light import LightStore
from featx.cache.writing import Writer
from featx.engines.engine import Engine
from featx.errors import FeatxError
from featx.extraction.chunks import CHUNK_BYTES, cut, kind_of, work
from featx.extraction.fidelity import fidelity
from featx.extraction.job import Job
from featx.extraction.keys import KeyTable
from featx.extraction.nodes import Shared, connected, demand, fits_on, look_at_nodes, sample_of, slots_of, visible
from featx.extraction.report import Chunk
from featx.sources.source import Source
from featx.text import printable

ENDS = 30.0  # seconds that tasks get, after an interrupt, to store what they have computed
ALONE = 60.0  # seconds without a node for any task, after which the run ends
MOST_LOST = 20  # times that one chunk's node may be lost
MOST_KILLING = 50  # images that may end their processes


@dataclass(frozen=True, eq=False)
class Task:
    """A chunk to be computed: image numbers, `int [M]`."""

    numbers: np.ndarray
    crashed: bool = False
    """Whether its process has ended once."""
    lost: int = 0
    """How often its node was lost, or had no memory left."""


@dataclass(frozen=True, eq=False)
class Part:
    """What a task gives back: 33 bytes an image."""

    keys: np.ndarray
    """`uint8 [M, 32]`."""
    known: np.ndarray
    """`bool [M]`."""
    errors: dict[int, str]
    """Why an image cannot be used, by its place in the chunk."""
    node: str
    kind: str
    """See `kind_of`."""


@dataclass
class Progress:
    """What each node has done."""

    begin: float = field(default_factory=time.perf_counter)
    images: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Image numbers, by the kind of processor that computed them."""

    def add(self, task: Task, part: Part) -> None:
        if not part.node:
            return
        self.images[part.node] = self.images.get(part.node, 0) + len(task.numbers)
        self.numbers.setdefault(part.kind, []).append(task.numbers)

    def rates(self) -> str:
        """`node1 24/s, node2 31/s`."""
        seconds = time.perf_counter() - self.begin
        return ", ".join(f"{node} {images / seconds:.0f}/s" for node, images in sorted(self.images.items()))

    def notes(self) -> list[str]:
        """Sentences on who has computed what."""
        notes = [f"computed on a Ray cluster: {self.rates()}"] if self.images else []
        if len(self.numbers) > 1:
            which = "; ".join(f"{kind}: images {ranges(np.concatenate(n))}" for kind, n in sorted(self.numbers.items()))
            notes.append(f"rows of different processors or versions may differ in their last bits ({which})")
        return notes


def compute(
    job: Job,
    table: KeyTable,
    stores: Sequence[Writer],
    numbers: np.ndarray,
    chunk: Chunk,
    engine: Engine | None = None,
    *,
    address: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """As `computing.compute`, on a cluster: `HOST:PORT` of one that runs, or one that is started on this machine.

    engine: one of the caller's own, which is pickled. chunk_bytes: see `featx.extraction.chunks.cut`. The stores given
    are refreshed. Raises `FeatxError` for a cluster that cannot be reached, lacks what is needed, or loses too much.
    """
    begin = time.perf_counter()
    source = job.source
    if not source.root.is_absolute():  # tasks have other working folders
        source = replace(source, root=source.root.absolute())
    with connected(address) as ray, visible(job.cache) as token:
        options = demand(ray, job)
        ready = _ready(job, stores, numbers, chunk, engine, options)
        # takes classes of the script that is run, too
        shared = ray.cloudpickle.dumps(Shared(ready, engine, token, *sample_of(source, numbers)))
        look_at_nodes(ray, shared)
        chunk.opening = time.perf_counter() - begin

        parts = cut(numbers, job.row_bytes, slots_of(ray, options), job.source.starts, chunk_bytes)
        progress = Progress()
        with tqdm(total=len(numbers), desc="extract", unit=" images", disable=None) as bar:
            for task, part in run(ray, source, shared, options, parts):
                table.keys[task.numbers], table.known[task.numbers] = part.keys, part.known
                table.errors |= {int(task.numbers[i]): why for i, why in part.errors.items()}
                progress.add(task, part)
                bar.set_postfix_str(progress.rates(), refresh=False)
                bar.update(len(task.numbers))
    chunk.notes += progress.notes()

    before = table.stored(stores)  # as they were listed when the run began
    for store in stores:
        store.refresh()
    chunk.extracted = int((table.first() & table.stored(stores) & ~before).sum())


def _ready(
    job: Job,
    stores: Sequence[Writer],
    numbers: np.ndarray,
    chunk: Chunk,
    engine: Engine | None,
    options: dict[str, float],
) -> Job:
    """The job without its images, as tasks run it; a backbone that runs on CPUs is exported by now."""
    device, cores, file = "cuda" if options["num_gpus"] else "cpu", int(options["num_cpus"]), job.request.file
    request = job.request.at(file.resolve()) if file else job.request
    job = replace(job, request=request, device=device, workers=cores, cores=cores)
    name = engine.name if engine else "torch-cuda"
    if engine is None and device == "cpu":
        with closing(job.open_engine(stores)) as opened:
            name = opened.name
            if job.specs[0].precision != "fp32" and all(store.empty for store in stores):
                chunk.notes.append(fidelity(job, opened, stores, numbers))
    for store in stores:
        store.computed_by(name)
    return replace(job, source=Source(job.source.uri, job.source.root, []), engine=name)


@functools.lru_cache(maxsize=1)
def _kept(shared: bytes) -> tuple[Job, list[LightStore], Engine, str]:
    """What a process keeps between its tasks: the job, light stores, the engine, and its `kind_of`.

    Raises `FeatxError` on a node that lacks something: it may have joined since all were looked at.
    """
    common: Shared = pickle.loads(shared)
    if found := common.missing():
        raise FeatxError(f"the node {found}")
    stores = common.job.light_stores()
    engine = common.engine or common.job.open_engine(stores)
    return common.job, stores, engine, kind_of(engine.name)


def compute_task(shared: bytes, source: Source, here: str = "") -> Part | FeatxError:
    """A task: compute what is missing of some images. Expected errors are returned: Ray would add its tracebacks.

    here: this node's name, for people; by default Ray is asked, since several nodes may run on one machine.
    """
    if not here:
        import ray

        here = f"{socket.gethostname()}-{ray.get_runtime_context().get_node_id()[:4]}"
    try:
        job, stores, engine, kind = _kept(shared)
        for store in stores:
            store.refresh()
        table = KeyTable(source, job.cache, recall=False)
        work(replace(job, source=source), table, stores, Chunk(), engine)
    except FeatxError as error:
        return type(error)(f"on {here}: {error}")
    return Part(table.keys, table.known, table.errors, here, kind)


def run(
    ray: Any, source: Source, shared: bytes, options: dict[str, float], parts: list[np.ndarray]
) -> Iterator[tuple[Task, Part]]:
    """Have every chunk computed, in any order, whatever processes or nodes are lost. Raises `FeatxError`."""
    function = ray.remote(max_retries=0, max_calls=0, **options)(compute_task)
    common, waiting = ray.put(shared), dict[Any, Task]()
    tasks, killing, last = deque(map(Task, parts)), 0, time.monotonic()
    try:
        while tasks or waiting:
            most = 2 * slots_of(ray, options)  # nodes may have joined
            while tasks and len(waiting) < most:
                task = tasks.popleft()
                waiting[function.remote(common, source.take(task.numbers))] = task

            done, _ = ray.wait(list(waiting), timeout=1.0)
            last = time.monotonic() if done else last
            if time.monotonic() - last > ALONE and not fits_on(ray, options):
                raise FeatxError("the nodes that could compute have left the cluster; what is computed is kept")
            for ref in done:
                task = waiting.pop(ref)
                try:
                    part = ray.get(ref)
                except ray.exceptions.RayError as error:
                    again = after(task, error, ray.exceptions)
                    tasks.extendleft(again)
                    if again:
                        continue
                    killing += 1
                    if killing > MOST_KILLING:
                        raise FeatxError(
                            f"{killing} images ended the process that computed them, the last one "
                            f"{printable(source.ids[task.numbers[0]])}: Ray's logs on the nodes say more. What is "
                            "computed is kept"
                        ) from error
                    part = _killed(task)
                if isinstance(part, FeatxError):
                    raise part
                yield task, part
    finally:
        for ref in waiting:
            ray.cancel(ref)
        if waiting:
            with suppress(ray.exceptions.RayError):  # they store what they have computed
                ray.wait(list(waiting), num_returns=len(waiting), timeout=ENDS)


def after(task: Task, error: Exception, exceptions: Any) -> list[Task]:
    """What to compute in place of a task that gave no result: nothing, where its only image ends its process.

    exceptions: `ray.exceptions`. Raises `FeatxError` for a task that was lost too often.
    """
    if isinstance(error, exceptions.WorkerCrashedError):
        if not task.crashed:  # perhaps somebody has ended the process
            return [replace(task, crashed=True)]
        halves = np.array_split(task.numbers, 2) if len(task.numbers) > 1 else []
        return [replace(task, numbers=half) for half in halves]
    gone = exceptions.NodeDiedError, exceptions.LocalRayletDiedError, exceptions.ObjectLostError
    if not isinstance(error, (*gone, exceptions.OutOfMemoryError)):
        raise error
    if task.lost + 1 >= MOST_LOST:
        raise FeatxError(
            f"{MOST_LOST} times a node was lost, or had no memory left, while it computed the same images ({error}); "
            "use nodes with more memory, or more --workers, which are fewer processes. What is computed is kept"
        ) from error
    return [replace(task, lost=task.lost + 1)]


def _killed(task: Task) -> Part:
    """The result for an image that ends its process."""
    why = "the process that computed it ended: the image crashes a decoder, or the node killed the process"
    return Part(np.zeros((1, KEY_BYTES), np.uint8), np.zeros(1, bool), {0: why}, "", "")


def ranges(numbers: np.ndarray, most: int = 5) -> str:
    """Image numbers as text, `0-127, 256-383`, in at most so many ranges."""
    numbers = np.sort(numbers)
    runs = [f"{run[0]}-{run[-1]}" for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)]
    return ", ".join(runs[:most]) + (f" and {len(runs) - most} more ranges" if len(runs) > most else "")
