"""ReaL: reassessed labels of ImageNet's validation images, none, one or several an image (Beyer et al. 2020)."""

__all__ = ["real_labels", "require_imagenet"]

import json
import os
import re
from collections.abc import Mapping, Sequence

from convert import CheckpointError

from ..evaluation import RealLabels
from ..labels import imagenet_synsets

IMAGES, CLASSES = 50_000, 1000
LARGEST = 8 << 20  # bytes of a file; the published one, real.json, has 0.4 MB
NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+", re.ASCII)


def real_labels(file: str | os.PathLike[str], images: Sequence[str]) -> RealLabels:
    """The ReaL labels of each image, which is called `ILSVRC2012_val_00000001.JPEG` and the like.

    Raises CheckpointError unless `file` is a list of 50,000 lists of classes of ImageNet-1k, in the order of these numbers, and
    has labels for one of the images.
    """
    labels = _read(file)
    matches = [NAME.fullmatch(os.path.basename(image)) for image in images]
    numbers = [int(match[1]) if match else 0 for match in matches]
    if wrong := [image for image, number in zip(images, numbers) if not 1 <= number <= IMAGES]:
        raise CheckpointError(
            f"{wrong[0]}: ReaL labels go by the number in a file name, from ILSVRC2012_val_00000001.JPEG to 00050000, and "
            f"{len(wrong)} of {len(images)} images are not called so: rename them as ImageNet does, or leave out --real"
        )
    selected = [labels[number - 1] for number in numbers]
    if not any(selected):
        raise CheckpointError(
            f"{file}: has no label for any of the {len(images)} images: give more images, or leave out --real"
        )
    return selected


def require_imagenet(folders: Mapping[str, int], num_classes: int, where: str) -> None:
    """Raises CheckpointError unless the model has 1000 classes and each folder is called by the synset of its class."""
    if num_classes != CLASSES:
        raise CheckpointError(f"ReaL labels are for the {CLASSES} classes of ImageNet-1k, and the model has {num_classes}")
    synsets = imagenet_synsets()
    if other := [name for name, i in folders.items() if synsets[i] != name]:
        fault = f"{where}: ReaL labels need folders called by synset, such as {synsets[0]}, and {len(other)} are not"
        raise CheckpointError(f"{fault}, such as {other[0]}: rename them, or leave out --real")


def _read(file: str | os.PathLike[str]) -> RealLabels:
    def wrong(fault: str) -> CheckpointError:
        return CheckpointError(f"{file}: {fault}: give the real.json of google-research/reassessed-imagenet")

    with open(file, "rb") as opened:
        text = opened.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise wrong(f"has more than {LARGEST >> 20} MiB, too many for ReaL labels")
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wrong(f"is not JSON ({error})") from None
    if not isinstance(labels, list) or len(labels) != IMAGES:
        size = f"{len(labels)} entries" if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise wrong(f"has {size} where ReaL labels are a list of {IMAGES:,}, one entry for each validation image")
    for number, classes in enumerate(labels, 1):
        if not isinstance(classes, list) or not all(type(i) is int and 0 <= i < CLASSES for i in classes):
            raise wrong(f"entry {number} is no list of classes from 0 to {CLASSES - 1}: {json.dumps(classes)[:60]}")
    return labels
