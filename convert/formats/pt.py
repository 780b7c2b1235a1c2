"""PyTorch's .pt: a state_dict, read with `weights_only=True` after the zip's own checksums, which torch does not check.

Our metadata is the entry "mixer_jax" of `state_dict._metadata`, which `load_state_dict` ignores. Trainers write objects beside
the weights; those of INERT are read as an empty placeholder, so nothing of their classes is imported or run.
"""

import collections
import re
import threading
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


INERT = (
    "argparse.Namespace",  # timm and many scripts: the arguments
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.core.multiarray.scalar",  # a metric
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "mmengine.logging.history_buffer.HistoryBuffer",
)


_LOCK = threading.Lock()  # torch has one list of names for all threads


class Inert:
    """Stands for an object of another library: takes whatever is given to it and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


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
        with _LOCK, torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # a restricted unpickler can stop at anything
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[:1] or [type(error).__name__]
        held = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        remedy = f"; it holds a {held[1]}: save the state_dict alone" if held else ""
        raise CheckpointError(
            f"torch.load(weights_only=True) refuses it, and nothing else is tried: {reason[0]}{remedy}"
        ) from None
    if not isinstance(state, Mapping):
        what = "an object of another library" if isinstance(state, Inert) else f"a {type(state).__name__}"
        raise CheckpointError(f"holds {what}, not a state_dict")
    arrays, others = flattened(state)
    inner = carried(state)
    return Content(arrays, inner.pop("", None), others, verified=True, inner=inner)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    state = collections.OrderedDict((name, to_torch(array)) for name, array in arrays.items())
    entries = {OUR_KEY: dict(metadata)} if metadata else {}
    state._metadata = collections.OrderedDict({"": {"version": 1}} | entries)  # type: ignore[attr-defined]
    with open(path, "wb") as file:  # a Python file, so that a full disk is an OSError and not a C++ one
        try:
            torch.save(state, file)
        except RuntimeError as error:  # raised while the zip is closed; the cause is in its context
            raise error.__context__ or error from None
