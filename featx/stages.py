"""Owns where a run's time goes: how busy each stage is, which of them bounds the run, and what would help."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from featx.loader import Loaded, Loader

STAGES = ("read", "decode", "embed", "store")
SATURATED = 0.8
"""From this share of the cores' time on, the cores are what is short, whichever stage uses them."""


@dataclass
class Stages:
    """Seconds of work of each stage since `begin`, and the two waits of the thread that runs the loop.

    On a CPU the stages share the cores, so that their costs add; on a GPU `embed` runs beside the others.
    Reading and decoding are the loader's threads' processor time; embedding is what remains of the
    process's, or, on a GPU, the time spent waiting for it.
    """

    workers: int
    cores: int
    gpu: bool = False
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
    _zero: tuple[float, ...] = ()
    """The clocks when counting began."""

    def begin(self, loader: Loader, *, gpu: bool) -> None:
        """Count from here: the engine is open."""
        self.gpu = gpu
        self.starved = self.waited = self.work["store"] = 0.0
        self._zero = _moment(loader)

    def update(self, loader: Loader) -> Stages:
        """Take in what has been counted; cheap enough for every batch."""
        if self._zero:
            now = _moment(loader)
            self.elapsed, process, loop, read, decode, files = (a - b for a, b in zip(now, self._zero, strict=True))
            self.blocked = max(0.0, files - read)
            self.large = loader.large / max(1, loader.decoded)
            embed = self.waited if self.gpu else max(0.0, process - loop - read - decode)
            self.work |= {"read": read, "decode": decode, "embed": embed}
        return self

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
        return min(1.0, seconds / (self.elapsed * self.cores)) if self.elapsed > 0 else 0.0

    def bound(self) -> tuple[str, float]:
        """The stage that bounds the run, and how busy it is, 0 to 1.

        Where the cores are short, the stage that takes most of their time; else the one that the loop
        waits for: reading or decoding, whose threads are then busy, or the backbone.
        """
        if self.elapsed <= 0:
            return "", 0.0
        if not self.gpu and self.used >= SATURATED:
            shares = self.shares
            name = max(shares, key=lambda stage: shares[stage])
            return name, shares[name]
        if self.starved > self.waited + self.work["store"]:
            threads = self.elapsed * self.workers
            reading = (self.work["read"] + self.blocked) / threads
            decoding = self.work["decode"] / threads
            return ("read", min(1.0, reading)) if reading > decoding else ("decode", min(1.0, decoding))
        if self.work["store"] > self.waited:
            return "store", min(1.0, self.work["store"] / self.elapsed)
        return "embed", min(1.0, self.waited / self.elapsed)

    def brief(self) -> str:
        """For the progress bar: `decode 83 %`."""
        name, share = self.bound()
        return f"{name} {share:.0%}" if name else ""

    def advice(self) -> str:
        """One sentence: what bounds the run, and what would make it faster."""
        name, share = self.bound()
        if name == "decode":
            text = f"decode-bound {share:.0%}: "
            if self.workers < self.cores:
                return f"{text}use --workers {self.cores}"
            if self.large > 0.5:
                return f"{text}--decode fast decodes large JPEGs at a smaller scale; the features then differ a little"
            return f"{text}all {self.cores} cores decode; more cores would help, or smaller copies of the images"
        if name == "read":
            return (
                f"read-bound {share:.0%}: the files come slowly; use --workers {2 * self.workers} to ask for more "
                "of them at once, or a faster disk"
            )
        if name == "embed":
            if self.gpu:
                return f"backbone-bound {share:.0%}: --precision bf16 or a smaller backbone would help"
            if self.used >= SATURATED:
                return (
                    f"backbone-bound {share:.0%}: a GPU, --precision bf16 where the processor computes in it, "
                    "or a smaller backbone would help"
                )
            return (
                f"backbone-bound {share:.0%}, with {1 - self.used:.0%} of the {self.cores} cores' time unused: "
                "other programs hold the cores, or the batches are small"
            )
        if name == "store":
            return f"store-bound {share:.0%}: the cache's disk is slow; put --cache on a faster one"
        return ""


def _moment(loader: Loader) -> tuple[float, ...]:
    """Wall time; the process's and this thread's processor time; what the loader has counted. In seconds."""
    return time.perf_counter(), time.process_time(), time.thread_time(), *loader.counted()
