"""Engines by torch itself: on the CPU for bf16 and where an export fails, and on CUDA."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featx.backbones.backbone import Backbone, Trunk
from featx.engines.onnx import quiet, reason
from featx.errors import FeatxError
from featx.features import TOLERANCE, difference
from featx.files import aside_name, make_folder, sweep
from featx.state import one_at_a_time, ordinary, torch_threads
from featx.text import printable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUDA_BATCH = 256
# Images per thread from which on a run compiles its network. With two threads compiling paid from 240 to 930 images on
# (docs/benchmarks/torch-cpu.md): twice that, since a run that just gets its start-up back has gained nothing. More
# threads make the images faster, but not the compiler, which is one thread.
PAYS = 1000
# Seconds that they must take uncompiled: starting took from 13 to 50, and gains from a fifth to a half of the rest.
LONG = 120.0


class CpuEngine:
    """torch on the CPU, channels-last, batch norm folded into the convolutions.

    Every batch is padded to `batch_size`, since torch's rows change in their last bits with a batch's size.
    """

    name = "torch-cpu"

    def __init__(self, backbone: Backbone, precision: str, batch_size: int, threads: int | None = None) -> None:
        self.batch_size = batch_size
        self.threads = torch_threads(threads)
        self.module: Callable[[torch.Tensor], torch.Tensor]
        self.module = prepared(backbone.module, DTYPES[precision], torch.device("cpu"))
        crop = backbone.info.preprocess.crop
        self.images = torch.zeros((batch_size, 3, crop, crop), dtype=torch.uint8)

    @ordinary()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]`, B <= batch_size -> `float32 [B, *row_shape]`."""
        checked(images, self.images)
        self.images.numpy()[: len(images)] = images
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                rows = self.module(self.images)
        finally:
            torch.set_num_threads(before)
        return np.array(rows[: len(images)].numpy())

    @one_at_a_time()
    @ordinary()
    def compile(self, folder: Path, images: float = math.inf, tolerance: float = TOLERANCE) -> None:
        """Compile the network, its weights as constants; where that fails, a warning says why, and it runs as before.

        folder: of the cache; see `_compiling`. images: how many it will run; nothing is compiled where they take less
        than `LONG` as it is. tolerance: how far rows may be from those before, see `difference`.
        """
        eager = self.module
        noise = np.random.default_rng(0).integers(0, 256, self.images.shape, np.uint8)
        expected = self(noise)
        begin = time.perf_counter()
        self(noise)
        if images / self.batch_size * (time.perf_counter() - begin) < LONG:
            return

        try:
            with _compiling(folder):
                self.module = torch.compile(eager, dynamic=False)
                self(noise)
            self.module = torch._dynamo.run(eager)  # without compiling what a later batch is the first to reach
            if (apart := difference(self(noise), expected)) > tolerance:
                raise FeatxError(f"its rows would be off by {apart:.1e}, and {tolerance:.0e} is allowed")
        except Exception as error:  # compiling fails in many ways
            self.module = eager
            why = next((line for line in str(error).splitlines() if "error:" in line), reason(error))
            text = f"torch cannot compile this network here ({why}); it runs uncompiled, slower, with the same features"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Run the batch at once."""
        rows = self(images)
        return lambda: rows

    def close(self) -> None:
        """Nothing is queued."""


class CudaEngine:
    """torch on one CUDA device: 16-bit weights if requested, batch norm folded, one CUDA graph of a fixed batch.

    A network that waits for the GPU on its way, as one with a branch on its values does, runs without a graph.
    Copies to the GPU run on a stream of their own from pinned memory, two batches deep, and only the call that wants
    a batch's rows waits for the GPU. fp32 runs without TF32.
    """

    name = "torch-cuda"

    def __init__(self, backbone: Backbone, device: str, precision: str, batch_size: int | None = None) -> None:
        self.device, self.precision = torch.device(device), precision
        self.info = backbone.info
        self.module = prepared(backbone.module, DTYPES[precision], self.device)
        self.copying, self.computing = (torch.cuda.Stream(self.device) for _ in range(2))  # type: ignore[no-untyped-call]
        size = batch_size or CUDA_BATCH
        while not self._captured(size):
            size //= 2
        self.batch_size = size
        self.slots = itertools.cycle([_Slot(self.images, self.rows) for _ in range(2)])

    def __call__(self, images: np.ndarray | torch.Tensor) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]`, B <= batch_size -> `float32 [B, *row_shape]`. A tensor lies on this GPU."""
        return self.submit(images)()

    @torch.inference_mode()
    def submit(self, images: np.ndarray | torch.Tensor) -> Callable[[], np.ndarray]:
        """Queue the batch; the function returned waits for its rows, once, and keeps them."""
        checked(images, self.images)
        size, slot = len(images), next(self.slots)
        if slot.pending is not None:
            slot.pending()  # its buffers are needed now

        if isinstance(images, np.ndarray):
            slot.pinned_images.numpy()[:size] = images
            images = slot.pinned_images
        else:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))  # that is still making them
            images.record_stream(self.copying)
        with torch.cuda.stream(self.copying):
            slot.images[: len(images)].copy_(images, non_blocking=True)
            slot.copied.record(self.copying)
        with torch.cuda.stream(self.computing):
            self.computing.wait_event(slot.copied)
            self.images.copy_(slot.images)
            if self.graph is not None:
                self.graph.replay()
            else:
                with _cudnn(self.precision):
                    self.rows.copy_(self.module(self.images))
            slot.pinned_rows.copy_(self.rows, non_blocking=True)
            slot.done.record(self.computing)

        @functools.cache
        def rows() -> np.ndarray:
            slot.done.synchronize()
            return np.array(slot.pinned_rows[:size].numpy())

        slot.pending = rows
        return rows

    def close(self) -> None:
        """The GPU finishes what is queued."""

    def _captured(self, size: int) -> bool:
        """Make the graph for `size` images; False where the GPU has too little memory for it."""
        try:
            self.images, self.rows, self.graph = self._record(size)
            return True
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise FeatxError(f"{self.device} has too little memory for {self.info.name}") from error
        torch.cuda.empty_cache()  # here, where the frame and tensors of the failed try are gone
        return False

    def _record(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.CUDAGraph | None]:
        """Record the forward pass of `size` images: its input, its output, and the CUDA graph between, if it can be."""
        crop = self.info.preprocess.crop
        with torch.cuda.device(self.device), torch.inference_mode(), _cudnn(self.precision):
            images = torch.zeros((size, 3, crop, crop), dtype=torch.uint8, device=self.device)
            self.computing.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.computing):
                for _ in range(3):  # cuDNN chooses its algorithms before the capture
                    rows = self.module(images)
                waits = self._waits(images)
            self.computing.synchronize()
            if waits:
                return images, rows, None
            graph = torch.cuda.CUDAGraph()
            # a thread that decodes on the GPU meanwhile allocates and waits, which "global" would forbid
            with torch.cuda.graph(graph, stream=self.computing, capture_error_mode="thread_local"):
                rows = self.module(images)
            self.computing.synchronize()
        return images, rows, graph

    def _waits(self, images: torch.Tensor) -> bool:
        """Whether the network waits for the GPU. To find it out by a capture that fails would leave torch's allocator
        in the middle of it."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.module(images)
            return False
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Slot:
    """One batch's buffers on their way to the GPU and back."""

    def __init__(self, images: torch.Tensor, rows: torch.Tensor) -> None:
        self.images = torch.empty_like(images)
        self.pinned_images = torch.zeros(images.shape, dtype=images.dtype, pin_memory=True)
        self.pinned_rows = torch.zeros(rows.shape, dtype=rows.dtype, pin_memory=True)
        self.copied, self.done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        self.pending: Callable[[], np.ndarray] | None = None
        """Waits for the batch that last used these buffers."""


@contextlib.contextmanager
def _cudnn(precision: str) -> Iterator[None]:
    """Set how cuDNN computes, while a graph is captured or a network runs without one.

    TF32 is off: it keeps 10 bits of 23, which is off by a thousand times the fp32 tolerance. In 16 bits cuDNN
    measures which algorithm is fastest; in fp32 it does not, since the choice may change the last bits.
    torch's older name for it, `allow_tf32`, warns, and fails where somebody has used this one.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    cudnn.benchmark = precision != "fp32"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark = before


@contextlib.contextmanager
def _compiling(folder: Path) -> Iterator[None]:
    """torch.compile writes to a folder aside in `folder`, and starts the C++ compiler, no other process.

    Nothing stays: what it makes is code, and a later process could not tell whether it is damaged or somebody else's.
    """
    aside = (folder / aside_name()).absolute()
    if shlex.split(str(aside)) != [str(aside)]:  # torch splits commands at spaces
        raise FeatxError(f"its C++ compiler cannot write to {printable(str(folder))}; use a --cache without spaces")
    make_folder(folder)
    sweep(folder)
    aside.mkdir()
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    headers: Any = None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(aside)  # else torch makes a folder of its own when these are imported
    try:
        import torch._inductor.config as options
        from torch._dynamo.config import patch as tracing
        from torch._inductor import codecache
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.utils import fresh_cache

        headers = codecache  # those that it compiles would stay in the folder for temporary files
        before = headers._HEADER_DIR, headers._HEADER_LOCK_DIR
        headers._HEADER_DIR, headers._HEADER_LOCK_DIR = str(aside), str(aside / "locks")
        with (
            quiet(),
            fresh_cache(dir=str(aside)),
            options.patch({"freezing": True, "compile_threads": 1, "force_disable_caches": True}),
            tracing(recompile_limit=1 << 20),  # every engine of the process counts as one
        ):
            get_cpp_compiler()  # raises where there is none, before tracing takes its time
            yield
    finally:
        if headers:
            headers._HEADER_DIR, headers._HEADER_LOCK_DIR = before
            headers._precompile_header.cache_clear()
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        os.environ |= {} if own is None else {"TORCHINDUCTOR_CACHE_DIR": own}
        shutil.rmtree(aside, ignore_errors=True)


def prepared(module: Trunk, dtype: torch.dtype, device: torch.device) -> Trunk:
    """A copy for inference: batch norm folded where the network can be traced, cast, moved, channels-last."""
    trunk = copy.deepcopy(module).eval().requires_grad_(False)
    if trunk.tap is None:
        trunk.network = folded(trunk.network)
    trunk.network.to(dtype)
    trunk.dtype = dtype
    return trunk.to(device).to(memory_format=torch.channels_last)


def folded(network: nn.Module) -> nn.Module:
    """The network with batch norm folded into its convolutions, in fp32; itself where fx cannot trace it."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(network, inplace=True)
    except Exception:  # tracing fails in many ways; an unfolded network gives the same rows, slower
        return network


def checked(images: np.ndarray | torch.Tensor, batch: torch.Tensor) -> None:
    """Raise `FeatxError` for images that do not fit into a batch."""
    size, *shape = batch.shape
    if images.dtype not in (np.uint8, torch.uint8) or list(images.shape[1:]) != shape or not 0 < len(images) <= size:
        raise FeatxError(
            f"expected uint8 [B, {', '.join(map(str, shape))}] with 1 to {size} images, "
            f"got {images.dtype} {list(images.shape)}"
        )
