"""The cores, memory and GPUs that this process may use. Imports torch, which takes seconds, only to use a GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from featx.errors import FeatxError
from featx.options import fields_of

CPUINFO = Path("/proc/cpuinfo")
# Linux's names of what multiplies them; of x86 and of Arm.
NATIVE = {
    "bf16": {"amx_bf16", "avx512_bf16", "bf16"},
    "int8": {"amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"},
}


def available_threads(root: Path = Path("/")) -> int:
    """The cores this process may use, by its affinity and by the quotas of its control groups, below `root`."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, _quota(root)))


@functools.cache  # solvers ask in every pass
def _quota(root: Path) -> int:
    found = _limits(root, ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
    return min((math.ceil(quota / period) for quota, period in found if quota > 0 and period > 0), default=1 << 20)


def _limits(root: Path, *names: list[str]) -> Iterator[tuple[float, float]]:
    """The two numbers in these files (Linux's control groups of version 2, then 1), of this process's groups and of
    all those around them. A container may see its own group alone, at the top.
    """
    top = root / "sys/fs/cgroup"
    groups = {top}
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").splitlines():
            _, kinds, path = line.split(":", 2)
            for mount in (top / kinds, *(top / kind for kind in kinds.split(","))):
                own = mount / path.lstrip("/")
                groups |= {mount, own, *(above for above in own.parents if above.is_relative_to(mount))}
    for group in groups:
        for files in names:
            with suppress(OSError, ValueError):  # `max`: no limit
                first, second = " ".join((group / name).read_text() for name in files).split()
                yield float(first), float(second)


def arithmetic(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Which of `bf16` and `int8` this processor multiplies by instructions of its own.

    Both, where the system does not say (not Linux): rows are right in either case, and only speed is lost.
    """
    try:
        _, flags = _described(cpuinfo)
    except OSError:
        return frozenset(NATIVE)
    return frozenset(name for name, needed in NATIVE.items() if flags & needed)


@functools.cache
def processor() -> str:
    """This machine's processor by its name, with a digest of what it can do: names such as `AMD EPYC` are shared."""
    name, flags = "", set[str]()
    with suppress(OSError):
        name, flags = _described()
    name = name or platform.processor() or platform.machine()
    return f"{name} ({hashlib.sha256(' '.join(sorted(flags)).encode()).hexdigest()[:8]})"


def _described(cpuinfo: Path = CPUINFO) -> tuple[str, set[str]]:
    """The first processor's model and flags, as Linux names them; empty where it names none. Raises `OSError`."""
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    return fields.get("model name", ""), set((fields.get("flags") or fields.get("features", "")).split())


def single_thread(wanted: bool = True) -> AbstractContextManager[Any]:
    """One BLAS thread: more would wait for each other on small matrices, and inside our own threads."""
    return _libraries().limit(limits=1, user_api="blas") if wanted else nullcontext()


@functools.cache
def _libraries() -> Any:
    """numpy's BLAS libraries; finding them takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def free_memory() -> float:
    """Bytes of main memory that this process may still take."""
    return max(0.0, min(_machine_memory(), group_memory()))


def memory_for_features() -> float:
    """Bytes that features may take by default: a fifth of what is free, since a fit holds about four copies."""
    return free_memory() / 5


def group_memory(root: Path = Path("/")) -> float:
    """What the limits of this process's control groups leave, in bytes; infinity where there are none."""
    found = _limits(root, ["memory.max", "memory.current"], ["memory.limit_in_bytes", "memory.usage_in_bytes"])
    return min((limit - used for limit, used in found), default=float("inf"))


def _machine_memory() -> float:
    """What the machine has free; half of all its memory where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2.0**31


def choose_device(device: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> `cpu`, or a CUDA device that exists. Raises `FeatxError`."""
    fields_of()["device"].check(device)
    count = 0
    if device != "cpu" and has_cuda():
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    if not count:
        raise FeatxError(f"device {device!r} was asked for, but torch finds no CUDA GPU here; use --device cpu")
    place = "cuda:0" if device == "auto" else device
    if int(place.partition(":")[2] or 0) >= count:
        raise FeatxError(f"there is no device {device}; this machine has {count} GPUs")
    return place


def decoding_device(device: str) -> str:
    """The GPU that decodes JPEGs when `device` computes. Raises `FeatxError` where there is none."""
    place = choose_device(device)
    if place == "cpu":
        why = "--device cpu was asked for" if device == "cpu" else "there is none here"
        raise FeatxError(f"--decode gpu needs a CUDA GPU, and {why}; use --decode exact, or a machine with one")
    return place


def has_cuda() -> bool:
    """Whether the NVIDIA driver sees a GPU; imports no torch."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
