"""Dtypes by name, bfloat16 included, and what is legal for weights."""

import numpy as np

WEIGHTS = ("float16", "bfloat16", "float32", "float64")


def as_dtype(name: str | np.dtype | type) -> np.dtype:
    """The NumPy dtype of a name; bfloat16 and the like come from ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        try:
            return np.dtype(getattr(ml_dtypes, str(name)))
        except AttributeError:
            raise ValueError(f"no dtype {name!r}: one of {', '.join(WEIGHTS)}") from None
