"""Linear probing: what the frozen body of a model gives for each image, computed once and kept in a file."""

__all__ = ["FeatureBatches", "Features", "FeaturesInOrder"]

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import CheckpointError
from convert.atomic import atomic_write

from ..inference import compiled
from ..model import MlpMixer
from .batches import Batch, EvaluationBatches, epochs
from .data import Dataset


@dataclass(frozen=True, eq=False)
class Features:
    """`values` (n, hidden) are the head's inputs for the images of a dataset, NaN for an image that cannot be read."""

    values: np.ndarray
    labels: np.ndarray
    unreadable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def cached(cls, file: Path, model: MlpMixer, dataset: Dataset, **options: Any) -> "Features":
        """Those in the file, or else computed by batches with these options of `EvaluationBatches`, and written there."""
        unreadable: dict[str, str] = {}
        if not file.exists():
            batches = EvaluationBatches(dataset=dataset, **options)
            values, features_of = [], compiled(model, MlpMixer.features)
            names = dataset.names
            for batch in tqdm(batches, desc=f"features, {file.stem}", unit="batch", disable=None):
                placed = batch.images if model.placement is None else model.placement.put(batch.images)
                features = np.array(features_of(placed))
                if (wrong := batch.indices[(batch.mask == 1) & ~np.isfinite(features).all(axis=1)]).size:
                    raise CheckpointError(f"the model gives NaN or infinity for {names[wrong[0]]}")
                features[batch.mask == 0] = np.nan
                values.append(features[batch.indices >= 0])
            unreadable = batches.unreadable
            file.parent.mkdir(exist_ok=True)
            array = np.concatenate(values)
            with atomic_write(file, size=array.nbytes, force=True) as temporary, open(temporary, "wb") as stream:
                np.save(stream, array, allow_pickle=False)
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        if values.shape != (len(dataset), model.config.hidden_dim):
            raise CheckpointError(f"{file}: holds {values.shape}, not features of {len(dataset)} images: remove it")
        return cls(values, dataset.labels, unreadable)

    def batch(self, indices: np.ndarray) -> Batch:
        """The features of these images."""
        features = self.values[indices]
        read = np.isfinite(features).all(axis=1)
        return Batch(np.where(read[:, None], features, 0), self.labels[indices], read.astype(np.float32), indices)


@dataclass(eq=False, kw_only=True)
class FeaturesInOrder:
    """Batches with the features of every image once; the last is padded. What was not read is masked."""

    features: Features
    batch_size: int

    @property
    def unreadable(self) -> dict[str, str]:
        return self.features.unreadable

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.features.labels)
        for first in range(0, count, self.batch_size):
            indices = np.arange(first, first + self.batch_size)
            batch = self.features.batch(np.minimum(indices, count - 1))
            yield replace(batch, mask=batch.mask * (indices < count))


@dataclass(eq=False, kw_only=True)
class FeatureBatches:
    """Endless batches of features that can be used, each epoch in another order: batch k depends on the seed and k alone."""

    features: Features
    batch_size: int
    seed: int = 0

    @property
    def unreadable(self) -> dict[str, str]:
        return self.features.unreadable

    def starting_at(self, step: int) -> Generator[Batch]:
        """Batch `step` and those after it."""
        used = np.flatnonzero(np.isfinite(self.features.values).all(axis=1))
        if not used.size:
            raise CheckpointError("none of the images to train on can be used")
        images = epochs(len(used), self.seed)
        for first in itertools.count(step * self.batch_size, self.batch_size):
            yield self.features.batch(used[[images[i] for i in range(first, first + self.batch_size)]])
