"""safetensors: eight bytes of header length, a JSON header, the arrays' bytes back to back.

Written here rather than with the library of that name because that one wants every array in memory before it writes the
first; tests hold both against each other. In `__metadata__` are our metadata, as JSON under "mixer_jax", and the CRC-32 of each
array under "checksums", since the format has none of its own. In a file of another writer all of them are somebody else's.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, LazyArray, in_pieces, parts
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..files import OpenFile, Span
from . import OURS, SIGNED, Content, is_ours

DTYPES = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "C64": "complex64", "BOOL": "bool"}
DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
DTYPES |= {f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
LONGEST_HEADER = 100_000_000  # the library's own limit


def read(path: Path) -> Content:
    file = OpenFile(path)
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(LONGEST_HEADER, file.size - 8):
        raise CheckpointError(f"truncated or damaged: a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(file.read(8, length).tobytes(), object_pairs_hook=_no_name_twice)
        said = header.pop("__metadata__", {})
        arrays = {name: _entry(**entry) for name, entry in header.items()}
        ours = is_ours(said)
        metadata = json.loads(said[OURS]) if ours else None
        fingerprint = said["fingerprint"] if ours else None
        written = json.loads(said["checksums"]) if ours else {}
        checksums = {name: int(written[name], 16) if ours else None for name in arrays}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"a damaged safetensors header ({type(error).__name__}: {error})") from None

    reached, lazy = 0, {}
    for name, (dtype_name, shape, begin, end) in sorted(arrays.items(), key=lambda item: item[1][2:]):
        dtype = as_dtype(dtype_name)
        if begin != reached or end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(f"a damaged safetensors header: {name} has shape {shape} in bytes {begin} to {end}")
        span = Span(file, 8 + length + begin, end - begin, checksums[name])
        reached, lazy[name] = end, _lazy(name, span, shape, dtype)
    if 8 + length + reached != file.size:
        raise CheckpointError(f"truncated or damaged: {8 + length + reached} bytes announced, the file has {file.size}")
    return Content({name: lazy[name] for name in arrays}, metadata, fingerprint=fingerprint or None, verified=ours)


def write(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None, fingerprint: Callable[[], str] = lambda: ""
) -> None:
    """`fingerprint` is asked before the arrays are read and again after, for as many letters."""
    said = {"format": "pt"} if any("." in name for name in arrays) else {}  # what PyTorch's own loaders ask for
    said |= {OURS: json.dumps(metadata or {})}
    checksums = dict.fromkeys(arrays, 0)
    header: dict[str, Any] = {"__metadata__": said}
    codes, reached = {name: code for code, name in DTYPES.items()}, 0
    for name, array in arrays.items():
        end = reached + int(np.prod(array.shape)) * array.dtype.itemsize
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": [reached, end]}
        reached = end

    def front() -> bytes:  # as long before the checksums are known as after
        known = json.dumps({name: f"{crc:08x}" for name, crc in checksums.items()})
        header["__metadata__"] |= {"checksums": known, "fingerprint": fingerprint()} | SIGNED
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the arrays start aligned
        return struct.pack("<Q", len(text)) + text

    with open(path, "wb") as file:
        file.write(front())
        for name, _, values in parts(arrays):
            for piece in in_pieces(values):
                checksums[name] = zlib.crc32(piece, checksums[name])
                file.write(piece)
            del values
        file.seek(0)
        file.write(front())


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} in bytes {data_offsets}")
    return DTYPES[dtype], tuple(shape), begin, end


def _lazy(name: str, span: Span, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    def read(index: int | None) -> np.ndarray:
        try:
            if index is None:
                return span.all().view(dtype).reshape(shape)
            item = span.size // shape[0]
            return span.part(range(shape[0])[index] * item, item).view(dtype).reshape(shape[1:])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    def pieces() -> Iterator[np.ndarray]:
        try:
            yield from span.pieces()
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None

    return LazyArray(shape, dtype, read, pieces=pieces)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)
