"""Weights inside larger trees: nested dictionaries, prefixes such as `params/`, an optimiser or EMA weights beside them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .arrays import Array, Arrays
from .errors import CheckpointError
from .mapping import is_block_name
from .tensors import from_torch, is_tensor

# Optimisers keep trees with the names of the weights. `opt/target/` is big_vision's name for the weights themselves.
NOT_WEIGHTS = ("opt/", "opt_state/", "optimizer/", "optimizer_state/")
WEIGHTS = ("opt/target/",)


def flattened(tree: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Array], list[str]]:
    """The NumPy, JAX and torch arrays of a nested dictionary by path, "a/b", and the paths of all other entries."""
    arrays: dict[str, Array] = {}
    others: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner, inner_others = flattened(value, f"{name}/")
            arrays |= inner
            others += inner_others
        elif is_tensor(value):
            if str(value.layout) != "torch.strided" or value.is_quantized:
                raise CheckpointError(f"{name}: a sparse or quantized tensor: save it after to_dense() or dequantize()")
            arrays[name] = from_torch(value)
        elif hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype):  # JAX's keys have their own
            arrays[name] = value
        else:
            others.append(name)
    return arrays, others


def nested(arrays: Arrays) -> dict[str, Any]:
    """The values as a nested dictionary: the path "a/b" becomes tree["a"]["b"]."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.asarray(array)
    return tree


def carried(tree: Mapping[Any, Any], key: str | None = None, path: str = "") -> Any:
    """The metadata of a state_dict of ours: of this one, or of one nested in it (under `key`, if given); else None."""
    own = (getattr(tree, "_metadata", None) or {}).get("mixer_jax")
    if own is not None and key in (None, path):
        return own
    inner = [carried(value, key, f"{path}/{name}".lstrip("/")) for name, value in tree.items() if isinstance(value, Mapping)]
    return next((metadata for metadata in inner if metadata is not None), None)


def unwrapped(arrays: Arrays, key: str | None = None) -> tuple[dict[str, Array], list[str]]:
    """The weights without their prefix, and notes for the user. Raises CheckpointError for several sets without `key`."""
    prefixes = sorted({prefix for name in arrays if (prefix := _prefix(name)) is not None})
    weights = [prefix for prefix in prefixes if not prefix.startswith(NOT_WEIGHTS) or prefix.startswith(WEIGHTS)]
    if key is not None:
        weights = [prefix for prefix in prefixes if prefix.rstrip("/.") == key]
        if not weights:
            raise CheckpointError(f"no weights under the key {key!r}: found {_keys(prefixes) or 'none under any'}")
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


def _prefix(name: str) -> str | None:
    """What precedes the name of a block's array in any layout; None if `name` does not end in one."""
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter in "/.")]
    return next((name[:start] for start in starts if is_block_name(name[start:])), None)


def _keys(prefixes: Iterable[str]) -> str:
    return ", ".join(prefix.rstrip("/.") or "(none)" for prefix in prefixes)
