"""Labelled images in shards that are read by index: the format, and its reader. Nothing is unpickled.

| file in the folder | what it holds |
| --- | --- |
| `train-00000-of-00004.array_record` | image files byte for byte, a record each; images that were pixels are PNG |
| `train-table.npy` | a row (`ROW`) for each image, in the order of the records |
| `train-names.bin` | the names of the images, one after the other |
| `index.json` | classes, parts, and the size of every file; written last |

The other parts are called validation and test. Both tables are mapped into memory, and a shard is opened when first read.
"""

__all__ = ["INDEX", "KIND", "ROW", "Names", "Packed", "Records", "is_packed", "open_packed", "open_part"]

import hashlib
import io
import json
import mmap
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from convert import CheckpointError
from convert.atomic import atomic_write, write_bytes
from convert.download import cache_folder

from ..preprocess import ImageError

KIND = "mixer_jax packed images, version 1"
INDEX = "index.json"
SHARD = re.compile(r"(train|validation|test)-\d{5,}-of-\d{5,}\.array_record")
ROW = np.dtype(
    [
        ("name_end", "<i8"),  # where the image's name ends in the file of names; it begins where the one before ends
        ("label", "<i4"),  # number of the class
        ("crc32", "<u4"),  # of the record
        ("bytes", "<i8"),  # of the record
        ("content", "<i8"),  # what `Dataset.contents` has for the image in the source
    ]
)
AGAIN = "the command `pack` that wrote it writes what is missing, so remove what is damaged; or copy the folder again"


class Names(Sequence[str]):
    """Names of images, decoded when used. `indices` say which of those in the file, in their order."""

    def __init__(self, content: mmap.mmap, ends: np.ndarray, indices: np.ndarray):
        self._content, self._ends, self.indices = content, ends, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        at = int(self.indices[index])
        return os.fsdecode(self._content[int(self._ends[at - 1]) if at else 0 : int(self._ends[at])])

    def subset(self, indices: np.ndarray) -> "Names":
        return Names(self._content, self._ends, self.indices[indices])


@dataclass(frozen=True, eq=False)
class Packed:
    """Images of one part: names, rows of the table, and the files of the images by index."""

    names: Names
    table: np.ndarray
    channels: int
    records: "Records"

    @property
    def contents(self) -> np.ndarray:
        """What `Dataset.contents` had for these images when they were packed."""
        return self.table["content"][self.names.indices]

    def subset(self, indices: np.ndarray) -> "Packed":
        return replace(self, names=self.names.subset(indices))

    def record(self, index: int) -> bytes:
        """An image's file, byte for byte. Raises ImageError where it is damaged."""
        at = int(self.names.indices[index])
        row = self.table[at]
        try:
            record = self.records[at]
        except CheckpointError:  # a shard that cannot be copied
            raise
        except (RuntimeError, ValueError) as error:  # of the library, which has checksums as well
            raise ImageError(f"damaged in {self.records.shard(at)[0].name}: {str(error).partition(';')[0]}") from None
        if len(record) != row["bytes"] or zlib.crc32(record) != row["crc32"]:
            raise ImageError(f"damaged in {self.records.shard(at)[0].name}: its CRC-32 is not that in the table")
        return record

    def file(self, index: int) -> io.BytesIO:
        """The same to read from. Raises ImageError also where it is empty."""
        if not (record := self.record(index)):
            raise ImageError("the file is empty")
        return io.BytesIO(record)


PackedParts = tuple[dict[str, tuple[Packed, Sequence[str] | np.ndarray]], list[str] | None]


@dataclass(frozen=True)
class _Whole:
    """A shard, all of it: with these fields the library opens it when it is first read, instead of at once."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Records:
    """The records of shards by one index, from any thread. `shards` has images and bytes of each; `fetch` brings one here."""

    def __init__(self, shards: Mapping[Path, Mapping[str, int]], fetch: Callable[[Path, int], None] | None = None):
        try:
            from grain.sources import ArrayRecordDataSource
        except ModuleNotFoundError:
            raise ImportError("packed images need grain: pip install 'mixer-jax[train]'") from None
        counts = [shard["images"] for shard in shards.values()]
        whole = [_Whole(str(path), 0, count, count) for path, count in zip(shards, counts)]
        self._source = ArrayRecordDataSource(whole, {"max_parallelism": "0"})  # threads are the caller's
        self._files = [(path, shard["bytes"]) for path, shard in shards.items()]
        self._ends, self._fetch = np.cumsum(counts), fetch

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        if self._fetch is not None:
            self._fetch(*self.shard(index))
        return self._source[index]

    def shard(self, index: int) -> tuple[Path, int]:
        """The shard that has a record, and its size in bytes."""
        return self._files[int(np.searchsorted(self._ends, index, side="right"))]


def shard_names(part: str, count: int) -> list[str]:
    return [f"{part}-{i:05}-of-{count:05}.array_record" for i in range(count)]


def table_names(part: str) -> list[str]:
    return [f"{part}-table.npy", f"{part}-names.bin"]


def is_packed(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds packed images, be they complete or not. An address such as gs://bucket/images must."""
    if "://" in str(source):
        return True
    folder = Path(source)
    if not folder.is_dir():
        return False
    return any(map(SHARD.fullmatch, os.listdir(folder))) or KIND[:-1] in _start(folder / INDEX)


def _start(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(200)


def open_packed(source: str | os.PathLike[str]) -> PackedParts:
    """The images of each part with the class of each, by name or number, and the names of numbered classes if known.

    Sizes of all files are checked, and the checksums of the tables. From an address the tables are copied to a folder of the
    cache now, and each shard when one of its images is first read. Raises CheckpointError with every fault.
    """
    remote = _Remote(str(source)) if "://" in str(source) else None
    folder = remote.folder if remote else Path(source)
    index = _index(folder)
    try:
        return _opened(folder, index, remote)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: is damaged ({type(error).__name__}: {error}): {AGAIN}") from None


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the pack is not complete; the same command `pack` goes on") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}: {AGAIN}") from None
    kind = index.get("kind") if isinstance(index, dict) else None
    if kind != KIND:
        advice = "update mixer-jax, or pack the images again"
        raise CheckpointError(f"{path}: is of kind {kind!r}, and this version reads {KIND!r}: {advice}")
    return index


def _opened(folder: Path, index: dict[str, Any], remote: "_Remote | None") -> PackedParts:
    faults: list[str] = []
    if not index["parts"].keys() & {"train"}:
        raise KeyError("train")
    for name, part in index["parts"].items():
        if list(part["shards"]) != shard_names(name, len(part["shards"])) or list(part["tables"]) != table_names(name):
            raise KeyError(f"files of {name}")
        for file, entry in (part["tables"] | part["shards"]).items():
            if remote and file in part["tables"]:
                remote.fetch(folder / file, entry["bytes"])
            if remote is None or (folder / file).exists():
                faults += _faults(folder / file, entry)
    if faults:
        listed = "; ".join(faults[:3]) + (f"; ... ({len(faults)} faults)" if len(faults) > 3 else "")
        raise CheckpointError(f"{folder}: {listed}: {AGAIN}")
    parts: dict[str, tuple[Packed, Sequence[str] | np.ndarray]] = {}
    for name, part in index["parts"].items():
        shards = {folder / file: entry for file, entry in part["shards"].items()}
        packed = open_part(folder, name, part["channels"], Records(shards, remote.fetch if remote else None))
        if not len(packed.table) == part["images"] == len(packed.records):
            raise KeyError(f"images of {name}")
        labels = packed.table["label"]
        parts[name] = packed, labels if index["numbered"] else np.array(index["classes"], object)[labels].tolist()
    return parts, index["classes"] if index["numbered"] else None


def open_part(folder: Path, part: str, channels: int, records: Records) -> Packed:
    """The images of a part by its tables, which are mapped into memory."""
    rows, names = (folder / name for name in table_names(part))
    table = np.load(rows, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    with open(names, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if table.dtype != ROW or table.ndim != 1 or table["name_end"][-1] != len(content):
        raise KeyError(f"tables of {part}")
    return Packed(Names(content, table["name_end"], np.arange(len(table), dtype=np.int32)), table, channels, records)


def _faults(path: Path, entry: dict[str, int]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing"
    elif (size := path.stat().st_size) != entry["bytes"]:
        yield f"{path.name} is {'truncated' if size < entry['bytes'] else 'too long'}: {size} bytes of {entry['bytes']}"
    elif "crc32" in entry and crc32_of(path) != entry["crc32"]:
        yield f"{path.name} is damaged: its CRC-32 is not that in {INDEX}"


def crc32_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


class _Remote:
    """A pack at an address that fsspec opens. Its files are copied, whole or not at all, to `folder` in the cache."""

    def __init__(self, address: str):
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ImportError(f"{address} needs fsspec: pip install 'mixer-jax[train]'") from None
        self.address, self._lock = address.rstrip("/"), threading.Lock()
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
            index = self._files.cat_file(f"{self._root}/{INDEX}")
        except FileNotFoundError:
            raise CheckpointError(f"{self.address}/{INDEX} is missing: it is no folder that `pack` wrote") from None
        except Exception as error:  # every file system has its own
            raise CheckpointError(f"{self.address}: cannot be opened: {error}") from None
        self.folder = cache_folder() / "packed" / hashlib.sha256(index).hexdigest()[:16]
        if not (self.folder / INDEX).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / INDEX, index, force=True)
        print(f"{self.address}: shards are copied to {self.folder} when first read", file=sys.stderr)

    def fetch(self, path: Path, size: int) -> None:
        """Copy a file unless it is there. Raises CheckpointError, so that a lost connection is not an unreadable image."""
        if path.exists():
            return
        address = f"{self.address}/{path.name}"
        with self._lock:
            if path.exists():
                return
            try:
                with atomic_write(path, size=size, force=True) as temporary:
                    with self._files.open(f"{self._root}/{path.name}", "rb") as source, open(temporary, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    if (copied := temporary.stat().st_size) != size:
                        raise CheckpointError(f"{address}: {copied} bytes of {size}: copy or pack it again")
            except FileNotFoundError:
                raise CheckpointError(f"{address} is missing: copy or pack it again") from None
            except OSError as error:
                raise CheckpointError(f"{address}: cannot be copied to {path.parent}: {error}") from None
