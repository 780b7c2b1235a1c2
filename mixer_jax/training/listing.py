"""The images of a run as a list in its folder, so that a dataset that changed is named image by image."""

__all__ = ["changes", "listed"]

import gzip
import json
import zlib
from collections.abc import Iterator

from .data import Splits
from .sources import some

Image = tuple[str, str, int]  # its part, its class, and what `Dataset.contents` has for it


def listed(splits: Splits) -> bytes:
    """A line of JSON for each image: part, name, class, and size in bytes or CRC-32 of the pixels; gzipped."""
    lines = (json.dumps([part, name, label, content]) + "\n" for name, (part, label, content) in _images(splits))
    return gzip.compress("".join(lines).encode(), compresslevel=1, mtime=0)


def changes(before: bytes, splits: Splits) -> str:
    """What differs between the images of a list and those of now: how many, and the first three names."""
    try:
        rows = map(json.loads, gzip.decompress(before).splitlines())
        old: dict[str, Image] = {name: (part, label, content) for part, name, label, content in rows}
    except (OSError, EOFError, zlib.error, ValueError, TypeError):
        return "other images, and the list of those before is damaged"
    new = dict(_images(splits))
    both = [name for name in new if name in old]
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "of another class": [name for name in both if old[name][1] != new[name][1]],
        "of other content": [name for name in both if old[name][2] != new[name][2]],
    }
    if not any(kinds.values()):  # otherwise these follow from it
        kinds = {"in another part": [name for name in both if old[name][0] != new[name][0]]}
    texts = [f"{_count(names)} {kind} ({some(sorted(names))})" for kind, names in kinds.items() if names]
    return "; ".join(texts) or "the same images, with the classes in another order"


def _images(splits: Splits) -> Iterator[tuple[str, Image]]:
    for part, dataset in vars(splits).items():
        if dataset is not None:
            for name, label, content in zip(dataset.names, dataset.labels.tolist(), dataset.contents.tolist()):
                yield name, (part, dataset.classes[label], content)


def _count(names: list[str]) -> str:
    return "1 image" if len(names) == 1 else f"{len(names):,} images"
