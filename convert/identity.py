"""Which weights these are: a fingerprint that no layout or format changes, and how two checkpoints differ."""

__all__ = ["Difference", "can_be", "differences", "fingerprint"]

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .arrays import Arrays, as_bytes, contiguous, same_bytes
from .config import MixerConfig
from .layouts import Layout
from .mapping import to_canonical
from .published import PUBLISHED


def fingerprint(arrays: Arrays, layout: Layout) -> str:
    """Of weights in any layout; reads every array once."""
    return fingerprint_of({name: digest(np.asarray(array)) for name, array in to_canonical(arrays, layout).items()})


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """SHA-256, as 64 hexadecimal digits, over the canonical names and the digest of each array."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest(values: np.ndarray) -> str:
    """Dtype, shape and the SHA-256 of the bytes of a canonical array."""
    return f"{values.dtype.name} {values.shape} {hashlib.sha256(as_bytes(contiguous(values))).hexdigest()}"


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
