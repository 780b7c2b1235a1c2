"""Labelled images, and their parts to train on, to choose by, and for the end."""

__all__ = ["Dataset", "Splits", "open_dataset", "whole_parts"]

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from convert import CheckpointError

from ..preprocess import load_image
from .packed import Packed
from .sources import Contents, Part, held_out, read_parts, some


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of classes. `labels` (n,) are int32 indices into `classes`; `names` say which image is meant.

    The images are uint8 `pixels` (n, h, w, c), or `packed`, or else the files of these names below the folder `root`.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    channels: int
    root: str = ""
    pixels: np.ndarray | None = None
    use_exif: bool = False
    packed: Packed | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> np.ndarray:
        """An image, uint8 (h, w, channels), decoded now. Raises ImageError, which does not name it."""
        source: Any
        if self.packed is not None:
            source = self.packed.file(index)
        else:
            source = os.path.join(self.root, self.names[index]) if self.pixels is None else self.pixels[index]
        return load_image(source, channels=self.channels, use_exif=self.use_exif)

    def subset(self, indices: np.ndarray) -> "Dataset":
        """The images with these indices, in their order."""
        if self.packed is not None:
            packed = self.packed.subset(indices)
            return replace(self, names=packed.names, labels=self.labels[indices], packed=packed)
        pixels = None if self.pixels is None else self.pixels[indices]
        return replace(self, names=[self.names[i] for i in indices], labels=self.labels[indices], pixels=pixels)

    @cached_property
    def contents(self) -> np.ndarray:
        """What tells whether an image is still the same: the size of its file in bytes, or the CRC-32 of its pixels. (n,)"""
        if self.packed is not None:
            return self.packed.contents
        if self.pixels is None:
            return np.array([_bytes(os.path.join(self.root, name)) for name in self.names], np.int64)
        return np.array([zlib.crc32(image) for image in self.pixels], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the classes, and with an image's name, label, size in bytes, or pixels where these are in memory."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for name, label, content in zip(self.names, self.labels.tolist(), self.contents.tolist()):
            digest.update(os.fsencode(f"\0{name}\0{label}\0{content}"))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """The images to train on, to choose by, and for the end; `test` is None where the source sets none apart."""

    train: Dataset
    validation: Dataset
    test: Dataset | None


def open_dataset(
    source: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    use_exif: bool = False,
    contents: Contents | None = None,
) -> Splits:
    """A folder of class folders, or of train/, val/ and test/ with class folders each; a .csv or .tsv of path and label; a
    folder with CIFAR's binary files or MNIST's idx files, gzipped or not; "digits", scikit-learn's; or what `pack` made of
    any of these, in a folder or at an address such as gs://bucket/images.

    A table's header, if any, names the columns path and label; paths are relative to the table. CIFAR's Python version is made
    of pickles and refused. `classes` are those of a model's head, in its order; by default those of the source, sorted.
    `channels` are 1 or 3, by default the source's own, 3 for files. Without a validation part a fraction `validation` of each
    class is split off the training part by `seed`, whatever the order of the files. `contents` is `read_parts(source)` where
    that has been called already.
    Raises CheckpointError for a source whose classes or files are not clear. Image files are not opened here.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be above 0 and below 1, not {validation!r}")
    datasets = whole_parts(source, contents or read_parts(source), classes, channels=channels, use_exif=use_exif)
    train = datasets["train"]
    if "validation" in datasets:
        return Splits(train, datasets["validation"], datasets.get("test"))
    chosen = held_out(train.names, train.labels, validation, seed)
    if not chosen.any():
        raise CheckpointError(f"{source}: one image a class leaves none for validation: add images")
    return Splits(train.subset(np.flatnonzero(~chosen)), train.subset(np.flatnonzero(chosen)), datasets.get("test"))


def whole_parts(
    source: str | os.PathLike[str],
    contents: Contents,
    classes: Sequence[str] | None = None,
    *,
    channels: int | None = None,
    use_exif: bool = False,
) -> dict[str, Dataset]:
    """The parts as they are in the source; files are sorted by name."""
    parts, known = contents
    names, parts = _with_classes(source, parts, classes or known)
    datasets = {}
    for name, part in parts.items():
        own = part.packed.channels if part.packed else 3 if part.pixels is None else part.pixels.shape[3]
        labels = np.asarray(part.labels, np.int32)
        dataset = Dataset(names, part.names, labels, channels or own, part.root, part.pixels, use_exif, part.packed)
        if part.pixels is None and part.packed is None:
            dataset = dataset.subset(np.array(sorted(range(len(labels)), key=part.names.__getitem__)))
        datasets[name] = dataset
    return datasets


def _with_classes(
    source: str | os.PathLike[str], parts: dict[str, Part], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, Part]]:
    """The names of the classes, and the parts with labels that number them."""

    def unclear(fault: str) -> CheckpointError:
        return CheckpointError(f"{source}: {fault}")

    if isinstance(parts["train"].labels, np.ndarray):
        largest = max(int(np.max(part.labels)) for part in parts.values())
        names = tuple(classes or map(str, range(largest + 1)))
        if largest >= len(names):
            raise unclear(f"label {largest} is beyond the {len(names)} classes of the head")
    else:
        found = set(parts["train"].labels)
        numbers = all(name.isdecimal() for name in found)
        names = tuple(classes or sorted(found, key=lambda name: (int(name) if numbers else 0, name)))
        if repeated := sorted(name for name, count in Counter(names).items() if count > 1 and name in found):
            raise unclear(f"several classes of the head are called {some(repeated)}: give each its own name")
        index = {name: i for i, name in enumerate(names)}
        for which, part in parts.items():
            if unknown := sorted(set(part.labels) - index.keys()):
                where, remedy = ("of the head", "train a new head") if classes else ("to train on", "add images to train on")
                them, some_classes = ("it", "1 class") if len(unknown) == 1 else ("them", f"{len(unknown)} classes")
                fault = f"{some_classes} of the {which} images not among the classes {where}: {some(unknown)}"
                raise unclear(f"{fault}: leave {them} out, or {remedy}")
        parts = {which: replace(part, labels=np.array([index[name] for name in part.labels])) for which, part in parts.items()}
    return names, parts


def _bytes(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1
