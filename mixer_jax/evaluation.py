"""What a model gets right: accuracies with their intervals, results by class, and which classes are taken for which."""

__all__ = ["Accuracy", "ClassResult", "Evaluation", "RealLabels", "best_classes"]

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from .labels import Labels

NORMAL_95 = 1.959963984540054  # 95 % of the standard normal distribution lie within plus or minus this

RealLabels = Sequence[Sequence[int]]  # the classes of each image by ReaL; an image without any is not counted


def best_classes(logits: np.ndarray, count: int = 5) -> np.ndarray:
    """The classes of the highest logits (..., classes), best first; of equal ones the lower index first."""
    return np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[..., :count]


@dataclass(frozen=True)
class Accuracy:
    """`low` and `high` are the 95 % confidence interval of `accuracy` (Wilson 1927)."""

    correct: int
    images: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, images: int) -> Self:
        accuracy, z2 = correct / images, NORMAL_95**2
        middle = accuracy + z2 / (2 * images)
        half = NORMAL_95 * math.sqrt(accuracy * (1 - accuracy) / images + z2 / (4 * images**2))
        low, high = ((middle + sign * half) / (1 + z2 / images) for sign in (-1, 1))
        return cls(correct, images, accuracy, max(low, 0.0), min(high, 1.0))


@dataclass(frozen=True)
class ClassResult:
    """How many of a class's images have it as the best class and among the best five, and its most frequent wrong class."""

    index: int
    name: str
    images: int
    top1: int
    top5: int
    taken_for: str | None
    taken_for_images: int


@dataclass(frozen=True)
class Evaluation:
    """`true` has the class of each image and `best` its five best classes, (images, 5); `names` are those of all classes.

    `matched_by` is how folders were matched to classes; `unreadable` has the error of each image that counts neither way.
    `real_labels` has the right classes of each image by ReaL, none where ReaL has none or was not asked for.
    """

    names: Labels
    preprocessing: str
    matched_by: str
    true: np.ndarray = field(repr=False)
    best: np.ndarray = field(repr=False)
    unreadable: Mapping[str, str]
    real_labels: RealLabels = field(default=(), repr=False)

    @property
    def top1(self) -> Accuracy:
        return Accuracy.of(int((self.best[:, 0] == self.true).sum()), len(self.true))

    @property
    def top5(self) -> Accuracy | None:
        """None for five classes or fewer."""
        correct = (self.best == self.true[:, None]).any(axis=1).sum()
        return Accuracy.of(int(correct), len(self.true)) if len(self.names) > 5 else None

    @property
    def real(self) -> Accuracy | None:
        """How often the best class is one of the image's ReaL labels, over images that have any; None if none has."""
        right = [best in classes for best, classes in zip(self.best[:, 0].tolist(), self.real_labels) if classes]
        return Accuracy.of(sum(right), len(right)) if right else None

    @property
    def confusion(self) -> Counter[tuple[int, int]]:
        """Images by (true class, predicted class)."""
        return Counter(zip(self.true.tolist(), self.best[:, 0].tolist()))

    def confusion_fractions(self, most: int) -> tuple[list[int], np.ndarray]:
        """The classes that occur, and the fraction of a true class's images (row) for each predicted class (column).

        Of more than `most` classes, neighbours have a row and a column in common.
        """
        occurring, places = np.unique(np.stack([self.true, self.best[:, 0]]), return_inverse=True)
        cells = min(len(occurring), most)
        counts = np.zeros((cells, cells))
        np.add.at(counts, tuple(places.reshape(2, -1) * cells // len(occurring)), 1)
        return occurring.tolist(), counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    @property
    def by_class(self) -> list[ClassResult]:
        """The classes that have images."""
        results, order = [], np.argsort(self.true, kind="stable")
        indices, starts = np.unique(self.true[order], return_index=True)
        for index, best in zip(indices.tolist(), np.split(self.best[order], starts[1:])):
            top1, top5 = best[:, 0] == index, (best == index).any(axis=1)
            wrong = Counter(sorted(best[~top1, 0].tolist())).most_common(1)  # of equally frequent ones the lower index
            taken_for, images = (self.names[wrong[0][0]], wrong[0][1]) if wrong else (None, 0)
            row = (len(best), int(top1.sum()), int(top5.sum()))
            results.append(ClassResult(index, self.names[index], *row, taken_for, images))
        return results

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them; `confusion` has rows of true class, predicted class and images."""
        return {
            "preprocessing": self.preprocessing,
            "matched_by": self.matched_by,
            "unreadable": len(self.unreadable),
            "top1": asdict(self.top1),
            "top5": asdict(self.top5) if self.top5 else None,
            "real": asdict(self.real) if self.real else None,
            "by_class": [asdict(row) for row in self.by_class],
            "confusion": [[*pair, images] for pair, images in sorted(self.confusion.items())],
        }
