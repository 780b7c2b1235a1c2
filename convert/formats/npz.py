"""NumPy's .npz: a zip of .npy members, read without ever unpickling, checked against the zip's CRC-32.

bfloat16 is stored as two-byte void ("|V2"), as big_vision does. Our metadata is the zip's comment, which np.load ignores.
"""

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, Arrays, as_bytes, contiguous_parts, derived
from ..byte_ranges import CHUNK, ByteRange, OpenFile, lazy_array
from ..dtypes import as_dtype
from ..errors import CheckpointError
from . import OUR_KEY, SIGNATURE, Content, is_ours
from .zip_directory import Member, read_directory

MAX_DEFLATE_RATIO = 1032  # of any deflate stream: a header that announces more is wrong


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
    return Content(arrays, _metadata(comment), verified=True)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Members sorted by name, without compression: byte for byte what np.savez writes for the same arrays in that order."""
    comment = json.dumps({OUR_KEY: metadata} | SIGNATURE).encode() if metadata else b""
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise CheckpointError(
            f"the labels take {len(comment)} bytes and an .npz has room for {zipfile.ZIP_MAX_COMMENT}: write .safetensors"
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = comment
        for name in sorted(arrays):
            array = arrays[name]
            stored_dtype = np.dtype("V2") if array.dtype.name == "bfloat16" else array.dtype
            header = {"descr": np.lib.format.dtype_to_descr(stored_dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for values in contiguous_parts(array):
                    member.write(as_bytes(values))


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
        limit = info.compress_size if self.stored else info.compress_size * MAX_DEFLATE_RATIO + CHUNK
        if self.size > limit:
            raise CheckpointError(f"announces {self.size} bytes, more than the file can hold")
        self.packed = ByteRange(file, member.offset, info.compress_size, info.CRC if self.stored else None)

    def start(self, count: int) -> bytes:
        """The first bytes, unchecked."""
        packed = self.packed.file.read(self.packed.offset, min(count, self.packed.size))
        return packed.tobytes() if self.stored else self._inflate(zlib.decompressobj(-15), packed, count)

    def all(self) -> np.ndarray:
        """Every byte, verified."""
        if self.stored:
            return self.packed.all()
        data, done, stream = np.empty(self.size, np.uint8), 0, zlib.decompressobj(-15)
        for at in range(0, self.packed.size, CHUNK):
            packed = self.packed.part(at, min(CHUNK, self.packed.size - at)).tobytes()
            while packed and not stream.eof:
                piece = self._inflate(stream, packed, self.size - done + 1)
                if done + len(piece) > self.size:
                    raise CheckpointError("inflates to more bytes than announced: damaged")
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


def _lazy(member: _Npy) -> Array:
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
    dtype = as_dtype("bfloat16") if stored_dtype.str == "|V2" else stored_dtype
    if fortran:
        transposed = lazy_array(member.name, member, start, shape[::-1], dtype)
        return derived(transposed, shape, lambda values: np.asarray(values.T, order="C"))
    return lazy_array(member.name, member, start, shape, dtype)


def _metadata(comment: bytes) -> Mapping[str, Any] | None:
    """Our metadata in the zip's comment; None for a comment by another writer."""
    try:
        entries = json.loads(comment)
        return entries[OUR_KEY] if is_ours(entries) else None
    except (ValueError, KeyError, RecursionError) as error:
        # No CRC-32 covers the comment. Zeros, as a failing disk leaves them, would otherwise pass for another writer's comment.
        if isinstance(error, KeyError) or f'"{OUR_KEY}"'.encode() in comment or b"\0" in comment:
            raise CheckpointError(f"its zip comment is damaged ({type(error).__name__}: {error})") from None
        return None
