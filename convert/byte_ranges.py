"""Reading parts of a file: at a position, from one open handle, checked against their CRC-32."""

import math
import os
import threading
import weakref
import zlib
from typing import Protocol

import numpy as np

from .arrays import LazyArray
from .errors import CheckpointError

CHUNK = 1 << 20  # bytes read at a time where the whole is not needed


class OpenFile:
    """A file opened once for reading at positions. Safe across threads; closed with its last user."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the finalizer below
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes from `offset` as uint8. Raises CheckpointError if the file ends before."""
        if offset < 0:
            raise CheckpointError(f"damaged: it refers to byte {offset}")
        if offset + count > self.size:
            raise CheckpointError(f"truncated: {count} bytes wanted at {offset}, the file has {self.size}")
        buffer = np.empty(count, np.uint8)
        view, done = memoryview(buffer), 0
        while done < count:
            got = self._read_into(view[done:], offset + done)
            if not got:
                raise CheckpointError(f"truncated while it was read: {count} bytes wanted at {offset}")
            done += got
        return buffer

    def _read_into(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view) or 0


class Window:
    """A part of an open file, read as if it were a file."""

    def __init__(self, file: OpenFile, offset: int, size: int):
        self._file, self._offset, self.size = file, offset, size

    def read(self, offset: int, count: int) -> np.ndarray:
        """As `OpenFile.read`."""
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(f"truncated or damaged: {count} bytes wanted at {offset}, it has {self.size}")
        return self._file.read(self._offset + offset, count)


class ByteRange:
    """A range of bytes in a file. With `crc` (None: not known) it is verified when it is first read, whole or in part.

    `before` is the CRC-32 of what the checksum covers besides, ahead of these bytes.
    """

    def __init__(self, file: OpenFile | Window, offset: int, size: int, crc: int | None, *, before: int = 0):
        self.file, self.offset, self.size, self.crc, self.before = file, offset, size, crc, before
        self._verified = crc is None

    def all(self) -> np.ndarray:
        data = self.file.read(self.offset, self.size)
        if not self._verified:
            self._verify(zlib.crc32(data, self.before))
        return data

    def part(self, start: int, count: int) -> np.ndarray:
        if not self._verified:
            crc = self.before
            for at in range(0, self.size, CHUNK):
                crc = zlib.crc32(self.file.read(self.offset + at, min(CHUNK, self.size - at)), crc)
            self._verify(crc)
        return self.file.read(self.offset + start, count)

    def _verify(self, crc: int) -> None:
        if crc != self.crc:
            raise CheckpointError("its bytes are not the ones that were written (CRC-32): fetch or write the file again")
        self._verified = True


class Bytes(Protocol):
    def all(self) -> np.ndarray: ...
    def part(self, start: int, count: int) -> np.ndarray: ...


def lazy_array(name: str, source: Bytes, start: int, shape: tuple[int, ...], stored: np.dtype) -> LazyArray:
    """The array in C order that begins at byte `start` of a source, in native byte order. Errors have its name."""
    dtype, item_size = stored.newbyteorder("="), stored.itemsize * math.prod(shape[1:])

    def read(index: int | None) -> np.ndarray:
        try:
            at = None if index is None else start + range(shape[0])[index] * item_size
            data = source.all()[start:] if at is None else source.part(at, item_size)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return np.asarray(data.view(stored).reshape(shape if index is None else shape[1:]), dtype)

    return LazyArray(shape, dtype, read)
