"""PyTorch's .pt: a state_dict, read with `weights_only=True` after the zip's own checksums, which torch does not look at.

Our metadata is the entry "mixer_jax" of `state_dict._metadata`, which `load_state_dict` ignores.
"""

import collections
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, LazyArray, contiguous
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..wrappers import flattened
from . import Content

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("reading and writing .pt needs PyTorch: pip install 'mixer-jax[torch]'") from None


def read(path: Path) -> Content:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory can fail in any way that parsing it can
        raise CheckpointError(f"truncated or damaged ({error}): fetch or write it again") from None
    if damaged:
        raise CheckpointError(f"{damaged}: its bytes are not the ones that were written (CRC-32): fetch or write it again")
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever an unpickler that trusts nothing comes upon
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"torch.load(weights_only=True) refuses it, and nothing else is tried: {reason}") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"holds a {type(state).__name__}, not a state_dict")
    metadata = getattr(state, "_metadata", None) or {}
    arrays, others = flattened(state)
    return Content(arrays, metadata.get("mixer_jax"), others)


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None) -> None:
    state = collections.OrderedDict((name, to_torch(array)) for name, array in arrays.items())
    said = {"mixer_jax": dict(metadata)} if metadata else {}
    state._metadata = collections.OrderedDict({"": {"version": 1}} | said)  # type: ignore[attr-defined]
    with open(path, "wb") as file:  # a Python file, so that a full disk is an OSError and not a C++ one
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of closing the zip, after what really happened
            raise error.__context__ or error from None


def from_torch(tensor: "torch.Tensor") -> LazyArray:
    """A tensor as an array of the same bits, bfloat16 included; its memory is shared, so do not write to it."""
    dtype = as_dtype(str(tensor.dtype).removeprefix("torch."))

    def read(index: int | None) -> np.ndarray:
        values = (tensor if index is None else tensor[index]).detach().cpu()
        if dtype.name == "bfloat16":
            return values.contiguous().view(torch.int16).numpy().view(dtype)
        return values.numpy()

    return LazyArray(tensor.shape, dtype, read)


def to_torch(array: Array) -> "torch.Tensor":
    """An array as a tensor of its own with the same bits."""
    values = np.require(contiguous(np.asarray(array)), requirements=["C", "W"])
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
