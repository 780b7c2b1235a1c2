"""Metadata: what the arrays of a checkpoint cannot say, and its checked form in a file."""

__all__ = ["Metadata"]

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, get_args

from .config import Gelu, MixerConfig, Size, usual_depth
from .errors import CheckpointError
from .layouts import Layout
from .preprocessing import canonical


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Numerics, grid, preprocessing and class names.

    `image_size` is (height, width) in pixels; None means that the tokens form a square. `labels` has a name for each class.
    `preprocessing` names or describes how an image becomes an array (see `preprocessing.py`); None means unknown.
    `num_blocks` confirms a depth that no published Mixer of these widths has.
    """

    gelu: Gelu
    layer_norm_epsilon: float
    image_size: Size | None = None
    preprocessing: str | None = None
    labels: tuple[str, ...] | None = None
    num_blocks: int | None = None

    @classmethod
    def of_config(cls, config: MixerConfig, *, labels: Sequence[str] | None, preprocessing: str | None) -> Self:
        """Metadata of a model; a square grid and a usual depth are left out."""
        return cls(
            gelu=config.gelu,
            layer_norm_epsilon=float(config.layer_norm_epsilon),
            image_size=None if config.grid[0] == config.grid[1] else config.image_size,
            preprocessing=preprocessing,
            labels=None if labels is None else tuple(labels),
            num_blocks=None if usual_depth(config.sizes) in (None, config.num_blocks) else config.num_blocks,
        )

    @classmethod
    def default(cls, layout: Layout) -> Self:
        """What a file without metadata means: what the code that owns the layout's names computes."""
        return cls(gelu=layout.gelu, layer_norm_epsilon=layout.layer_norm_epsilon, preprocessing=layout.preprocessing)

    def updated(self, fields: Mapping[str, Any]) -> Self:
        """This with other fields, given as JSON has them. Raises CheckpointError for unknown names and illegal values."""
        if not isinstance(fields, Mapping) or (unknown := fields.keys() - self.as_json().keys()):
            what = ", ".join(sorted(map(str, unknown))) if isinstance(fields, Mapping) else repr(fields)
            raise CheckpointError(f"metadata that is not understood (written by a newer version?): {what}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        new = replace(self, **values)
        labels, size, preprocessing = new.labels, new.image_size, _canonical(new.preprocessing)
        faults = {
            "gelu": new.gelu not in get_args(Gelu),
            "layer_norm_epsilon": not (isinstance(new.layer_norm_epsilon, float) and 0 < new.layer_norm_epsilon < math.inf),
            "image_size": size is not None and not (_all(size, int) and len(size) == 2 and min(size) > 0),
            "preprocessing": new.preprocessing is not None and preprocessing is None,
            "labels": labels is not None and not _all(labels, str),
            "num_blocks": new.num_blocks is not None and not (type(new.num_blocks) is int and new.num_blocks > 0),
        }
        if any(faults.values()):
            wrong = ", ".join(f"{k} {getattr(new, k)!r}" for k, fault in faults.items() if fault)
            raise CheckpointError(f"metadata that makes no sense: {wrong}")
        return replace(new, preprocessing=preprocessing)

    def differences(self, other: "Metadata", fields: Sequence[str]) -> list[str]:
        """The fields in which the two differ, as "gelu: tanh against exact"."""
        return [f"{k}: {a} against {b}" for k in fields if (a := getattr(self, k)) != (b := getattr(other, k))]

    def as_json(self, *, beyond: "Metadata | None" = None) -> dict[str, Any]:
        """The fields as JSON has them; with `beyond`, only those that differ from it."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in fields.items() if beyond is None or getattr(self, k) != getattr(beyond, k)}


def add_checksum(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for a file, with a checksum of its own, since not every format has one for it."""
    return {**fields, "crc32": _crc(fields)} if fields else {}


def verify_checksum(metadata: Any) -> dict[str, Any]:
    """The fields of a file's metadata. Raises CheckpointError if its checksum does not agree."""
    if not isinstance(metadata, Mapping):
        raise CheckpointError(f"metadata that is not understood: {metadata!r}")
    fields = {name: value for name, value in metadata.items() if name != "crc32"}
    if "crc32" in metadata and metadata["crc32"] != _crc(fields):
        raise CheckpointError("its metadata is not what was written (CRC-32): fetch or write the file again")
    return fields


def _crc(fields: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def _canonical(preprocessing: Any) -> str | None:
    """None for what is no preprocessing."""
    try:
        return canonical(preprocessing) if isinstance(preprocessing, str) else None
    except CheckpointError:
        return None


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)
