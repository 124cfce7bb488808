"""What other code has set in this process, and what a fork has left behind, makes no difference to results."""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np

from featx.devices import available_threads


class Together:
    """A context manager for what the whole process shares: the first of several threads enters it, the last leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make, self.entered, self.inside = make, ExitStack(), 0
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.entered.enter_context(self.make())
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.entered.close()


@contextmanager
def _torch_defaults() -> Iterator[None]:
    import torch

    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = torch.get_default_dtype(), matmul.fp32_precision, conv.fp32_precision, torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    matmul.fp32_precision = conv.fp32_precision = "ieee"  # else CPUs may multiply in bf16
    torch.set_num_threads(min(before[3], torch_threads()))
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        matmul.fp32_precision, conv.fp32_precision = before[1:3]
        torch.set_num_threads(before[3])


_torch = Together(_torch_defaults)
FILTERS = Together(warnings.catch_warnings)
"""Around every change of the filters of warnings: threads that change them by turns would not bring them back."""
_one = threading.RLock()
_torch_forked = False
HAVE_THREADS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Sessions of onnxruntime and models of OpenVINO: in the child of a fork their threads are gone, and to free one would
wait for them."""


@contextmanager
def ordinary() -> Iterator[None]:
    """numpy and torch as they are by default: error states, default dtype and device, gradients, autocast, precision.

    What was set comes back at the end. torch is not imported for it. As a decorator, `@ordinary()`, it wraps a call.
    """
    with ExitStack() as stack:
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if "torch" in sys.modules:
            import torch  # waits for a thread that is still importing it

            stack.enter_context(_torch)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """For one thread at a time: loading networks, which seeds torch's only generator, and torch's exporters."""
    with _one:
        yield


def torch_threads(wanted: int | None = None) -> int:
    """How many threads torch takes, by default one per core. In the child of a process that had torch it is one: the
    others stayed behind, and torch would wait for them for ever.
    """
    return 1 if _torch_forked else wanted or available_threads()


def after_fork() -> None:
    """In the child, other threads' locks are held for ever, and the threads of torch and onnxruntime are gone."""
    global _one, _torch_forked
    _one = threading.RLock()
    _torch.lock, FILTERS.lock = threading.Lock(), threading.Lock()
    for session in list(HAVE_THREADS):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    if "torch" in sys.modules:
        import torch

        _torch_forked = True
        torch.set_num_threads(1)
