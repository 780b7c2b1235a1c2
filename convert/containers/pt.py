"""PyTorch's .pt: a state_dict, read with `weights_only=True` after the zip's own checksums, which torch does not look at.

Our metadata is the entry "mixer_jax" of `state_dict._metadata`, which `load_state_dict` ignores.
"""

import collections
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array, LazyArray, contiguous
from ..dtypes import as_dtype
from ..errors import CheckpointError
from ..files import OpenFile
from ..wrappers import carried, flattened
from . import OURS, Content
from .zips import Member, read_directory

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("reading and writing .pt needs PyTorch: pip install 'mixer-jax[torch]'") from None

STORAGE = re.compile(r"[^/]+/data/\d+")  # the members of the zip that hold tensors


def read(path: Path) -> Content:
    file = OpenFile(path)
    members, _ = read_directory(path, file)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged member can fail in any way that inflating it can
        raise CheckpointError(f"truncated or damaged ({error}): fetch or write it again") from None
    if damaged:
        raise CheckpointError(f"{damaged}: its bytes are not the ones that were written (CRC-32): fetch or write it again")
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever an unpickler that trusts nothing comes upon
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"torch.load(weights_only=True) refuses it, and nothing else is tried: {reason[0]}") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"holds a {type(state).__name__}, not a state_dict")
    arrays, others = flattened(state)
    return Content(_from_file(arrays, file, members), carried(state), others, verified=True)


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None) -> None:
    state = collections.OrderedDict((name, to_torch(array)) for name, array in arrays.items())
    said = {OURS: dict(metadata)} if metadata else {}
    state._metadata = collections.OrderedDict({"": {"version": 1}} | said)  # type: ignore[attr-defined]
    with open(path, "wb") as file:  # a Python file, so that a full disk is an OSError and not a C++ one
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of closing the zip, after what really happened
            raise error.__context__ or error from None


class TensorArray(LazyArray):
    """A tensor as an array that shares its memory."""

    def __init__(self, tensor: "torch.Tensor", dtype: np.dtype, read: Callable[[int | None], np.ndarray]):
        super().__init__(tensor.shape, dtype, read)
        self.tensor = tensor


def _from_file(arrays: Mapping[str, Array], file: OpenFile, members: list[Member]) -> Mapping[str, Array]:
    """The arrays read from the file where they are asked for: of a mapped file whatever was touched stays in memory.

    Tensors are told from each other by where they are mapped, which is sure only if every storage of the file is here.
    """
    tensors = [a.tensor for a in arrays.values() if isinstance(a, TensorArray) and a.tensor.layout == torch.strided]
    mapped = {storage.data_ptr(): storage.nbytes() for t in tensors if (storage := t.untyped_storage()).nbytes()}
    stored = {m.offset: m.info.file_size for m in members if STORAGE.fullmatch(m.info.filename) and m.info.file_size}
    first = min(mapped, default=0) - min(stored, default=0)
    if {address - first: size for address, size in mapped.items()} != stored:
        return arrays

    def in_file(array: Array) -> Array:
        if not (isinstance(array, TensorArray) and array.tensor.is_contiguous() and array.tensor.numel()):
            return array
        tensor, dtype = array.tensor, array.dtype

        def read(index: int | None) -> np.ndarray:
            part = tensor if index is None else tensor[index]  # a view, which reads nothing
            return file.read(part.data_ptr() - first, part.nbytes).view(dtype).reshape(part.shape)

        return LazyArray(array.shape, dtype, read)

    return {name: in_file(array) for name, array in arrays.items()}


def from_torch(tensor: "torch.Tensor") -> TensorArray:
    """A tensor as an array of the same bits, bfloat16 included; its memory is shared, so do not write to it."""
    dtype = as_dtype(str(tensor.dtype).removeprefix("torch."))

    def read(index: int | None) -> np.ndarray:
        values = (tensor if index is None else tensor[index]).detach().cpu()
        if dtype.name == "bfloat16":
            return values.contiguous().view(torch.int16).numpy().view(dtype)
        return values.numpy()

    return TensorArray(tensor, dtype, read)


def to_torch(array: Array) -> "torch.Tensor":
    """An array as a tensor of its own with the same bits."""
    values = np.require(contiguous(np.asarray(array)), requirements=["C", "W"])
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
