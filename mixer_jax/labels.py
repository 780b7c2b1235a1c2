"""Names of classes: from a file, from the model, or those of ImageNet-1k; and ImageNet's synsets."""

__all__ = ["IMAGENET_CLASSES", "Labels", "class_names", "imagenet_names", "imagenet_synsets"]

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

IMAGENET_CLASSES = 1000
Labels = Sequence[str]


def class_names(num_classes: int, labels: Labels | None) -> Labels | None:
    """The labels, else ImageNet-1k's names for 1000 classes, else None. Raises ValueError unless each class has a label."""
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f"{len(labels)} labels for {num_classes} classes")
    return imagenet_names() if labels is None and num_classes == IMAGENET_CLASSES else labels


def imagenet_names() -> Labels:
    """An English name for each class of ImageNet-1k; two pairs of classes share one."""
    return _columns()[1]


def imagenet_synsets() -> Labels:
    """The WordNet synset of each class of ImageNet-1k, such as n01440764."""
    return _columns()[0]


@cache
def _columns() -> tuple[Labels, Labels]:
    text = (files("mixer_jax") / "data" / "imagenet1k.tsv").read_text(encoding="utf-8")
    synsets, names = zip(*(line.split("\t") for line in text.splitlines()))
    return synsets, names
