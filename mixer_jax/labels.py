"""Names of classes: from a file, from the model, or those of an ImageNet; and the synsets of ImageNets."""

__all__ = ["IMAGENETS", "Labels", "class_names", "imagenet_names", "imagenet_synsets"]

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

IMAGENETS = {1000: "ImageNet-1k", 11_221: "ImageNet-21K-P", 21_843: "ImageNet-21k"}  # by number of classes
Labels = Sequence[str]


def class_names(num_classes: int, labels: Labels | None) -> Labels | None:
    """The labels; without any, the names of the ImageNet with that many classes, or None where there is none.

    So a model without labels is presumed to be of an ImageNet by its number of classes alone: one of 1000, 11,221 or 21,843
    other classes needs labels of its own. Raises ValueError unless each class has a label.
    """
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f"{len(labels)} labels for {num_classes} classes")
    return imagenet_names(num_classes) if labels is None and num_classes in IMAGENETS else labels


def imagenet_names(num_classes: int = 1000) -> Labels:
    """An English name for each class of the ImageNet with that many; two pairs of classes of ImageNet-1k share one.

    `data/README.md` says whose order of 21,843 and 11,221 classes this is; no released file could be run here to confirm it.
    """
    return _columns(num_classes)[1]


def imagenet_synsets(num_classes: int = 1000) -> Labels:
    """The WordNet synset of each class of the ImageNet with that many, such as n01440764."""
    return _columns(num_classes)[0]


@cache
def _columns(num_classes: int) -> tuple[Labels, Labels]:
    name = "imagenet1k.tsv" if num_classes == 1000 else "imagenet21k.tsv"
    rows = [line.split("\t") for line in (files("mixer_jax") / "data" / name).read_text(encoding="utf-8").splitlines()]
    if num_classes == 11_221:
        rows = [row for row in rows if row[2:] == ["P"]]
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows)
