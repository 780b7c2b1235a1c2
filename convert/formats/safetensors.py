"""safetensors: eight bytes of header length, a JSON header, the arrays' bytes back to back.

Written here rather than with the library of that name because that one wants every array in memory before it writes the
first; tests compare the two. `__metadata__` has our metadata, as JSON under "mixer_jax", and the CRC-32 of each array under
"checksums", since the format has none of its own. The metadata of other writers is ignored.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Arrays, as_bytes, contiguous_parts
from ..byte_ranges import ByteRange, OpenFile, Window, lazy_array
from ..dtypes import as_dtype
from ..errors import CheckpointError
from . import OUR_KEY, SIGNATURE, Content, is_ours

DTYPES = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "C64": "complex64", "BOOL": "bool"}
DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
DTYPES |= {f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
LONGEST_HEADER = 100_000_000  # the library's own limit


def read(path: Path) -> Content:
    return read_open(OpenFile(path))


def read_open(file: OpenFile | Window) -> Content:
    """Of an open file, or a part of one."""
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(LONGEST_HEADER, file.size - 8):
        raise CheckpointError(f"truncated or damaged: a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(file.read(8, length).tobytes(), object_pairs_hook=_no_name_twice)
        entries = header.pop("__metadata__", {})
        arrays = {name: _entry(**entry) for name, entry in header.items()}
        ours = is_ours(entries)
        metadata = json.loads(entries[OUR_KEY]) if ours else None
        stored = json.loads(entries["checksums"]) if ours else {}
        checksums = {name: int(stored[name], 16) if ours else None for name in arrays}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"a damaged safetensors header ({type(error).__name__}: {error})") from None

    reached, lazy = 0, {}
    for name, (dtype_name, shape, begin, end) in sorted(arrays.items(), key=lambda item: item[1][2:]):
        dtype = as_dtype(dtype_name)
        if begin != reached or end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(f"a damaged safetensors header: {name} has shape {shape} in bytes {begin} to {end}")
        values = ByteRange(file, 8 + length + begin, end - begin, checksums[name])
        reached, lazy[name] = end, lazy_array(name, values, 0, shape, dtype)
    if 8 + length + reached != file.size:
        raise CheckpointError(f"truncated or damaged: {8 + length + reached} bytes announced, the file has {file.size}")
    return Content({name: lazy[name] for name in arrays}, metadata, verified=ours)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    entries = {"format": "pt"} if any("." in name for name in arrays) else {}  # which PyTorch's own loaders require
    entries |= {OUR_KEY: json.dumps(metadata)} | SIGNATURE
    checksums = dict.fromkeys(arrays, 0)
    header: dict[str, Any] = {"__metadata__": entries}
    codes, reached = {name: code for code, name in DTYPES.items()}, 0
    for name, array in arrays.items():
        end = reached + int(np.prod(array.shape)) * array.dtype.itemsize
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": [reached, end]}
        reached = end

    def front() -> bytes:  # called twice; its length must not depend on the checksums, since it is rewritten in place
        entries["checksums"] = json.dumps({name: f"{crc:08x}" for name, crc in checksums.items()})
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the arrays start aligned
        return struct.pack("<Q", len(text)) + text

    with open(path, "wb") as file:
        file.write(front())
        for name, array in arrays.items():
            for values in contiguous_parts(array):
                checksums[name] = zlib.crc32(as_bytes(values), checksums[name])
                file.write(as_bytes(values))
        file.seek(0)
        file.write(front())


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} in bytes {data_offsets}")
    return DTYPES[dtype], tuple(shape), begin, end


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)
