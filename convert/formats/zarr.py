"""Arrays that TensorStore stores in a folder as zarr: the leaves of Orbax and big_vision checkpoints.

TensorStore allocates what the metadata of an array announces, and ends the process where there is no such memory. So nothing is
read before what is announced has been compared with what lies in the folder.
"""

import json
import math
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from ..arrays import Array, LazyArray, as_bytes, contiguous
from ..byte_ranges import ByteRange, OpenFile, lazy_array
from ..errors import CheckpointError
from . import MOST_LEAVES, is_state

# Weights are noise, which no compressor shrinks by half. The zeros beside them (a new head, the moments of a new optimiser)
# shrink to nothing; a checkpoint with one byte of noise in a hundred passes, and so does a small one that has none.
MOST_BYTES_PER_BYTE, ALWAYS_ALLOWED = 100, 1 << 28
CODECS = {"bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zlib", "zstd"}  # a blosc chunk names its own size
KEPT = 1 << 27  # bytes of decoded arrays kept in memory where items are read one by one, since a chunk decodes as a whole


def zarr_arrays(
    specs: Mapping[str, dict[str, Any]], size: int, checksums: Mapping[str, str] | None = None
) -> tuple[dict[str, Array], list[str]]:
    """Lazy arrays for the TensorStore specs of leaves by name, and the names of counters and random keys among them.

    `size` is what `bytes_inside` says of their folder. With `checksums`, of all names, an array is verified when it is first
    read. Raises CheckpointError for metadata that announces more than the folder can hold.
    """
    if len(specs) > MOST_LEAVES:
        raise CheckpointError(f"{len(specs)} leaves: a checkpoint of a Mixer has fewer than {MOST_LEAVES}")
    with ThreadPoolExecutor(2) as threads:
        stores = dict(zip(specs, threads.map(_opened, specs.keys(), specs.values())))
    announced = sum(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store in stores.values())
    if announced > ALWAYS_ALLOWED + MOST_BYTES_PER_BYTE * size:
        raise CheckpointError(
            f"its metadata announces arrays of {announced} bytes, and there are {size} in the folder: damaged"
        )
    others = [name for name, store in stores.items() if is_state(store.shape, store.dtype.numpy_dtype)]
    room = _Room(KEPT)
    return {name: _lazy(name, store, room, checksums) for name, store in stores.items() if name not in set(others)}, others


def bytes_inside(folder: Path) -> int:
    """The size of all files below a folder. Raises CheckpointError for links out of it, and for what is no file."""
    root, size = folder.resolve(), 0
    for parent, folders, files in os.walk(root):
        for path in (Path(parent, name) for name in folders + files):
            if path.is_symlink() and not _leads_into(root, path):
                raise CheckpointError(f"{path.relative_to(root)}: a link that leads out of the folder: copy what it points to")
            if not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path.relative_to(root)}: neither a file nor a folder")
            size += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return size


def checksum(values: np.ndarray) -> str:
    """The CRC-32 of dtype, shape and values."""
    return f"{zlib.crc32(as_bytes(contiguous(values)), zlib.crc32(f'{values.dtype.name} {values.shape}'.encode())):08x}"


def reason(error: Exception) -> str:
    """The first line of an error's message, without TensorStore's own appendix."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec=")[0]


def _leads_into(root: Path, link: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # nothing is there, or a circle
        return False


def _opened(name: str, spec: Any) -> Any:
    """The store of a leaf. Honest writers store every chunk, zeros as well: one that is missing is an error when it is read."""
    try:
        store: Any = tensorstore.open(spec | {"fill_missing_data_reads": False}, open=True, read=True).result()
        codecs = set(re.findall(r'"(?:id|name)": "([^"]*)"', json.dumps(store.codec.to_json() if store.codec else {})))
    except Exception as error:  # whatever was underneath
        raise CheckpointError(f"{name}: TensorStore cannot open it: {reason(error)}") from None
    if codecs - CODECS:
        raise CheckpointError(f"{name}: compressed with {', '.join(codecs - CODECS)}, which neither JAX nor Orbax writes")
    for chunk in (store.chunk_layout.read_chunk.shape, store.chunk_layout.write_chunk.shape) if store.shape else ():
        if any(length > max(whole, 1) for length, whole in zip(chunk, store.shape)):
            raise CheckpointError(f"{name}: its metadata announces chunks of {chunk} in an array of {store.shape}: damaged")
    return store


class _Room:
    """Bytes of memory that are left for decoded arrays."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()

    def keep(self, name: str, values: np.ndarray) -> Array | None:
        """The array for further reading, in memory or else in a temporary file; None if there is no room on the disk either."""
        with self._lock:
            fits = values.nbytes <= self._size
            self._size -= values.nbytes if fits else 0
        if fits:
            values.flags.writeable = False
            return values
        try:
            with tempfile.NamedTemporaryFile(prefix="mixer-jax-") as file:  # its name is gone at the end of this block
                file.write(as_bytes(contiguous(values)))
                file.flush()
                return lazy_array(name, ByteRange(OpenFile(file.name), 0, values.nbytes, None), 0, values.shape, values.dtype)
        except OSError:
            return None


def _lazy(name: str, store: Any, room: _Room, checksums: Mapping[str, str] | None) -> LazyArray:
    verified, lock = checksums is None, threading.Lock()
    kept: Array | None = None

    def values(part: Any) -> np.ndarray:
        try:
            return part.read().result()
        except Exception as error:
            raise CheckpointError(f"{name}: TensorStore cannot read it: {reason(error)}") from None

    def whole() -> np.ndarray:
        nonlocal verified
        array = values(store)
        if checksums is not None and not verified and checksum(array) != checksums[name]:
            raise CheckpointError(f"{name}: not what was written (CRC-32): write or copy the folder again")
        verified = True
        return array

    def read(index: int | None) -> np.ndarray:
        nonlocal kept
        if index is None:
            return whole() if kept is None else np.asarray(kept)
        if verified and store.chunk_layout.read_chunk.shape[0] < store.shape[0]:
            return values(store[range(store.shape[0])[index]])
        with lock:
            if kept is not None:
                return kept[index]
            array = whole()
            kept = room.keep(name, array)
        return array[index]

    return LazyArray(store.shape, store.dtype.numpy_dtype, read)
