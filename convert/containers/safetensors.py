"""safetensors: eight bytes of header length, a JSON header, the arrays' bytes back to back.

Written here rather than with the library of that name because that one wants every array in memory before it writes the
first; tests hold both against each other. Our metadata is the JSON string under "mixer_jax" in `__metadata__`.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, LazyArray
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..files import OpenFile
from . import Content

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
        arrays = {name: (DTYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        metadata = json.loads(said["mixer_jax"]) if "mixer_jax" in said else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"a damaged safetensors header ({type(error).__name__}: {error})") from None

    reached, lazy = 0, {}
    for name, (dtype_name, shape, begin, end) in sorted(arrays.items(), key=lambda item: item[1][2:]):
        dtype = as_dtype(dtype_name)
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        if not whole or begin != reached or end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(f"a damaged safetensors header: {name} has shape {shape} in bytes {begin} to {end}")
        reached, lazy[name] = end, _lazy(file, 8 + length + begin, shape, dtype)
    if 8 + length + reached != file.size:
        raise CheckpointError(f"truncated or damaged: {8 + length + reached} bytes announced, the file has {file.size}")
    return Content({name: lazy[name] for name in arrays}, metadata)


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None) -> None:
    said = {"format": "pt"} if any("." in name for name in arrays) else {}  # what PyTorch's own loaders ask for
    header: dict[str, Any] = {"__metadata__": said | ({"mixer_jax": json.dumps(metadata)} if metadata else {})}
    codes, reached = {name: code for code, name in DTYPES.items()}, 0
    for name, array in arrays.items():
        end = reached + int(np.prod(array.shape)) * array.dtype.itemsize
        header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays start aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8))


def _lazy(file: OpenFile, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    def read(index: int | None) -> np.ndarray:
        item = shape if index is None else shape[1:]
        count = int(np.prod(item)) * dtype.itemsize
        start = offset if index is None else offset + range(shape[0])[index] * count
        return file.read(start, count).view(dtype).reshape(item)

    return LazyArray(shape, dtype, read)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)
