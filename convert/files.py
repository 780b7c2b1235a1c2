"""Files: read at a position from one open handle, and written whole or not at all."""

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import memory
from .errors import CheckpointError

CHUNK = 1 << 18  # bytes, few enough to be worked on several times while they are in the processor's cache


class OpenFile:
    """A file opened once for reading at positions; safe across threads, closed with its last user."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the finalizer below
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int, seen: Callable[[memoryview], object] = lambda piece: None) -> np.ndarray:
        """`count` bytes from `offset` as uint8; `seen` gets them piece by piece.

        Raises CheckpointError where the file ends before.
        """
        if offset < 0:
            raise CheckpointError(f"damaged: it points at byte {offset}")
        buffer = memory.empty(max(0, min(count, self.size - offset)))
        view, done = memoryview(buffer), 0
        while done < len(view) and (got := self._read_at(offset + done, view[done : done + CHUNK])):
            seen(view[done : done + got])
            done += got
        if done != count:
            raise CheckpointError(f"truncated: {count} bytes wanted at {offset}, the file has {self.size}")
        return buffer

    def _read_at(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view) or 0


class Span:
    """Some bytes of a file, held against their CRC-32 (None: nobody gave one) when they are first read."""

    def __init__(self, file: OpenFile, offset: int, size: int, crc: int | None):
        self.file, self.offset, self.size, self.crc = file, offset, size, crc
        self._checked = crc is None

    def all(self) -> np.ndarray:
        if self._checked:
            return self.file.read(self.offset, self.size)
        crc = 0

        def add(piece: memoryview) -> None:
            nonlocal crc
            crc = zlib.crc32(piece, crc)

        data = self.file.read(self.offset, self.size, add)
        self._check(crc)
        return data

    def pieces(self) -> Iterator[np.ndarray]:
        """All of them, piece by piece; the last piece is followed by the check."""
        crc = 0
        for at in range(0, self.size, CHUNK):
            piece = self.file.read(self.offset + at, min(CHUNK, self.size - at))
            crc = zlib.crc32(piece, crc)
            yield piece
        if not self._checked:
            self._check(crc)

    def part(self, start: int, count: int) -> np.ndarray:
        """Some of them; the whole is checked the first time."""
        if not self._checked:
            for _ in self.pieces():
                pass
        return self.file.read(self.offset + start, count)

    def _check(self, crc: int) -> None:
        if crc != self.crc:
            raise CheckpointError("its bytes are not the ones that were written (CRC-32): fetch or write the file again")
        self._checked = True


@contextlib.contextmanager
def whole_or_nothing(path: str | os.PathLike[str], *, size: int, folder: bool = False, force: bool = False) -> Iterator[Path]:
    """A path to write a file to, or with `folder` a folder, which becomes `path` at the end of the block, or vanishes.

    Refused at once where the disk has no room for `size` bytes. A file has no name until it is done, where the system can do
    that, so even a killed process leaves nothing. Else, and for folders, it lies in a temporary folder beside `path`; what
    dead processes left there is removed first. The last step is one link or rename; the content has reached the disk by then.
    Without `force` an existing `path` is an error, also one that appears meanwhile. With `force` a file takes a file's place,
    and a folder the place of another Orbax checkpoint, never that of any other folder.
    """
    path = Path(path)
    _remove_abandoned(path)
    check_writable(path, force=force)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(f"{path}: needs {size / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left")
    with contextlib.ExitStack() as stack:
        unnamed = None if folder else stack.enter_context(_unnamed_file(path.parent))
        new = unnamed or stack.enter_context(_temporary_folder(path)) / "new"
        yield new
        sync(new)
        check_writable(path, force=force)
        if unnamed and force:  # only a rename replaces, and a rename takes a name
            new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            stack.callback(new.unlink, missing_ok=True)
            _link(unnamed, new)
        if folder and path.is_dir():
            path.rename(new.parent / "replaced")
        if folder or force:
            new.replace(path)
        else:
            _put_as_new(new, path)
        _sync(path.parent)


def check_writable(path: Path, *, force: bool) -> None:
    """Raise CheckpointError if `path` may not be written."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        if not (force and is_orbax(path)):
            raise CheckpointError(
                f"{path}: a folder is in the way"
                + (" (replace it with --force or force=True)" if is_orbax(path) else "; give a name that is free")
            )
        if path.suffix in (".npz", ".pt", ".pth", ".safetensors"):
            raise CheckpointError(f"{path}: a folder is in the way; give a name that is free")
    elif path.exists() and not force:
        raise CheckpointError(f"{path}: exists already (replace it with --force or force=True)")


def is_orbax(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").is_file() or (path / "params" / "_METADATA").is_file()


@contextlib.contextmanager
def _unnamed_file(folder: Path) -> Iterator[Path | None]:
    """A file in this folder that vanishes with the process unless it is linked. None where the system has no such thing.

    It is locked, as `_temporary_folder` is.
    """
    handle = None
    with contextlib.suppress(AttributeError, OSError):  # another system than Linux, a file system that cannot
        handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        _flock(handle)
    try:
        path = Path(f"/proc/self/fd/{handle}")
        yield path if path.exists() else None
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is gone in the end. A lock in it, which ends with the process, says that its writer lives."""
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = _locked(folder / "lock")
    with lock:
        try:
            yield folder
        except BaseException:
            for _ in range(5):  # the threads of Orbax's failed writer make it anew for a moment
                _remove(folder)
                time.sleep(0.05)
            raise
        finally:
            _remove(folder)


def _locked(path: Path) -> BinaryIO | None:
    """A new file, locked if the file system has locks. None if another writer took its folder for abandoned just before."""
    with contextlib.suppress(FileNotFoundError):
        lock = open(path, "wb")  # noqa: SIM115 - for the caller to close
        with contextlib.suppress(OSError):
            _flock(lock)
        if path.exists():
            return lock
        lock.close()
    return None


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders of `path` whose writer is dead. A folder that one was replacing is put back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # above all BlockingIOError: its writer lives
            inside = os.listdir(left) if left.is_dir() else []
            lock = left / "lock" if "lock" in inside else left
            if lock.is_file():
                _flock(stack.enter_context(open(lock, "rb+")), wait=False)
            if "replaced" in inside and not path.exists():
                (left / "replaced").rename(path)
            if inside:
                _remove(left)
            elif lock.is_file():
                left.unlink()
            else:  # unlike a tree's, this removal fails where its writer has just gone on
                left.rmdir()


def _flock(file: BinaryIO | int, *, wait: bool = True) -> None:
    import fcntl  # not on Windows

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(folder: Path) -> None:
    """Remove a folder, also one that a failed writer's threads go on writing into for a moment."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _put_as_new(new: Path, path: Path) -> None:
    try:
        _link(new, path)  # unlike a rename, fails where another writer was faster
    except FileExistsError:
        raise CheckpointError(f"{path}: appeared while it was being written; the other one is kept") from None
    except OSError:  # a file system without hard links
        new.rename(path)


def _link(new: Path, path: Path) -> None:
    """Give a file a name, also one that has none yet: only with a folder's handle does Python follow /proc to it."""
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(new, path.name, dst_dir_fd=parent, follow_symlinks=True)
    finally:
        os.close(parent)


def sync(path: Path) -> None:
    """Have a file, or a folder and all that is in it, reach the disk."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
