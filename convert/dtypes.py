"""Dtypes by name, bfloat16 included, and those that weights can have."""

__all__ = ["WEIGHTS", "as_dtype", "weights_dtype"]

from typing import Any

import numpy as np

WEIGHTS = ("float16", "bfloat16", "float32", "float64")
SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def as_dtype(name: Any) -> np.dtype:
    """The NumPy dtype of a name, or of NumPy's, JAX's or PyTorch's own dtype. ml_dtypes has those that NumPy lacks."""
    name = str(name).removeprefix("torch.") if str(name).startswith("torch.") else name
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        try:
            return np.dtype(getattr(ml_dtypes, str(name)))
        except (AttributeError, TypeError):
            raise ValueError(f"no dtype {name!r}: one of {', '.join(WEIGHTS)}") from None


def weights_dtype(dtype: Any, name: str = "dtype") -> np.dtype:
    """The NumPy dtype of weights, also by a short name such as "bf16". Raises ValueError, naming `name`, for any other."""
    try:
        result = as_dtype(SHORT_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except ValueError:
        result = None
    if dtype is None or result is None or result.name not in WEIGHTS:
        raise ValueError(f"{name} must be one of {', '.join(WEIGHTS)}, not {dtype}")
    return result
