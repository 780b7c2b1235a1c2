"""Labelled images as batches to train and evaluate on.

A training batch is a function of the seed and its number alone: not of the number of threads, nor of where a run began.
"""

__all__ = ["Batch", "Dataset", "EvaluationBatches", "Splits", "TrainingBatches", "open_dataset"]

import contextlib
import hashlib
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from convert import CheckpointError
from convert.config import Size

from ..images import cores, decode_ahead
from ..preprocess import ImageError, load_image, preprocessing_of
from .augment import OFFICIAL, Augmentation, mixed
from .packed import Packed
from .sources import Contents, Part, held_out, read_parts, some

REDRAWS = 100


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


@dataclass(frozen=True, eq=False)
class Batch:
    """`images` (b, h, w, c) are float32 as the model takes them. `labels` are int32 (b,), or after mixup float32 (b, classes).

    `mask` (b,) is float32: 1, or 0 where there is no image. `indices` (b,) say which images of the dataset they are; -1
    where there is none.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    indices: np.ndarray


@dataclass(eq=False, kw_only=True)
class TrainingBatches:
    """Endless batches of a dataset, each epoch in another order, each image varied: batch k is `batches[k]`.

    Pixels are scaled as `preprocessing` does. An image that cannot be read is listed by name in `unreadable` with the reason,
    and another one drawn in its place, the same one each time; with `on_unreadable="raise"` it is an ImageError. Of several
    processes each reads the images of its own `rows` of a batch, and leaves the others zero.
    """

    dataset: Dataset
    batch_size: int
    image_size: Size
    seed: int = 0
    augmentation: Augmentation = OFFICIAL
    preprocessing: str = "squash"
    on_unreadable: Literal["skip", "raise"] = "skip"
    threads: int | None = None
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.seed < 2**32:
            raise ValueError("batch_size must be at least 1 and seed from 0 to 2**32 - 1")
        self.unreadable: dict[str, str] = {}
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        self._rows = np.union1d(rows, self.batch_size - 1 - rows) if self.augmentation.mixup else rows
        self._images = epochs(len(self.dataset), self.seed).random_map(self._drawn)

    def __getitem__(self, step: int) -> Batch:
        return self._batch(step, map(self._images.__getitem__, self._indices(step)))

    def starting_at(self, step: int) -> Generator[Batch]:
        """Batch `step` and those after it. While one is used, the images of the next are decoded in threads.

        Each thread decodes a share of a batch at a time: for small images, handing them over one by one takes longer.
        """
        threads = self.threads or cores()
        shares = np.array_split(np.arange(len(self._rows)), max(1, min(threads, len(self._rows))))

        def decoded(task: tuple[int, np.ndarray]) -> list[tuple[np.ndarray, int]]:
            k, share = task
            indices = self._indices(k)
            return [self._images[indices[i]] for i in share]

        tasks = ((k, share) for k in itertools.count(step) for share in shares)
        parts = decode_ahead(decoded, tasks, threads=threads, count=threads)

        def batch(step: int) -> Batch:
            return self._batch(step, itertools.chain.from_iterable(itertools.islice(parts, len(shares))))

        batches = decode_ahead(batch, itertools.count(step), threads=1, count=1)
        with contextlib.closing(parts), contextlib.closing(batches):
            yield from batches

    def _indices(self, step: int) -> list[int]:
        return (step * self.batch_size + self._rows).tolist()

    def _drawn(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """The image of an index, or of another one if it cannot be read, varied; and which it is."""
        for _ in range(REDRAWS):
            try:
                image = self.dataset.image(index)
            except ImageError as error:
                name = self.dataset.names[index]
                if self.on_unreadable == "raise":
                    raise ImageError(f"{name}: {error}") from None
                self.unreadable[name] = str(error)
                index = int(rng.integers(len(self.dataset)))
            else:
                return self.augmentation.varied(image, self.image_size, rng), index
        listed = some([f"{name}: {error}" for name, error in sorted(self.unreadable.items())], "; ")
        raise ImageError(f"{REDRAWS} images in a row cannot be read: {listed}")

    def _batch(self, step: int, drawn: Iterator[tuple[np.ndarray, int]]) -> Batch:
        batch, scale = (
            _zeros(self.dataset, self.batch_size, self.image_size),
            preprocessing_of(self.preprocessing, self.dataset.channels),
        )
        for i, (pixels, index) in zip(self._rows, drawn):
            batch.images[i], batch.indices[i] = scale.scaled(pixels), index
        batch.labels[self._rows], batch.mask[self._rows] = self.dataset.labels[batch.indices[self._rows]], 1
        if not (alpha := self.augmentation.mixup):
            return batch
        one_hot = np.zeros((self.batch_size, len(self.dataset.classes)), np.float32)
        one_hot[np.arange(self.batch_size), batch.labels] = 1
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        images, labels = mixed(batch.images, one_hot, alpha, rng)
        return replace(batch, images=images, labels=labels)


@dataclass(eq=False, kw_only=True)
class EvaluationBatches:
    """Batches with every image of a dataset once, in its order, as `preprocessing` makes it; the last one is padded.

    An image that cannot be read is masked, and is listed by name in `unreadable` with the reason. Of several processes each
    reads the images of its own `rows` of a batch; the others are masked, with their indices and labels.
    """

    dataset: Dataset
    batch_size: int
    image_size: Size
    preprocessing: str = "squash"
    threads: int | None = None
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Generator[Batch]:
        threads, scale = self.threads or cores(), preprocessing_of(self.preprocessing, self.dataset.channels)
        rows = np.arange(self.batch_size) if self.rows is None else self.rows
        total, firsts = len(self.dataset), range(0, len(self.dataset), self.batch_size)
        shares = np.array_split(rows, max(1, min(threads, len(rows))))

        def decoded(indices: np.ndarray) -> list[np.ndarray | None]:
            return [self._pixels(i) for i in indices.tolist() if i < total]

        tasks = (first + share for first in firsts for share in shares)
        parts = decode_ahead(decoded, tasks, threads=threads, count=threads)
        with contextlib.closing(parts):
            for first in firsts:
                batch = _zeros(self.dataset, self.batch_size, self.image_size)
                used = slice(min(self.batch_size, total - first))
                batch.indices[used] = np.arange(first, first + used.stop)
                batch.labels[used] = self.dataset.labels[batch.indices[used]]
                images = itertools.chain.from_iterable(itertools.islice(parts, len(shares)))
                for row, pixels in zip(rows[rows < used.stop], images):
                    if pixels is not None:
                        batch.images[row], batch.mask[row] = scale.scaled(pixels), 1
                yield batch

    def _pixels(self, index: int) -> np.ndarray | None:
        try:
            return preprocessing_of(self.preprocessing).pixels(self.dataset.image(index), self.image_size)
        except ImageError as error:
            self.unreadable[self.dataset.names[index]] = str(error)
            return None


def grain() -> Any:
    """The package grain. Raises ImportError, naming the extra, where it is missing."""
    try:
        import grain
    except ModuleNotFoundError:
        raise ImportError("training needs grain: pip install 'mixer-jax[train]'") from None
    return grain


def epochs(count: int, seed: int) -> Any:
    """The indices of `count` images again and again, each time in another order, as a `grain.MapDataset`."""
    return grain().MapDataset.range(count).seed(seed).shuffle().repeat(None)


def _zeros(dataset: Dataset, size: int, image_size: Size) -> Batch:
    images = np.zeros((size, *image_size, dataset.channels), np.float32)
    return Batch(images, np.zeros(size, np.int32), np.zeros(size, np.float32), np.full(size, -1))


def _bytes(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1
