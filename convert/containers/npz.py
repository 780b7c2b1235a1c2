"""NumPy's .npz: a zip of .npy members, read without ever unpickling, checked against the zip's CRC-32.

bfloat16 is stored as two-byte void ("|V2"), as big_vision does. What the arrays do not say stands in the zip's comment,
which np.load ignores.
"""

import contextlib
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import memory
from ..arrays import Array, LazyArray, in_pieces, parts
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..files import CHUNK, OpenFile, Span
from . import OURS, SIGNED, Content, is_ours
from .zips import Member, read_directory

MOST_DEFLATED = 1032  # no deflate stream grows by more, so a larger claim is a lie


def read(path: Path) -> Content:
    file = OpenFile(path)
    members, comment = read_directory(path, file)
    twice = [name for name, count in Counter(m.info.filename for m in members).items() if count > 1]
    if twice:
        raise CheckpointError(f"two members of one name: {', '.join(twice[:3])}")
    arrays = {}
    for member in members:
        try:
            arrays[member.info.filename.removesuffix(".npy")] = _lazy(_Npy(file, member))
        except CheckpointError as error:
            raise CheckpointError(f"{member.info.filename}: {error}") from None
    return Content(arrays, _said(comment), verified=True)


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None) -> None:
    """Members sorted by name and stored: byte for byte what np.savez writes of the same arrays in that order."""
    comment = json.dumps({OURS: metadata} | SIGNED).encode() if metadata else b""
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise CheckpointError(
            f"the labels take {len(comment)} bytes and an .npz has room for {zipfile.ZIP_MAX_COMMENT}: write .safetensors"
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive, contextlib.ExitStack() as opened:
        archive.comment = comment
        for name, i, values in parts({name: arrays[name] for name in sorted(arrays)}):
            if not i:  # the whole, or the first of the items
                array = arrays[name]
                stored_dtype = np.dtype("V2") if array.dtype.name == "bfloat16" else array.dtype
                header = {"descr": np.lib.format.dtype_to_descr(stored_dtype), "fortran_order": False, "shape": array.shape}
                opened.close()
                member = opened.enter_context(archive.open(f"{name}.npy", "w", force_zip64=True))
                np.lib.format.write_array_header_1_0(member, header)
            for piece in in_pieces(values):
                member.write(piece)
            del values


class _Npy:
    """One member of the zip: its bytes, inflated and checked."""

    def __init__(self, file: OpenFile, member: Member):
        info = member.info
        if not info.filename.endswith(".npy"):
            raise CheckpointError("not an array (.npy)")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError("encrypted, or compressed in a way that NumPy does not write")
        self.name, self.size, self.crc = info.filename, info.file_size, info.CRC
        self.stored = info.compress_type == zipfile.ZIP_STORED
        limit = info.compress_size if self.stored else info.compress_size * MOST_DEFLATED + CHUNK
        if self.size > limit:
            raise CheckpointError(f"claims {self.size} bytes, more than the file can hold")
        self.packed = Span(file, member.offset, info.compress_size, info.CRC if self.stored else None)

    def start(self, count: int) -> bytes:
        """The first bytes, unchecked."""
        packed = self.packed.file.read(self.packed.offset, min(count, self.packed.size))
        return packed.tobytes() if self.stored else self._inflate(zlib.decompressobj(-15), packed, count)

    def all(self) -> np.ndarray:
        """Every byte. Raises CheckpointError where they are not the ones that were written."""
        if self.stored:
            return self.packed.all()
        data, done, stream = memory.empty(self.size), 0, zlib.decompressobj(-15)
        for at in range(0, self.packed.size, CHUNK):
            packed = self.packed.part(at, min(CHUNK, self.packed.size - at)).tobytes()
            while packed and not stream.eof:
                piece = self._inflate(stream, packed, self.size - done + 1)
                if done + len(piece) > self.size:
                    raise CheckpointError("inflates to more than it says: damaged")
                data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done, packed = done + len(piece), stream.unconsumed_tail
        if zlib.crc32(data[:done]) != self.crc:
            raise CheckpointError("its bytes are not the ones that were written (CRC-32): fetch or write the file again")
        return data

    def part(self, start: int, count: int) -> np.ndarray:
        return self.packed.part(start, count) if self.stored else self.all()[start : start + count]

    @staticmethod
    def _inflate(stream: Any, packed: Any, most: int) -> bytes:
        try:
            return stream.decompress(packed, most)
        except zlib.error as error:
            raise CheckpointError(f"does not inflate ({error}): damaged") from None


def _lazy(member: _Npy) -> LazyArray:
    header = io.BytesIO(member.start(4096))
    try:
        version = np.lib.format.read_magic(header)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, stored_dtype = read_header(header)
    except Exception as error:  # a damaged header can fail in any way that parsing Python can
        raise CheckpointError(f"not an .npy array ({type(error).__name__}: {error})") from None
    if stored_dtype.hasobject:
        raise CheckpointError("an object array: loading it would run code from the file, so it is never loaded")
    start, count = header.tell(), int(np.prod(shape, dtype=object)) * stored_dtype.itemsize
    if min(shape, default=0) < 0 or start + count != member.size:
        raise CheckpointError(f"shape {shape} of {stored_dtype} takes {count} bytes, {member.size - start} are there")
    dtype = as_dtype("bfloat16") if stored_dtype.str == "|V2" else stored_dtype.newbyteorder("=")

    def values(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        array = data.view(dtype if stored_dtype.str == "|V2" else stored_dtype)
        array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
        return np.ascontiguousarray(array, dtype)

    def read(index: int | None) -> np.ndarray:
        try:
            if index is None or fortran:
                whole = values(member.all()[start:], shape)
                return whole if index is None else whole[index]
            item = count // shape[0]
            return values(member.part(start + range(shape[0])[index] * item, item), shape[1:])
        except CheckpointError as error:
            raise CheckpointError(f"{member.name}: {error}") from None

    def pieces() -> Iterator[np.ndarray]:
        skip = start
        try:
            for piece in member.packed.pieces():
                yield piece[skip:]
                skip = 0
        except CheckpointError as error:
            raise CheckpointError(f"{member.name}: {error}") from None

    as_it_lies = member.stored and not fortran and stored_dtype.newbyteorder("=") == stored_dtype
    return LazyArray(shape, dtype, read, pieces=pieces if as_it_lies else None)


def _said(comment: bytes) -> Mapping[str, Any] | None:
    """Our part of the zip's comment; anything else there is somebody else's remark."""
    try:
        found = json.loads(comment)
        return found[OURS] if is_ours(found) else None
    except (ValueError, KeyError, RecursionError) as error:
        # No CRC-32 covers it. Overwritten with zeros, as a failing disk does, it would say nothing of what it said.
        if isinstance(error, KeyError) or f'"{OURS}"'.encode() in comment or b"\0" in comment:
            raise CheckpointError(f"its zip comment is damaged ({type(error).__name__}: {error})") from None
        return None
