"""Where a run's time goes: how busy each stage is, which of them bounds the run, and what would help."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from featx.extraction.loader import Loaded, Loader
from featx.pixels.preprocess import GPU

STAGES = ("read", "decode", "embed", "store")
BUSY = 0.8  # from this share of their time on, cores or threads count as taken up
TELLING = 1.0  # seconds that a run must have worked before its shares say what would help


@dataclass
class Timing:
    """Seconds of work of each stage since `begin`, and the two waits of the thread that runs the loop.

    On a CPU the stages share the cores, so that their costs add; on a GPU `embed` runs beside the others.
    Reading and decoding are the loader's threads' processor time; embedding is what remains of the
    process's, or, on a GPU, the time spent waiting for it.
    """

    workers: int
    cores: int
    gpu: bool = False
    """Whether the backbone runs on a GPU."""
    by_gpu: bool = False
    """Whether JPEGs are decoded on the GPU."""
    work: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    elapsed: float = 0.0
    starved: float = 0.0
    """Seconds that the loop waited for decoded images."""
    waited: float = 0.0
    """Seconds that the loop waited for rows."""
    blocked: float = 0.0
    """Seconds that loading threads waited for files, summed over the threads."""
    large: float = 0.0
    """Share of the decoded images that `--decode fast` would decode at a smaller scale."""
    device: float = 0.0
    """Seconds of decoding by the GPU's decoder: wall time of its one thread."""
    _zero: tuple[float, ...] = ()
    """The clocks when counting began."""

    def begin(self, loader: Loader, *, gpu: bool) -> None:
        """Count from here: the engine is open, and the loader has not begun."""
        self.gpu, self.by_gpu = gpu, loader.preprocess.pixels == GPU
        self._zero = _moment(loader)

    def update(self, loader: Loader) -> Timing:
        """Take in what has been counted; cheap enough for every batch."""
        now = _moment(loader)
        counted = (a - b for a, b in zip(now, self._zero, strict=True))
        self.elapsed, process, loop, read, decode, files, self.device = counted
        self.blocked = max(0.0, files - read)
        self.large = loader.large / max(1, loader.decoded)
        embed = self.waited if self.gpu else max(0.0, process - loop - read - decode - self.device)
        self.work |= {"read": read, "decode": decode + self.device, "embed": embed}
        return self

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Count the time inside as the store's."""
        begin = time.perf_counter()
        yield
        self.work["store"] += time.perf_counter() - begin

    def waiting(self, loaded: Iterator[Loaded]) -> Iterator[Loaded]:
        """Pass the images through, counting how long the loop waits for them."""
        while True:
            begin = time.perf_counter()
            image = next(loaded, None)
            self.starved += time.perf_counter() - begin
            if image is None:
                return
            yield image

    @property
    def shares(self) -> dict[str, float]:
        """Each stage's part of all the work done; empty before there is any."""
        total = sum(self.work.values())
        return {name: round(seconds / total, 3) for name, seconds in self.work.items()} if total > 0 else {}

    @property
    def used(self) -> float:
        """The part of the cores' time that this run used."""
        seconds = sum(value for name, value in self.work.items() if not (self.gpu and name == "embed"))
        seconds -= self.device if self.gpu else 0.0
        return min(1.0, seconds / (self.elapsed * self.cores)) if self.elapsed > 0 else 0.0

    def bound(self) -> tuple[str, float]:
        """The stage that bounds the run, and how busy it is, 0 to 1.

        Where the loop mostly waits for images, it depends on what the loader's threads do: wait for
        files, or decode. On a CPU with enough threads all stages share the cores, and the one that
        takes most of the work bounds the run; a GPU bounds it when the loop waits for its rows.
        """
        if self.elapsed <= 0 or not self.shares:
            return "", 0.0
        threads = self.elapsed * self.workers
        reading, decoding = (self.work["read"] + self.blocked) / threads, self._decoding()
        starved = self.starved > self.elapsed / 2
        if starved and reading > max(decoding, 0.5):
            return "read", min(1.0, reading)
        if starved and (self.gpu or (self.workers < self.cores and decoding > BUSY)):
            return "decode", min(1.0, decoding)
        if self.gpu:
            waits = {"embed": self.waited, "store": self.work["store"]}
            name = max(waits, key=lambda stage: waits[stage])
            return name, min(1.0, waits[name] / self.elapsed)
        name = max(self.shares, key=lambda stage: self.shares[stage])
        return name, self.shares[name]

    def _decoding(self) -> float:
        """How busy the threads that decode are, or the GPU's decoder where that is busier."""
        threads = (self.work["decode"] - self.device) / (self.elapsed * self.workers)
        return max(threads, self.device / self.elapsed)

    def brief(self) -> str:
        """For the progress bar: `decode 83 %`."""
        name, share = self.bound()
        return f"{name} {share:.0%}" if name else ""

    def advice(self) -> str:
        """What bounds the run, and what would make it faster; empty for a run too short to tell."""
        name, share = self.bound()
        if not name or self.elapsed < TELLING:
            return ""
        by_gpu = " or --decode gpu" if self.gpu and not self.by_gpu else ""
        if name == "decode" and self.device > self.elapsed / 2:
            text = f"decode-bound {share:.0%}: the GPU's decoder is busy; smaller copies of the images would help"
        elif name == "decode" and self.workers < self.cores:
            text = f"decode-bound {share:.0%}: use --workers {self.cores}{by_gpu}"
        elif name == "decode" and self.large > 0.5:
            text = f"decode-bound {share:.0%}: use --decode fast, for large JPEGs at a smaller scale{by_gpu}"
        elif name == "decode" and by_gpu:
            text = f"decode-bound {share:.0%}: use --decode gpu if these are JPEGs, or more cores"
        elif name == "decode":
            text = f"decode-bound {share:.0%}: more cores would help, or smaller copies of the images"
        elif name == "read":
            text = f"read-bound {share:.0%}: the files come slowly; use --workers {2 * self.workers}, or a faster disk"
        elif name == "store":
            text = f"store-bound {share:.0%}: the cache's disk is slow; put --cache on a faster one"
        elif self.gpu:
            text = f"backbone-bound {share:.0%}: --precision bf16 or a smaller backbone would help"
        else:
            text = f"backbone-bound {share:.0%}: a GPU or a smaller backbone would help"
        if not self.gpu and name in ("decode", "embed") and self.used < BUSY and self.workers >= self.cores:
            text += f"; this run had {self.used:.0%} of the cores' time, so other programs may hold them"
        return text


def _moment(loader: Loader) -> tuple[float, ...]:
    """Wall time; the process's and this thread's processor time; what the loader has counted. In seconds."""
    return time.perf_counter(), time.process_time(), time.thread_time(), *loader.counted()
