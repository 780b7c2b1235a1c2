"""Batches of labelled images: for training endless and varied, for evaluation each image once.

A training batch is a function of the seed and its number alone: not of the number of threads, nor of where a run began. Images
are decoded in threads, each a share of a batch at a time: for small ones, handing them over one by one takes longer.
"""

__all__ = ["Batch", "EvaluationBatches", "TrainingBatches", "epochs", "grain"]

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from convert.config import Size

from ..images import cores, decode_ahead
from ..preprocess import ImageError, preprocessing_of
from .augment import OFFICIAL, Augmentation, mixed
from .data import Dataset
from .sources import some

REDRAWS = 100


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
        """Batch `step` and those after it. While one is used, the images of the next are decoded in threads."""
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
