"""File formats, one module each, whatever the layout inside.

A module has `read(path) -> Content`, lazy where the format allows it, and `write(path, arrays, metadata)`, which may leave
anything behind when it fails: the caller gives a temporary name. A format is recognised by its content when read, and
chosen by the ending of the name when written. torch and orbax are imported with the module that needs them.
"""

import importlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..arrays import Array
from ..errors import CheckpointError
from ..files import is_orbax

ENDINGS = {".npz": "npz", ".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".orbax": "orbax", "": "orbax"}


@dataclass(frozen=True)
class Content:
    """What a file holds: arrays by name, what it says of them besides (None if nothing), the paths of what is no array,
    the fingerprint it states, and whether every array is held against a checksum of the file when it is read."""

    arrays: Mapping[str, Array]
    metadata: Mapping[str, Any] | None = None
    others: Sequence[str] = ()
    fingerprint: str | None = None
    verified: bool = False


OURS = "mixer_jax"
SIGNED = {"written_by": OURS}


def is_ours(found: Any) -> bool:
    """Whether an entry OURS was written here, by that name or the signature beside it: one of the two may be damaged."""
    return isinstance(found, Mapping) and (OURS in found or found.items() >= SIGNED.items())


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with a checksum, since not every format has one for it."""
    return {**metadata, "crc32": _crc(metadata)} if metadata else {}


def unsealed(found: Any) -> dict[str, Any]:
    """Metadata without its checksum. Raises CheckpointError where the two do not agree."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"metadata that is not understood: {found!r}")
    metadata = {name: value for name, value in found.items() if name != "crc32"}
    if "crc32" in found and found["crc32"] != _crc(metadata):
        raise CheckpointError("its metadata is not what was written (CRC-32): fetch or write the file again")
    return metadata


def _crc(metadata: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}"


def for_reading(path: Path) -> str:
    """The name of the format that the file at `path` has, by its first bytes and its directory."""
    if path.is_dir():
        if is_orbax(path):
            return "orbax"
        raise CheckpointError("a folder, and not an Orbax checkpoint")
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError("an empty file")
    if start[7:9] == b"\0{":  # the end of a length that fits into a file, and JSON
        return "safetensors"
    if start.lstrip()[:1] == b"<":
        raise CheckpointError("a web page (HTML or XML), not a checkpoint: the download did not give the file")
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise CheckpointError(f"a truncated or damaged zip file ({error}): fetch or write it again") from None
        return "pt" if any(name.endswith("/data.pkl") for name in names) else "npz"
    if start.startswith(b"\x80"):
        raise CheckpointError("a bare pickle, which is never loaded: in PyTorch 1.6 or later, torch.save the state_dict")
    raise CheckpointError("neither .npz, .safetensors, .pt nor an Orbax folder")


def for_writing(path: Path) -> str:
    """The name of the format that the ending of `path` asks for."""
    try:
        return ENDINGS[path.suffix]
    except KeyError:
        known = ", ".join(ending for ending in ENDINGS if ending)
        raise CheckpointError(
            f"{path}: no format has the ending {path.suffix!r}: {known}, or none for an Orbax folder"
        ) from None


def module(name: str) -> ModuleType:
    """The module of a format. Raises ImportError, naming the extra to install, where its library is absent."""
    return importlib.import_module(f".{name}", __name__)
