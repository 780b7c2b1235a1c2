"""PyTorch's .pt: a state_dict, read with `weights_only=True` after the zip's own checksums, which torch does not check.

Our metadata is the entry "mixer_jax" of `state_dict._metadata`, which `load_state_dict` ignores.
"""

import collections
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arrays import Arrays
from ..byte_ranges import OpenFile
from ..errors import CheckpointError
from ..prefixes import carried, flattened
from ..tensors import to_torch
from . import OUR_KEY, Content
from .zip_directory import read_directory

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("reading and writing .pt needs PyTorch: pip install 'mixer-jax[torch]'") from None


def read(path: Path) -> Content:
    read_directory(path, OpenFile(path))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged member can fail in any way that inflating it can
        raise CheckpointError(f"truncated or damaged ({error}): fetch or write it again") from None
    if damaged:
        raise CheckpointError(f"{damaged}: its bytes are not the ones that were written (CRC-32): fetch or write it again")
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # a restricted unpickler can stop at anything
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"torch.load(weights_only=True) refuses it, and nothing else is tried: {reason[0]}") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"holds a {type(state).__name__}, not a state_dict")
    arrays, others = flattened(state)
    return Content(arrays, carried(state), others, verified=True)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    state = collections.OrderedDict((name, to_torch(array)) for name, array in arrays.items())
    entries = {OUR_KEY: dict(metadata)} if metadata else {}
    state._metadata = collections.OrderedDict({"": {"version": 1}} | entries)  # type: ignore[attr-defined]
    with open(path, "wb") as file:  # a Python file, so that a full disk is an OSError and not a C++ one
        try:
            torch.save(state, file)
        except RuntimeError as error:  # raised while the zip is closed; the cause is in its context
            raise error.__context__ or error from None
