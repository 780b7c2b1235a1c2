"""Labelled images into shards that are read by index: for more images than a folder serves well."""

__all__ = ["check", "pack"]

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from convert import CheckpointError
from convert.atomic import atomic_write, write_bytes

from ..images import cores, decode_ahead
from ..preprocess import ImageError
from ..training.data import Dataset, Splits, whole_parts
from ..training.listing import changes, listed
from ..training.packed import INDEX, KIND, ROW, Records, crc32_of, is_packed, open_packed, open_part, shard_names, table_names
from ..training.sources import FOLDERS, Contents, read_parts, some

BEGUN = ".packing.json"
SHARD_IMAGES = 4_000  # the library takes 2 ns per image of a shard to find one of them
MOST_SHARDS = 500  # each is an open file while it is read
VERIFIED = 256  # records at a time
UNPADDED = "group_size:1,uncompressed"  # a record alone, as JPEG and PNG are compressed already
FILES = {name for part in FOLDERS.values() for name in table_names(part)}


def pack(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shard_images: int | None = None,
    threads: int | None = None,
    contents: Contents | None = None,
) -> dict[str, Any]:
    """Pack the images of `data`, which `open_dataset` opens, into the folder `out`; returns what its index.json says.

    `out` is then the same dataset as `data`: the same names, splits, batches and fingerprints. Files are packed byte for byte,
    readable or not; images that come as pixels are packed as PNG. A shard has `shard_images` of them, by default 4,000. The
    same call goes on where another was stopped. `contents` is `read_parts(data)` where that has been called already.
    Raises CheckpointError for a source that is not clear or has changed, and for a folder that holds anything else.
    """
    if "://" in str(out):
        raise CheckpointError(f"{out}: is an address, and shards are written to a folder: copy that when it is complete")
    out = Path(out)
    if out.resolve().is_relative_to(Path(data).resolve()) and Path(data).is_dir():
        raise CheckpointError(f"{out}: is in the folder of the images: give a folder outside of {data}")
    header, datasets = _planned(data, contents or read_parts(data), shard_images)
    try:
        with _locked(out):
            before = _before(out)
            if before is None:
                _begin(out, header, datasets)
            else:
                _require_same(out, before, header, datasets)
            if _write_shards(out, header, datasets, threads or cores()) or not (out / INDEX).exists():
                _write_json(out / INDEX, _with_files(out, header))
            (out / BEGUN).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # the library raises a RuntimeError for a full disk
        advice = "what was packed before is still there; with room and permission to write, the same command goes on"
        raise CheckpointError(f"{out}: cannot be written: {error}: {advice}") from None
    open_packed(out)
    return json.loads((out / INDEX).read_text())


def check(folder: str | os.PathLike[str], *, threads: int | None = None) -> dict[str, int]:
    """Read every image of a pack and compare its checksum: the number of images of each part. Raises CheckpointError."""
    if not is_packed(folder):
        raise CheckpointError(f"{folder}: holds no packed images")
    parts, damaged = open_packed(folder)[0], []
    for part, (images, _) in parts.items():

        def fault(index: int, images: Any = images) -> str:
            try:
                images.record(index)
            except ImageError as error:
                return f"{images.names[index]}: {error}"
            return ""

        faults = decode_ahead(fault, range(len(images.names)), threads=threads or cores(), count=VERIFIED)
        bar = tqdm(faults, desc=f"checking, {part}", total=len(images.names), unit="image", disable=None)
        damaged += [text for text in bar if text]
    if damaged:
        advice = "remove these shards and pack again with the same command, or copy the folder again"
        raise CheckpointError(f"{folder}: {_count(len(damaged))} damaged: {some(damaged, '; ')}: {advice}")
    return {part: len(images.names) for part, (images, _) in parts.items()}


def run(data: str, out: str | None, *, shard_images: int | None, threads: int | None) -> None:
    """The command `pack`: with `out` pack, else check the pack `data`; print what is there."""
    if out is None:
        images = check(data, threads=threads)
        print(f"{data}: {_listed(images)}: every one as it was packed")
        return
    index = pack(data, out, shard_images=shard_images, threads=threads)
    shards = [entry["bytes"] for part in index["parts"].values() for entry in part["shards"].values()]
    counts = {name: part["images"] for name, part in index["parts"].items()}
    number = "1 shard" if len(shards) == 1 else f"{len(shards):,} shards"
    print(f"{out}: {_listed(counts)} in {number}, {sum(shards) / 2**20:,.1f} MiB")


def _listed(images: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {part}" for part, count in images.items()) + " images"


def _count(images: int) -> str:
    return "1 image is" if images == 1 else f"{images:,} images are"


def _planned(data: Any, contents: Contents, shard_images: int | None) -> tuple[dict[str, Any], dict[str, Dataset]]:
    """What index.json begins with, which decides what goes into which shard; and the images of each part."""
    parts, classes = contents
    numbered = isinstance(parts["train"].labels, np.ndarray)
    if not numbered:
        classes = sorted({label for part in parts.values() for label in part.labels})
    datasets = whole_parts(data, contents, classes)
    total = sum(map(len, datasets.values()))
    header = {
        "kind": KIND,
        "shard_images": shard_images or max(SHARD_IMAGES, -(-total // MOST_SHARDS)),
        "numbered": numbered,
        "classes": classes,
        "parts": {name: {"images": len(part), "channels": part.channels} for name, part in datasets.items()},
    }
    return header, datasets


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    if out.is_file():
        raise CheckpointError(f"{out}: is a file: give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{out}: another process is packing into this folder") from None
    try:
        yield
    finally:
        lock.release()


def _before(out: Path) -> dict[str, Any] | None:
    """What a pack in this folder began with; None in a folder without anything else."""
    for path in (out / BEGUN, out / INDEX):
        if path.is_file():
            try:
                before = json.loads(path.read_bytes())
            except ValueError as error:
                raise CheckpointError(f"{path}: is not JSON: {error}: give a new folder") from None
            if not isinstance(before, dict) or before.get("kind") != KIND:
                raise CheckpointError(f"{path}: is not that of packed images of this version: give a new folder")
            return before
    if others := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".") and entry.name not in FILES):
        raise CheckpointError(f"{out}: holds something else ({some(others)}): give a new folder")
    return None


def _begin(out: Path, header: dict[str, Any], datasets: dict[str, Dataset]) -> None:
    """Write the tables, whose checksums of records are still 0."""
    for part, dataset in datasets.items():
        names = [os.fsencode(name) for name in dataset.names]
        table = np.zeros(len(names), ROW)
        table["name_end"] = np.cumsum([len(name) for name in names])
        table["label"], table["content"] = dataset.labels, dataset.contents
        rows = io.BytesIO()
        np.save(rows, table, allow_pickle=False)
        for name, content in zip(table_names(part), (rows.getvalue(), b"".join(names))):
            write_bytes(out / name, content, force=True)
    _write_json(out / BEGUN, header)


def _require_same(out: Path, before: dict[str, Any], header: dict[str, Any], datasets: dict[str, Dataset]) -> None:
    """Raise CheckpointError, naming what differs, unless the images and settings are those that the pack began with."""
    if (size := before.get("shard_images")) != header["shard_images"]:
        raise CheckpointError(
            f"{out}: has {size} images a shard, not {header['shard_images']}: --shard-images must be the same"
        )
    try:
        classes = before["classes"] or next(iter(datasets.values())).classes
        old = {}
        for name, part in before["parts"].items():
            packed = open_part(out, name, part["channels"], Records(_shards(out, name, part["images"], size)))
            labels = packed.table["label"].astype(np.int32)
            old[name] = Dataset(tuple(classes), packed.names, labels, part["channels"], packed=packed)
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
        raise CheckpointError(f"{out}: its tables are damaged ({error}): pack into a new folder") from None
    same = old.keys() == datasets.keys() and all(old[name].fingerprint == part.fingerprint for name, part in datasets.items())
    if not same:
        what = changes(listed(_splits(old)), _splits(datasets))
        raise CheckpointError(f"{out}: was begun with other images: {what}. Restore these, or pack into a new folder")


def _splits(datasets: dict[str, Dataset]) -> Splits:
    parts: dict[str, Any] = {"validation": None, "test": None} | datasets
    return Splits(**parts)


def _shards(out: Path, part: str, images: int, shard_images: int) -> dict[Path, dict[str, int]]:
    """The shards of a part, with the number of images of each."""
    firsts = range(0, images, shard_images)
    names = shard_names(part, len(firsts))
    return {out / name: {"images": min(shard_images, images - first), "bytes": 0} for name, first in zip(names, firsts)}


def _write_shards(out: Path, header: dict[str, Any], datasets: dict[str, Dataset], threads: int) -> bool:
    """Write the shards that are not there yet. Whether any was."""
    written = False
    with tqdm(total=sum(map(len, datasets.values())), desc="packing", unit="image", disable=None) as bar:
        for part, dataset in datasets.items():
            table = np.load(out / table_names(part)[0], mmap_mode="r+", allow_pickle=False)
            first = 0
            for path, shard in _shards(out, part, len(dataset), header["shard_images"]).items():
                rows = table[first : first + shard["images"]]
                if path.exists():
                    bar.update(len(rows))
                else:
                    _write_shard(path, dataset, first, rows, threads, bar)
                    written = True
                first += len(rows)
    return written


def _write_shard(path: Path, dataset: Dataset, first: int, rows: np.memmap, threads: int, bar: tqdm) -> None:
    """A shard and its rows of the table, which reach the disk before the shard has its name."""
    from array_record.python.array_record_module import ArrayRecordWriter

    sizes, checksums = [], []
    records = decode_ahead(lambda i: _record(dataset, i), range(first, first + len(rows)), threads=threads, count=2 * threads)
    size = int(rows["content"].sum()) if dataset.pixels is None and dataset.packed is None else 0  # unknown before it is PNG
    with atomic_write(path, size=size) as temporary, contextlib.closing(records):
        writer = ArrayRecordWriter(str(temporary), UNPADDED)
        for record in records:
            writer.write(record)
            sizes.append(len(record))
            checksums.append(zlib.crc32(record))
            bar.update()
        writer.close()
        rows["bytes"], rows["crc32"] = sizes, checksums
        _verify(temporary, rows)
        rows.flush()


def _verify(path: Path, rows: np.ndarray) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    for first in range(0, len(rows), VERIFIED):
        expected = rows[first : first + VERIFIED]
        records = reader.read(range(first, first + len(expected)))
        if [(len(record), zlib.crc32(record)) for record in records] != expected[["bytes", "crc32"]].tolist():
            raise OSError(f"{path}: what was written is not what is read back")
    reader.close()


def _record(dataset: Dataset, index: int) -> bytes:
    """What is packed of an image: its file, or its pixels as PNG."""
    name = dataset.names[index]
    try:
        if dataset.packed is not None:
            return dataset.packed.record(index)
        if dataset.pixels is not None:
            return _png(dataset.pixels[index])
        record = Path(dataset.root, name).read_bytes()
    except (OSError, ImageError) as error:
        advice = "make it readable or take it out"
        raise CheckpointError(f"{name}: cannot be packed: {error}: {advice}; the same command goes on") from None
    if len(record) != dataset.contents[index]:
        raise CheckpointError(f"{name}: changed while it was packed: leave the images as they are, and pack into a new folder")
    return record


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _with_files(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header with the sizes of all files, and the checksums of the tables."""
    parts = {}
    for name, part in header["parts"].items():
        tables = {file: {"bytes": (out / file).stat().st_size, "crc32": crc32_of(out / file)} for file in table_names(name)}
        shards = _shards(out, name, part["images"], header["shard_images"])
        sizes = {path.name: shard | {"bytes": path.stat().st_size} for path, shard in shards.items()}
        parts[name] = part | {"tables": tables, "shards": sizes}
    return header | {"parts": parts}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), force=True)
