"""Weights inside larger trees: nested dictionaries, prefixes such as `params/`, an optimiser or EMA weights beside them."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .arrays import Array, Arrays
from .errors import CheckpointError
from .mapping import block_prefix, plain
from .tensors import from_torch, is_tensor

# Optimisers keep trees with the names of the weights, under names such as these (optax, Flax, PyTorch).
OPTIMISER = {"opt", "opt_state", "optimizer", "optimizer_state", "trace", "mu", "nu", "nu_max", "acc_grads", "sum_of_squares"}
OPTIMISER |= {"grad", "grad_acc", "grad_sum", "params0", "previous_gradient", "updates", "z"}
OPTIMISER |= {"v", "v_row", "v_col", "e_g", "e_x", "exp_avg", "exp_avg_sq", "momentum_buffer"}
OPTIMISER |= {"diff_params_memory", "diff_updates_memory"}
RANDOM = {"rng", "rngs"}  # keys of random numbers
TUPLE = re.compile(r"\('[^']*'(, '[^']*')*,?\)")  # a tuple of names as text, as Orbax writes it
TARGETS = ("opt/target/", "optimizer/target/")  # where Flax's optimisers of before Linen kept the weights themselves


def flattened(tree: Any, prefix: str = "") -> tuple[dict[str, Array], list[str]]:
    """The NumPy, JAX and torch arrays of a tree by path, "a/b", and the paths of all other entries.

    A tree is made of mappings, whose keys may be tuples, of dataclasses, and of lists and tuples, whose items are numbered
    unless they are named. Scalars are no arrays here, since no weight is one.
    """
    arrays: dict[str, Array] = {}
    others: list[str] = []
    for key, value in (_children(tree) or {}).items():
        name = prefix + ("/".join(map(str, key)) if isinstance(key, tuple) else TUPLE.sub(_joined, str(key)))
        if _children(value) is not None:
            inner, inner_others = flattened(value, f"{name}/")
            arrays |= inner
            others += inner_others
        elif is_tensor(value):
            if str(value.layout) != "torch.strided" or value.is_quantized:
                raise CheckpointError(f"{name}: a sparse or quantized tensor: save it after to_dense() or dequantize()")
            arrays[name] = from_torch(value)
        elif isinstance(getattr(value, "dtype", None), np.dtype) and len(value.shape):  # keys of JAX have dtypes of their own
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


def carried(tree: Any, path: str = "") -> dict[str, Any]:
    """The metadata of state_dicts of ours in a tree by their path, which is "" for the tree itself."""
    if not isinstance(tree, Mapping):
        return {}
    own = (getattr(tree, "_metadata", None) or {}).get("mixer_jax")
    found = {} if own is None else {path: own}
    for name, value in tree.items():
        found |= carried(value, f"{path}/{name}".lstrip("/"))
    return found


def metadata_for(key: str | None, by_path: Mapping[str, Any]) -> Any:
    """Of the metadata that `carried` finds that of the weights under a key; None where there is none for them."""
    wanted = "" if key is None else f"{plain(key).strip('/')}/"
    paths = [path for path in by_path if f"{path}/".startswith(wanted) or wanted.startswith(f"{path}/") or not path]
    exact = [path for path in paths if f"{path}/" == wanted]
    return by_path[(exact or paths)[0]] if exact or len(paths) == 1 else None


def unwrapped(arrays: Arrays, others: Iterable[str], key: str | None = None) -> tuple[dict[str, Array], str, list[str]]:
    """The weights without their prefix; the prefix; and what else there is, as "opt (24 arrays)" and "step".

    `others` are paths of entries that are not arrays. Raises CheckpointError for several sets of weights without `key`.
    """
    found = sorted({prefix for name in arrays if (prefix := block_prefix(name)) is not None})
    weights = [prefix for prefix in found if not _is_optimiser(plain(prefix))]
    if key is not None:
        wanted, keys = plain(key).strip("/"), {prefix: plain(prefix).strip("/") for prefix in found}
        weights = [prefix for prefix in found if keys[prefix] == wanted]
        weights = weights or [prefix for prefix in found if keys[prefix].startswith(f"{wanted}/")]
        if not weights:
            raise CheckpointError(f"no weights under the key {key!r}: found {_keys(found) or 'none under any'}")
    if len(weights) > 1:
        raise CheckpointError(f"several sets of weights, {_keys(weights)}: say which with --key or key=")
    if found and not weights:
        raise CheckpointError(f"only an optimiser's arrays, under {_keys(found)}: --key takes one of them all the same")
    (prefix,) = weights or [""]
    others_inside = tuple(other for other in found if other.startswith(prefix) and other != prefix)
    inside = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix) and not (others_inside and name.startswith(others_inside))
    }
    if not prefix:
        inside = {name: array for name, array in inside.items() if plain(name).partition("/")[0] not in OPTIMISER | RANDOM}
    left_out = [name for name in arrays if not name.startswith(prefix) or name.removeprefix(prefix) not in inside]
    return inside, prefix, _listed(left_out, others, plain(prefix).split("/"))


def _is_optimiser(prefix: str) -> bool:
    return not OPTIMISER.isdisjoint(prefix.split("/")) and not prefix.endswith(TARGETS)


def _listed(arrays: Iterable[str], others: Iterable[str], weights: list[str]) -> list[str]:
    """Entries by the first level at which their path differs from that of the weights."""

    def group(name: str) -> str:
        parts = plain(name).split("/")
        same = next((i for i, (a, b) in enumerate(zip(parts, weights)) if a != b), 0)
        return "/".join(parts[: same + 1])

    counts = Counter(map(group, arrays))
    groups = dict.fromkeys([*map(group, others), *counts])
    many = {name: f" ({count} array{'s' * (count > 1)})" for name, count in counts.items()}
    return [f"{name}{many.get(name, '')}" for name in groups]


def _joined(names: re.Match[str]) -> str:
    return "/".join(re.findall("'([^']*)'", names[0]))


def _children(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a node of a tree by name; None for a leaf, such as a list of numbers."""
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "_fields"):
        return value._asdict()
    if dataclasses.is_dataclass(value) and not hasattr(value, "shape"):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple) and any(hasattr(item, "shape") or _children(item) is not None for item in value):
        return dict(enumerate(value))
    return None


def _keys(prefixes: Iterable[str]) -> str:
    return ", ".join(sorted(prefix.rstrip("/.") or '""' for prefix in prefixes))
