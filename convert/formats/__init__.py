"""File formats, one module each, whatever the layout inside. FORMATS is the table of them.

Each module has `read(path) -> Content`, lazy where the format allows it, and `write(path, arrays, metadata)`, which may leave
an incomplete file when it fails: the caller gives a temporary name. A format is recognised by content when a file is read,
and chosen by the ending of the name when one is written. torch, orbax and tensorstore are imported where they are needed.
"""

import importlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, Arrays
from ..errors import CheckpointError


@dataclass(frozen=True)
class Content:
    """What a file holds: arrays by name, its metadata (None: it has none), and the paths of entries that are not arrays.

    `verified`: every array is checked against a checksum of the file when it is read. `inner` has the metadata of single sets
    of weights in the file, by their path.
    """

    arrays: Mapping[str, Array]
    metadata: Mapping[str, Any] | None = None
    others: Sequence[str] = ()
    verified: bool = False
    inner: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A row of FORMATS. `usual_layout` is the layout that other people's code expects in this format.

    `endings` are those that ask for the format when a file is written; one without endings is only read.
    `omits_defaults`: files by other writers carry no metadata, so a file of ours carries only what differs from the defaults
    of its layout where these are certain. `holds_variables`: an NNX model is restored from it with Variables as leaves, which
    have their arrays one level down.
    """

    name: str
    endings: tuple[str, ...]
    usual_layout: str
    is_folder: bool = False
    omits_defaults: bool = False
    holds_variables: bool = False

    def read(self, path: Path) -> Content:
        return self._module().read(path)

    def write(self, path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
        self._module().write(path, arrays, metadata)

    def _module(self) -> Any:
        """Raises ImportError, naming the package to install, if its library is missing."""
        return importlib.import_module(f".{self.name}", __name__)


FORMATS = {
    format.name: format
    for format in (
        Format("npz", (".npz",), "google", omits_defaults=True),
        Format("safetensors", (".safetensors",), "timm"),
        Format("pt", (".pt", ".pth"), "timm"),
        Format("msgpack", (".msgpack",), "google"),
        Format("orbax", ("", ".orbax"), "flax", is_folder=True, holds_variables=True),
        Format("bigvision", (), "google", is_folder=True),
    )
}


def format_for_writing(path: Path) -> Format:
    """The format that the ending of `path` asks for."""
    for format in FORMATS.values():
        if path.suffix in format.endings:
            return format
    known = ", ".join(ending for format in FORMATS.values() for ending in format.endings if ending)
    raise CheckpointError(f"{path}: no format has the ending {path.suffix!r}: use {known}, or none for an Orbax folder")


def format_of_file(path: Path) -> Format:
    """The format of the file at `path`, recognised by its first bytes or, for a zip, by its members."""
    if path.is_dir():
        if is_orbax(path) or any(path.glob("*/_METADATA")):
            return FORMATS["orbax"]
        if any(path.glob("*/.zarray")):
            return FORMATS["bigvision"]
        raise CheckpointError(
            "a folder in which no checkpoint is found: neither an Orbax checkpoint (_METADATA in it or in an item of it), nor "
            "steps of one (7, step_7, checkpoint_7), nor big_vision's checkpoint.bv-000000007: give the path of the checkpoint"
        )
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError("an empty file")
    if start[7:9] == b"\0{":  # the end of a header length that is smaller than 2^56, and JSON
        return FORMATS["safetensors"]
    if start.lstrip()[:1] == b"<":
        raise CheckpointError("a web page (HTML or XML), not a checkpoint: the download did not give the file")
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise CheckpointError(f"a truncated or damaged zip file ({error}): fetch or write it again") from None
        return FORMATS["pt" if any(name.endswith("/data.pkl") for name in names) else "npz"]
    if start.startswith(b"\x80"):
        raise CheckpointError("a bare pickle, which is never loaded: in PyTorch 1.6 or later, torch.save the state_dict")
    if is_msgpack(start):
        return FORMATS["msgpack"]
    raise CheckpointError("not a checkpoint: neither .npz, .safetensors, .pt, .msgpack nor an Orbax folder")


def is_msgpack(start: bytes) -> bool:
    """Whether a file that starts so can be a map of msgpack, with something in it."""
    return start[:1] in {*(bytes([first]) for first in range(0x81, 0x90)), b"\xde", b"\xdf"}


def is_orbax(path: Path) -> bool:
    names = ("_CHECKPOINT_METADATA", "_METADATA", "params/_METADATA")
    return any((path / name).is_file() for name in names)


MOST_LEAVES = 100_000  # in a tree of weights and optimiser state; the largest Mixer with Adam has some 1500


def is_state(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an array can only be a counter (it has no axes) or a random key of JAX (of uint32), and never a weight."""
    return shape == () or dtype == np.uint32


# Our metadata stands under OUR_KEY beside SIGNATURE, so that damage to one of the two is noticed.
OUR_KEY = "mixer_jax"
SIGNATURE = {"written_by": OUR_KEY}


def is_ours(entries: Any) -> bool:
    """Whether entries of a file were written here: by the key or by the signature, since one of the two may be damaged."""
    return isinstance(entries, Mapping) and (OUR_KEY in entries or entries.items() >= SIGNATURE.items())
