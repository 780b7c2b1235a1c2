"""What people wrap weights in: nested dictionaries, `params/`, `module.`, an optimiser or an average beside them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .arrays import Array, Arrays
from .errors import CheckpointError
from .mapping import is_block_name

# Trees that an optimiser keeps in the shape of the weights. `opt/target/` is big_vision's name for the weights themselves.
NOT_WEIGHTS = ("opt/", "opt_state/", "optimizer/", "optimizer_state/")
WEIGHTS = ("opt/target/",)


def flattened(tree: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Array], list[str]]:
    """The arrays of a nested dictionary by path, "a/b", and the paths of what is no array. NumPy, JAX or torch arrays."""
    arrays: dict[str, Array] = {}
    others: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner, inner_others = flattened(value, f"{name}/")
            arrays |= inner
            others += inner_others
        elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            from .containers.pt import from_torch

            arrays[name] = from_torch(value)
        elif hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype):  # JAX's keys have their own
            arrays[name] = value
        else:
            others.append(name)
    return arrays, others


def carried(tree: Mapping[Any, Any], key: str | None = None, path: str = "") -> Any:
    """The metadata that a state_dict of ours carries, itself or inside a dictionary, there under `key`; else None."""
    own = (getattr(tree, "_metadata", None) or {}).get("mixer_jax")
    if own is not None and key in (None, path):
        return own
    inner = [carried(value, key, f"{path}/{name}".lstrip("/")) for name, value in tree.items() if isinstance(value, Mapping)]
    return next((found for found in inner if found is not None), None)


def unwrapped(arrays: Arrays, key: str | None = None) -> tuple[dict[str, Array], list[str]]:
    """The weights alone, and what to tell about it. Raises CheckpointError where there are several and no `key` says which."""
    found = sorted({prefix for name in arrays if (prefix := _wrapper(name)) is not None})
    weights = [prefix for prefix in found if not prefix.startswith(NOT_WEIGHTS) or prefix.startswith(WEIGHTS)]
    if key is not None:
        weights = [prefix for prefix in found if prefix.rstrip("/.") == key]
        if not weights:
            raise CheckpointError(f"no weights under the key {key!r}: found {_keys(found) or 'none under any'}")
    if len(weights) > 1:
        raise CheckpointError(f"several sets of weights, {_keys(weights)}: say which with --key or key=")
    if weights in ([], [""]) and key is None:
        return dict(arrays), []
    (prefix,) = weights
    inside = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    notes = [f"weights taken from under {prefix!r}"] if prefix else []
    if left_out := [name for name in arrays if not name.startswith(prefix)]:
        some = ", ".join(sorted({name.partition("/")[0] for name in left_out})[:5])
        notes.append(f"{len(left_out)} other arrays left out: {some}")
    return inside, notes


def _wrapper(name: str) -> str | None:
    """What stands before the name of a block's array in any layout; None if there is no such name in it."""
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter in "/.")]
    return next((name[:start] for start in starts if is_block_name(name[start:])), None)


def _keys(prefixes: Iterable[str]) -> str:
    return ", ".join(prefix.rstrip("/.") or "(none)" for prefix in prefixes)
