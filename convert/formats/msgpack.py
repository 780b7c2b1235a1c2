"""Flax's msgpack: a tree of maps, whose arrays are extensions that hold their shape, the name of their dtype and their bytes.

The file is walked once, header by header, each length checked against what is left; the bytes of an array are read when they
are needed. Written as {"params": tree}, which Flax restores, and beside it our metadata as JSON under "mixer_jax" and, under
"checksums", the CRC-32 of each array, or of each chunk of one that Flax splits, since the format has none.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from ..arrays import Array, Arrays, as_bytes, contiguous_parts
from ..byte_ranges import ByteRange, OpenFile, lazy_array
from ..dtypes import as_dtype
from ..errors import CheckpointError
from . import MOST_LEAVES, OUR_KEY, SIGNATURE, Content, is_ours, is_state

ARRAY, EXTENSIONS = 1, (1, 2, 3)  # Flax's types of extensions: arrays, complex numbers, NumPy scalars
CHUNKED = "__msgpack_chunked_array__"
CHUNK = 1 << 30  # bytes beyond which Flax splits an array, since msgpack ends at 2^32
DEEPEST, LONGEST_PATH = 64, 1000
OUR_NAMES = (OUR_KEY, "checksums", *SIGNATURE)
# First byte: kind, bytes of the length or count that follows (an extension's type comes after them), or a size that is fixed.
HEADERS = {0xC4 + i: ("bytes", 1 << i) for i in range(3)} | {0xC7 + i: ("extension", 1 << i) for i in range(3)}
HEADERS |= {0xD9 + i: ("text", 1 << i) for i in range(3)}
HEADERS |= {0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
SCALAR_SIZES = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {0xCC + i: 1 << i % 4 for i in range(8)}


@dataclass(frozen=True)
class _Item:
    """A value in the file: `count` bytes at `start`, or for maps and lists `count` entries that begin there."""

    kind: str
    start: int
    count: int
    extension: int = 0

    @property
    def end(self) -> int:
        return self.start if self.kind in ("map", "list") else self.start + self.count


class _File(OpenFile):
    """The items of a file of msgpack."""

    def item(self, at: int) -> _Item:
        """The item whose header is at this byte. Raises CheckpointError if it cannot fit into what is left of the file."""
        first = int(self.read(at, 1)[0])
        if first < 0x80 or first >= 0xE0 or first in SCALAR_SIZES:
            item = _Item("scalar", at, 1 + SCALAR_SIZES.get(first, 0))
        elif first < 0xC0:
            kind, length = (
                ("map", first & 15) if first < 0x90 else ("list", first & 15) if first < 0xA0 else ("text", first & 31)
            )
            item = _Item(kind, at + 1, length)
        elif 0xD4 <= first <= 0xD8:
            item = _Item("extension", at + 2, 1 << first - 0xD4, int(self.read(at + 1, 1)[0]))
        elif first in HEADERS:
            kind, width = HEADERS[first]
            length = int.from_bytes(self.read(at + 1, width).tobytes(), "big")
            typed = kind == "extension"
            item = _Item(kind, at + 1 + width + typed, length, int(self.read(at + 1 + width, 1)[0]) if typed else 0)
        else:
            raise CheckpointError(f"damaged: no value of msgpack begins at byte {at}")
        least = item.count * (2 if item.kind == "map" else 1)  # a byte for each entry of a list, two for each of a map
        if item.start + least > self.size:
            raise CheckpointError(f"truncated or damaged: {least} bytes announced at {at}, the file has {self.size}")
        return item

    def text(self, item: _Item) -> str:
        try:
            return self.read(item.start, item.count).tobytes().decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"damaged: the text at byte {item.start} is not UTF-8") from None

    def number(self, item: _Item) -> int:
        """A length or an index. Raises CheckpointError for whatever else stands there."""
        value = msgpack.unpackb(self.read(item.start, item.count).tobytes()) if item.kind == "scalar" else None
        if type(value) is not int or value < 0:
            raise CheckpointError(f"damaged: no length or index at byte {item.start}")
        return value


def read(path: Path) -> Content:
    file = _File(path)
    leaves = _leaves(file)
    texts = {name: file.text(leaves[name]) for name in OUR_NAMES if name in leaves and leaves[name].kind == "text"}
    ours = is_ours(texts) or OUR_KEY in leaves
    metadata, checksums = _ours(texts) if ours else (None, {})
    if ours:
        leaves = {name.removeprefix("params/"): leaf for name, leaf in leaves.items() if name not in OUR_NAMES}
    shapes = _shapes_of_chunked(file, leaves)
    stored: dict[str, list[_Item]] = {name: [] for name in shapes}
    for name in shapes:
        while (chunk := f"{name}/chunks/{len(stored[name])}") in leaves:
            stored[name].append(leaves.pop(chunk))
    stored |= {name: [item] for name, item in leaves.items() if item.extension == ARRAY}
    if ours and (wrong := stored.keys() ^ checksums.keys()):
        raise CheckpointError(f"{min(wrong)}: not what was written (CRC-32): fetch or write the file again")
    arrays: dict[str, Array] = {
        name: _array(file, name, items, shapes.get(name), checksums.get(name, [None] * len(items)))
        for name, items in stored.items()
    }
    state = [name for name, array in arrays.items() if is_state(array.shape, array.dtype)]
    others = [*state, *(name for name in leaves if name not in stored)]
    return Content({name: array for name, array in arrays.items() if name not in set(state)}, metadata, others, verified=ours)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = (name, array)
    checksums: dict[str, list[str]] = {}
    with open(path, "wb") as file:
        file.write(_PACKER.pack_map_header(1 + len(OUR_NAMES)) + _PACKER.pack("params"))
        _write_tree(file, tree, checksums)
        for entry in ({OUR_KEY: json.dumps(metadata), "checksums": json.dumps(checksums)} | SIGNATURE).items():
            file.write(b"".join(_PACKER.pack(text) for text in entry))


def _leaves(file: _File) -> dict[str, _Item]:
    """What is no map or list, and those that are empty, by path, "a/b"; the places in a list are numbers."""
    leaves: dict[str, _Item] = {}

    def walk(item: _Item, keys: tuple[str, ...]) -> int:
        """The end of an item."""
        if item.kind not in ("map", "list") or not item.count:
            name = "/".join(keys)
            if name in leaves or len(leaves) == MOST_LEAVES or len(name) > LONGEST_PATH:
                raise CheckpointError(
                    f"damaged: more than {MOST_LEAVES} entries, or {name[:100]!r} twice or with a name too long"
                )
            if item.kind == "extension" and item.extension not in EXTENSIONS:
                raise CheckpointError(f"{name}: an extension of type {item.extension}, which Flax does not write")
            leaves[name] = item
            return item.end
        if len(keys) == DEEPEST:
            raise CheckpointError(f"nested more than {DEEPEST} deep, which no checkpoint is")
        at, seen = item.start, set()
        for index in range(item.count):
            key = str(index)
            if item.kind == "map":
                key, at = _key(file, at)
            if key in seen:
                raise CheckpointError(f"damaged: the key {key!r} stands twice in {'/'.join(keys) or 'the file'}")
            seen.add(key)
            at = walk(file.item(at), (*keys, key))
        return at

    end = walk(file.item(0), ())
    if end != file.size:
        raise CheckpointError(f"damaged: {file.size - end} bytes follow after the end")
    return leaves


def _key(file: _File, at: int) -> tuple[str, int]:
    """The key at a byte, numbers as text, and where its value begins."""
    item = file.item(at)
    if item.kind not in ("text", "bytes"):
        return str(file.number(item)), item.end
    if item.count > LONGEST_PATH:
        raise CheckpointError(f"damaged: a key of {item.count} bytes")
    return file.text(item), item.end


def _ours(texts: Mapping[str, str]) -> tuple[Any, dict[str, list[int | None]]]:
    """Our metadata, and the CRC-32 of the chunks of each array."""
    try:
        checksums = json.loads(texts["checksums"])
        return json.loads(texts[OUR_KEY]), {name: [int(crc, 16) for crc in crcs] for name, crcs in checksums.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its metadata is damaged ({type(error).__name__}: {error})") from None


def _shapes_of_chunked(file: _File, leaves: dict[str, _Item]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays that Flax has split into chunks, by name. What says so is taken out of the leaves."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mark in [name for name in leaves if name.endswith(f"/{CHUNKED}")]:
        name = mark.removesuffix(f"/{CHUNKED}")
        shape: list[int] = []
        del leaves[mark]
        while (length := f"{name}/shape/{len(shape)}") in leaves:
            shape.append(file.number(leaves.pop(length)))
        shapes[name] = tuple(shape)
    return shapes


def _array(file: _File, name: str, items: list[_Item], shape: tuple[int, ...] | None, checksums: Sequence[int | None]) -> Array:
    """The array in one extension, or in the chunks of an array of this shape."""
    try:
        parts = [_part(file, item) for item in items]
        shape = parts[0][0] if shape is None and parts else shape or ()
        dtype = parts[0][1] if parts else np.dtype(np.uint8)
        size, size_limit = math.prod(shape) * dtype.itemsize, math.prod(n or 1 for n in shape) * dtype.itemsize
        if len({dtype for _, dtype, _ in parts}) != 1 or sum(data.count for *_, data in parts) != size or size_limit >= 1 << 62:
            raise CheckpointError(f"damaged: shape {shape} of {dtype} takes {size} bytes, which are not those that are there")
        if len(parts) != len(checksums):
            raise CheckpointError("not what was written (CRC-32): fetch or write the file again")
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    before = _checksum_before(shape, dtype)
    ranges = [ByteRange(file, data.start, data.count, crc, before=before) for (*_, data), crc in zip(parts, checksums)]
    return lazy_array(name, ranges[0] if len(ranges) == 1 else _Chunks(ranges), 0, shape, dtype)


def _part(file: _File, item: _Item) -> tuple[tuple[int, ...], np.dtype, _Item]:
    """Shape, dtype and bytes of an array in an extension."""
    whole = file.item(item.start)
    shape: list[int] = []
    lengths = file.item(whole.end)
    at = lengths.end
    if item.extension != ARRAY or (whole.kind, whole.count, lengths.kind) != ("list", 3, "list") or lengths.count > 32:
        raise CheckpointError("damaged: not an array of Flax")
    for _ in range(lengths.count):
        length = file.item(at)
        shape.append(file.number(length))
        at = length.end
    named = file.item(at)
    data = file.item(named.end)
    if named.kind not in ("text", "bytes") or named.count > 32 or data.kind not in ("text", "bytes") or data.end != item.end:
        raise CheckpointError("damaged: not an array of Flax")
    name = file.text(named)
    try:
        dtype = as_dtype(name)
    except ValueError:
        dtype = np.dtype(object)
    if dtype.hasobject or dtype.name != name or not dtype.itemsize:
        raise CheckpointError(f"damaged: an array of {name!r}")
    return tuple(shape), dtype, data


class _Chunks:
    """Ranges of bytes one after the other."""

    def __init__(self, ranges: list[ByteRange]):
        self._ranges = ranges

    def all(self) -> np.ndarray:
        whole, at = np.empty(sum(chunk.size for chunk in self._ranges), np.uint8), 0
        for chunk in self._ranges:
            whole[at : at + chunk.size] = chunk.all()
            at += chunk.size
        return whole

    def part(self, start: int, count: int) -> np.ndarray:
        pieces = [np.empty(0, np.uint8)]
        for chunk in self._ranges:
            low, high = max(start, 0), min(start + count, chunk.size)
            pieces += [chunk.part(low, high - low)] if low < high else []
            start -= chunk.size
        return np.concatenate(pieces)


_PACKER = msgpack.Packer()


def _write_tree(file: BinaryIO, tree: Mapping[str, Any], checksums: dict[str, list[str]]) -> None:
    file.write(_PACKER.pack_map_header(len(tree)))
    for key, value in tree.items():
        file.write(_PACKER.pack(key))
        if isinstance(value, dict):
            _write_tree(file, value, checksums)
        else:
            name, array = value
            checksums[name] = [f"{crc:08x}" for crc in _write_array(file, array)]


def _write_array(file: BinaryIO, array: Array) -> list[int]:
    """Write an array, in chunks if it is large, and return their checksums. One part of it is in memory at a time."""
    shape, dtype = tuple(map(int, array.shape)), array.dtype
    size, chunk = math.prod(shape) * dtype.itemsize, max(CHUNK // dtype.itemsize, 1) * dtype.itemsize
    sizes, crcs = [size], []
    if size > CHUNK:
        sizes = [min(chunk, size - at) for at in range(0, size, chunk)]
        front = {CHUNKED: True, "shape": {str(axis): length for axis, length in enumerate(shape)}}
        file.write(_PACKER.pack_map_header(3) + b"".join(_PACKER.pack(part) for entry in front.items() for part in entry))
        file.write(_PACKER.pack("chunks") + _PACKER.pack_map_header(len(sizes)))
    parts, rest = contiguous_parts(array), np.empty(0, np.uint8)
    for index, left in enumerate(sizes):
        file.write(_PACKER.pack(str(index)) if size > CHUNK else b"")
        lengths = [left // dtype.itemsize] if size > CHUNK else shape
        header = _PACKER.pack_array_header(3) + _PACKER.pack(lengths) + _PACKER.pack(dtype.name) + _sized(0xC4, left)
        file.write(_sized(0xC7, len(header) + left) + bytes([ARRAY]) + header)
        crc = _checksum_before(shape, dtype)
        while left:
            rest = rest if rest.size else as_bytes(next(parts))
            piece, rest = rest[:left], rest[left:]
            crc = zlib.crc32(piece, crc)
            file.write(piece)
            left -= piece.size
        crcs.append(crc)
    return crcs


def _sized(first: int, length: int) -> bytes:
    """The header of bytes (0xC4) or of an extension (0xC7), its length in one, two or four bytes."""
    power = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return bytes([first + power]) + length.to_bytes(1 << power, "big")


def _checksum_before(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return zlib.crc32(f"{dtype.name} {shape}".encode())
