"""torch tensors <-> arrays of the same bits, bfloat16 included, sharing memory where that is possible."""

__all__ = ["from_torch", "is_tensor", "to_torch"]

from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, LazyArray, contiguous
from .dtypes import as_dtype

if TYPE_CHECKING:
    import torch


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor, decided without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def from_torch(tensor: "torch.Tensor") -> LazyArray:
    """A tensor as an array. Its memory is shared where the tensor is on the CPU, so do not write to it."""
    dtype = as_dtype(str(tensor.dtype))

    def read(index: int | None) -> np.ndarray:
        import torch

        values = (tensor if index is None else tensor[index]).detach().cpu()
        if dtype.name == "bfloat16":
            return values.contiguous().view(torch.int16).numpy().view(dtype)
        return values.numpy()

    return LazyArray(tensor.shape, dtype, read)


def to_torch(array: Array) -> "torch.Tensor":
    """An array as a tensor. It shares the memory of a writable NumPy array in C order; clone it to own it."""
    import torch

    values = np.require(contiguous(np.asarray(array)), requirements=["C", "W"])
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
