"""Which weights these are: a fingerprint that no layout or format changes, and how two checkpoints differ."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import Arrays
from .config import MixerConfig
from .layouts import Layout
from .mapping import same_bytes, to_canonical
from .published import PUBLISHED


def fingerprint(arrays: Arrays, layout: Layout) -> str:
    """SHA-256 over canonical names, dtypes, shapes and bytes, as 64 hexadecimal digits; reads every array once."""
    digest = hashlib.sha256()
    for name, array in to_canonical(arrays, layout).items():
        values = np.ascontiguousarray(np.asarray(array))
        digest.update(f"{name} {values.dtype.name} {values.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def can_be(config: MixerConfig) -> list[str]:
    """The published files of these sizes. Their content is not known here, so none can be confirmed."""
    sizes = (config.variant, config.num_classes)
    return [name for name, file in PUBLISHED.items() if (file.variant, file.classes) == sizes]


@dataclass(frozen=True)
class Difference:
    """One canonical array that two checkpoints do not share; `largest` is None where shapes differ or one side has none."""

    name: str
    what: str
    largest: float | None = None


def differences(left: Arrays, right: Arrays) -> Iterator[Difference]:
    """Every array that is not bit-equal on both sides, both canonical, with the largest difference of its values."""
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield Difference(name, "only in the " + ("second" if name not in left else "first"))
        elif left[name].shape != right[name].shape:
            yield Difference(name, f"shape {left[name].shape} against {right[name].shape}")
        elif not same_bytes(left[name], right[name]):
            x, y = (np.asarray(side[name]).astype(np.float64) for side in (left, right))
            with np.errstate(invalid="ignore"):
                largest = float(np.abs(x - y).max())
            dtypes = left[name].dtype, right[name].dtype
            yield Difference(name, "values" if dtypes[0] == dtypes[1] else f"{dtypes[0]} against {dtypes[1]}", largest)
