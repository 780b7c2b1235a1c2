"""Dtypes by name, bfloat16 included, and what is legal for weights."""

from typing import Any

import numpy as np

WEIGHTS = ("float16", "bfloat16", "float32", "float64")


def as_dtype(name: Any) -> np.dtype:
    """The NumPy dtype of a name, of NumPy's, JAX's or PyTorch's own; bfloat16 and the like come from ml_dtypes."""
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
    """The NumPy dtype of what weights can be stored and computed in. Raises ValueError for any other."""
    try:
        found = as_dtype(dtype)
    except ValueError:
        found = None
    if dtype is None or found is None or found.name not in WEIGHTS:
        raise ValueError(f"{name} must be one of {', '.join(WEIGHTS)}, not {dtype}")
    return found
