"""Owns what this machine has to compute with: the cores of this process, and GPUs; imports torch only to use one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featx.errors import FeatxError


def available_threads() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of main memory that this process may still take."""
    return max(0.0, min(_machine_memory(), _group_memory()))


def memory_for_features() -> float:
    """Bytes that features may take by default: a fifth of what is free, since a fit holds about four copies."""
    return free_memory() / 5


def _group_memory() -> float:
    """What the limit of a container (Linux's control group, version 2) leaves; infinity where there is none."""
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return float(most) - float(used)  # `max` is no number
    except (OSError, ValueError):
        return float("inf")


def _machine_memory() -> float:
    """What the machine has free; half of all where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2.0**31


def check_device(device: str) -> None:
    """Raise `FeatxError` for what is no device's name, without asking whether it is there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise FeatxError(f"device is auto, cpu, cuda or cuda:N, not {device!r}")


def choose_device(device: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> `cpu`, or a CUDA device that is there. Raises `FeatxError`."""
    check_device(device)
    kind = device.partition(":")[0]
    if kind == "cpu" or (kind == "auto" and not has_cuda()):
        return "cpu"
    if not has_cuda():  # known without torch, whose import takes seconds
        raise FeatxError(f"device {device!r} was asked for, but there is no CUDA GPU here; use --device cpu")
    import torch

    if torch.cuda.is_available():
        place = "cuda:0" if kind == "auto" else device
        number = int(place.partition(":")[2] or 0)
        if number < torch.cuda.device_count():
            return place
        raise FeatxError(f"there is no device {device}; this machine has {torch.cuda.device_count()} GPUs")
    if kind == "cuda":
        raise FeatxError(f"device {device!r} was asked for, but torch finds no CUDA GPU; use --device cpu")
    return "cpu"


def decoding_device(device: str) -> str:
    """The GPU that decodes JPEGs where `device` is to compute. Raises `FeatxError` where there is none."""
    place = choose_device(device)
    if place == "cpu":
        why = "--device cpu was asked for" if device == "cpu" else "there is none here"
        raise FeatxError(f"--decode gpu needs a CUDA GPU, and {why}; use --decode exact, or a machine with one")
    return place


def has_cuda() -> bool:
    """Whether the NVIDIA driver sees a GPU; asked without torch, whose import takes seconds."""
    import ctypes
    import sys

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
