"""Labelled images as they lie on disk: folders of classes, tables, the files of CIFAR and MNIST. Nothing is unpickled."""

__all__ = ["Contents", "Part", "held_out", "read_parts"]

import csv
import gzip
import hashlib
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange

from convert import CheckpointError

from ..images import class_folders
from .packed import Packed, is_packed, open_packed

FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
IDX = re.compile(r"(train|t10k)-(images|labels)([-.])idx([13])-ubyte(\.gz)?")
CIFAR_10, CIFAR_100 = "data_batch_1.bin", "train.bin"
CIFAR_PICKLES = {"data_batch_1", "batches.meta"}, {"train", "test", "meta"}
MOST_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for


@dataclass(frozen=True)
class Part:
    """Images by name and the name, or the number, of the class of each.

    The images are uint8 `pixels` (n, h, w, c), or `packed`, or else the files of these names below the folder `root`.
    """

    names: Sequence[str]
    labels: Sequence[str] | np.ndarray
    root: str = ""
    pixels: np.ndarray | None = None
    packed: Packed | None = None


Contents = tuple[dict[str, Part], list[str] | None]  # by train, validation and test; names of numbered classes if known


def read_parts(source: str | os.PathLike[str]) -> Contents:
    """What a source holds, with every image's class. Raises CheckpointError if that is not clear, or is one class."""
    parts, names = _read(source)
    classes = sorted(map(str, set(parts["train"].labels)))
    folded = Counter(name.casefold() for name in classes)
    if twice := [name for name in classes if folded[name.casefold()] > 1]:
        raise CheckpointError(f"{source}: class names that differ in case alone: {some(twice)}: rename or merge them")
    if len(classes) < 2:
        raise CheckpointError(f"{source}: has images of one class, and needs two or more")
    return parts, names


def _read(source: str | os.PathLike[str]) -> Contents:
    if source == "digits":
        return _digits()
    if is_packed(source):
        packed, classes = open_packed(source)
        return {name: Part(images.names, labels, packed=images) for name, (images, labels) in packed.items()}, classes
    path = Path(source)
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return _table(path), None
    if not path.is_dir():
        wrong = "neither a folder nor a .csv or .tsv file" if path.exists() else "no such file or folder"
        raise CheckpointError(f"{path}: {wrong}")
    files = {entry.name for entry in path.iterdir() if entry.is_file()}
    if any(IDX.fullmatch(name) for name in files):
        return _mnist(path, files), None
    if files & {CIFAR_10, CIFAR_100}:
        return _cifar(path, files)
    if any(pickles <= files for pickles in CIFAR_PICKLES):
        fault = "holds CIFAR as pickles, which can run any code and are not opened"
        raise CheckpointError(f"{path}: {fault}: download the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)")
    return _folder(path), None


def held_out(names: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which images are held out: about a `fraction` of each class, at least one and not all of it.

    An image's place is a hash of the seed and its name, so the order of the images does not matter, and images that are added
    leave most of the others where they are.
    """
    digests = (hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest() for name in names)
    places = np.fromiter(digests, "S32", len(names))  # half the memory of a list of bytes
    order = np.lexsort((places, labels))
    chosen = np.zeros(len(names), bool)
    for images in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        chosen[images[: min(len(images) - 1, max(1, round(fraction * len(images))))]] = True
    return chosen


def _folder(path: Path) -> dict[str, Part]:
    inside = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    known = inside & FOLDERS.keys()
    if "train" not in inside or known == {"train"} != inside:
        return {"train": _classes(path, path, empty=False)}
    if inside != known or len({FOLDERS[name] for name in known}) < len(known):
        names = ", ".join(sorted(inside))
        raise CheckpointError(f"{path}: its folders are not clear ({names}): leave train, and one each of val and test at most")
    return {FOLDERS[name]: _classes(path / name, path, empty=name != "train") for name in sorted(known)}


def _classes(folder: Path, root: Path, *, empty: bool) -> Part:
    folders = class_folders(folder)
    if not empty and (without := [name for name, images in folders.items() if not images]):
        raise CheckpointError(f"{folder}: no images in the class folders {some(without)}: fill or remove them")
    names = [Path(os.path.relpath(image, root)).as_posix() for images in folders.values() for image in images]
    return Part(names, [name for name, images in folders.items() for _ in images], str(root))


def _table(path: Path) -> dict[str, Part]:
    """A table of path and label: with a header the columns of these names, else its two columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path}: is not a table in UTF-8: {error}") from None
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    columns = [0, 1]
    if {"path", "label"} & set(header):
        if absent := [name for name in ("path", "label") if name not in header]:
            raise CheckpointError(f"{path}: no column {absent[0]}; its header is {', '.join(header)}")
        columns, rows = [header.index("path"), header.index("label")], rows[1:]
    else:
        header = ["path", "label"]
    faults = [f"line {line}: {len(row)} columns, not {len(header)}" for line, row in rows if len(row) != len(header)]
    if not faults:
        cells = [(line, os.path.normpath(row[columns[0]]), row[columns[1]]) for line, row in rows]
        faults += [f"line {line}: no label" for line, _, label in cells if not label]
        faults += [f"line {line}: no file {name}" for line, name, _ in cells if not (path.parent / name).is_file()]
        faults += [f"{name} is listed {n} times" for name, n in Counter(name for _, name, _ in cells).items() if n > 1]
    if faults or not rows:
        advice = "each line is a path, relative to this file, and a label; a header names these columns path and label"
        raise CheckpointError(f"{path}: {some(faults, '; ') or 'lists no images'}. {advice}")
    return {"train": Part([name for _, name, _ in cells], [label for *_, label in cells], str(path.parent))}


def _mnist(path: Path, files: set[str]) -> dict[str, Part]:
    found = {match.group(1, 2): match for name in sorted(files) if (match := IDX.fullmatch(name))}
    parts = {}
    for prefix, part in (("train", "train"), ("t10k", "test")):
        absent = [kind for kind in ("images", "labels") if (prefix, kind) not in found]
        if prefix == "t10k" and len(absent) == 2:
            continue
        if absent:
            raise CheckpointError(f"{path}: no file {prefix}-{absent[0]}-idx{3 if absent[0] == 'images' else 1}-ubyte or .gz")
        pixels = _idx(path / found[prefix, "images"][0], 3)
        labels = _idx(path / found[prefix, "labels"][0], 1)
        if len(labels) != len(pixels):
            raise CheckpointError(f"{path}: {len(pixels)} images and {len(labels)} labels in {prefix}: download them again")
        parts[part] = Part(_numbered(part, len(labels)), labels, pixels=pixels[..., None])
    return parts


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of uint8, gzipped or not."""
    compressed, start = path.suffix == ".gz", 4 * (1 + dimensions)
    opened = gzip.open if compressed else open
    try:
        with opened(path, "rb") as file:
            header = file.read(start)
            if len(header) < start or header[:4] != bytes((0, 0, 8, dimensions)):
                raise CheckpointError(f"{path}: is not an idx file of uint8 with {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size, most = math.prod(shape), path.stat().st_size * (MOST_DEFLATED if compressed else 1)
            data = file.read(size + 1) if size + start <= most else b""
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}: download it again") from None
    if size == 0 or len(data) != size:
        fault = "more" if len(data) > size else "fewer"
        raise CheckpointError(f"{path}: its header says {shape}, {size} bytes, and it holds {fault}: download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _cifar(path: Path, files: set[str]) -> Contents:
    ten = CIFAR_10 in files
    training = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else [CIFAR_100]
    test = "test_batch.bin" if ten else "test.bin"
    if absent := [name for name in [*training, test] if name not in files]:
        raise CheckpointError(f"{path}: CIFAR's files {', '.join(absent)} are missing")
    parts = {}
    for part, names in (("train", training), ("test", [test])):
        records = np.concatenate([_records(path / name, 1 if ten else 2) for name in names])
        pixels = rearrange(records[:, -3072:], "n (c h w) -> n h w c", c=3, h=32)
        parts[part] = Part(_numbered(part, len(records)), records[:, -3073], pixels=np.ascontiguousarray(pixels))
    listed = path / ("batches.meta.txt" if ten else "fine_label_names.txt")
    return parts, listed.read_text().split() if listed.is_file() else None


def _records(path: Path, labels: int) -> np.ndarray:
    size = labels + 3072
    if not path.stat().st_size or path.stat().st_size % size:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are not records of {size} bytes: download it again")
    return np.fromfile(path, np.uint8).reshape(-1, size)


def _digits() -> Contents:
    """scikit-learn's 1797 digits of 8 x 8; a fifth of each class is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ImportError("the digits need scikit-learn: pip install 'mixer-jax[demo]'") from None
    flat, labels = load_digits(return_X_y=True)
    pixels = rearrange((flat * 255 / 16).round().astype(np.uint8), "n (h w) -> n h w 1", h=8)
    names = _numbered("digits", len(labels))
    test = held_out(names, labels, 0.2, 0)
    chosen = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    return {part: Part([names[i] for i in at], labels[at], pixels=pixels[at]) for part, at in chosen.items()}, None


def _numbered(part: str, count: int) -> list[str]:
    return [f"{part}/{i}" for i in range(count)]


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first three of them."""
    return separator.join(names[:3]) + (f"{separator}..." if len(names) > 3 else "")
