"""Write files so that a crash leaves the old one or the new one: aside, fsynced, renamed, the folder fsynced."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# The most bytes of a file that is read whole: records and heads; networks, which one ONNX file of 2**31 bytes holds;
# checkpoints with the state of an optimizer.
MOST_BYTES, MOST_NETWORK_BYTES, MOST_CHECKPOINT_BYTES = 1 << 28, 1 << 31, 1 << 34
# A file that changed this shortly before it was looked at can change again without another timestamp
# (2 s on FAT, 1 s on old network file systems, 4-10 ms on ext4): its key is not remembered.
CLOCK_NS = 2_000_000_000
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# Leftovers of another machine are swept when they are older than this; writing a shard takes seconds.
FOREIGN_AGE = 24 * 3600.0
_ASIDE = re.compile(r"\.~([^~]*)~(\d+)~(\d+)~[^~]*\.tmp")  # host, process, when it started

Stat = tuple[int, int, int, int]
INT64 = 0x7FFF_FFFF_FFFF_FFFF


def open_plain(path: str | Path, *, follow: bool = True) -> io.FileIO:
    """Open a plain file for reading: no pipe, which may never end, no device, no folder. follow: links to one, too.

    Raises `OSError`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise OSError(errno.EINVAL, f"it is a {kind}, not a file", os.fspath(path))
    return io.FileIO(handle)


def read_plain(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a plain file of at most so many. Raises `OSError`."""
    with open_plain(path) as file, io.BufferedReader(file) as buffered:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", os.fspath(path))
        return buffered.read(size)


def write_atomic(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was: a crash at any moment gives one or the other.

    Missing folders are made. Raises `OSError`; the file aside is then removed.
    """
    make_folder(path.parent)
    write_chunks(path.parent, [data], lambda: path.name)


def write_chunks(folder: Path, chunks: Iterable[bytes | memoryview], name: Callable[[], str]) -> Path:
    """Write `chunks` aside in `folder`, make them durable, then rename them to `name()`.

    `name` is called after the last chunk, so that a file can be called by the hash of its content.
    """
    aside = folder / aside_name()
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(handle, view[: 1 << 30]) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        path = folder / name()
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        if isinstance(error, OSError) and error.filename is None:  # a handle's error names no file
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    sync_folder(folder)
    return path


def make_folder(folder: Path) -> None:
    """`mkdir -p`, durable: the entry of every folder made is fsynced."""
    made = []
    while not folder.is_dir():
        made.append(folder)
        folder = folder.parent
    for new in reversed(made):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside_name() -> str:
    """A name for an unfinished file: `.~host~process~start~random.tmp`; swept when its writer has died."""
    pid = os.getpid()
    return f".~{_host()}~{pid}~{_started(pid) or 0}~{secrets.token_hex(6)}.tmp"


def sweep(folder: Path) -> list[str]:
    """Remove what dead writers left aside in `folder`, and return its names; what live ones are writing stays.

    A writer on this machine is dead when no process has its number and start time. On other machines it
    counts as dead when its file is a day old.
    """
    swept = []
    with os.scandir(folder) as entries:
        leftovers = [(entry, found) for entry in entries if (found := _ASIDE.fullmatch(entry.name))]
    for entry, found in leftovers:
        host, pid, started = found.groups()
        with contextlib.suppress(OSError):  # another writer swept it, or this user may not remove it
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if _alive(int(pid), int(started)) if host == _host() else age <= FOREIGN_AGE:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
            swept.append(entry.name)
    return swept


@functools.cache
def _host() -> str:
    """This machine, this boot and this process namespace: within it a process number means one process."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    readable = re.sub(r"[^A-Za-z0-9.-]", "-", parts[0])[:40]
    return f"{readable}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:8]}"


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _alive(pid: int, started: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end it; leftovers stay until somebody removes them
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process
    now = _started(pid)
    return now is None or started == 0 or now == started


def stat_row(found: os.stat_result) -> Stat:
    """A file whose size, mtime and ctime (ns) and inode stay the same counts as unchanged.

    Inodes of more than 63 bits (ReFS) are cut to 63.
    """
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & INT64
