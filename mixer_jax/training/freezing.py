"""Which weights are trained, by patterns of names, and the layer-wise decay of the learning rate.

Names are the Flax model's, with the index of the block: "blocks/11/token_mixing/dense_0/kernel". An array that holds the
weights of all blocks has such a name for each of them.
"""

__all__ = ["trainable"]

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..model import MlpMixer


def trainable(weights: "MlpMixer | dict[str, Any]", patterns: str | Iterable[str]) -> dict[str, np.ndarray]:
    """{name: mask}: True for what is trained, of shape (blocks, 1, ...) where an array holds all blocks, else (1, ...).

    `weights` is a Flax model or {name: array}. Patterns are fnmatch's, in one string with commas or one by one. They match a
    name or any level above it: "head", "head,blocks/11/*", "blocks/1[01]", "*/bias"; and they may leave out the index of the
    block: "blocks/token_mixing".

    Raises ValueError for patterns that match nothing, with the names nearest to each.
    """
    named = weights if isinstance(weights, dict) else named_weights(weights)
    wanted = [pattern.strip() for pattern in (patterns.split(",") if isinstance(patterns, str) else patterns)]
    levels = {level for name, weight in named.items() for full in _in_blocks(name, weight) for level in _levels(full)}
    unmatched = [pattern for pattern in wanted if not any(fnmatchcase(level, pattern) for level in levels)]
    if unmatched or not wanted:
        raise ValueError("; ".join(_no_match(pattern, levels) for pattern in unmatched) or "no pattern of weights to train")

    def matches(name: str) -> bool:
        return any(fnmatchcase(level, pattern) for level in _levels(name) for pattern in wanted)

    return {name: in_each_block(matches, name, weight) for name, weight in named.items()}


def rate_factor(name: str, num_blocks: int, decay: float) -> float:
    """What layer-wise decay multiplies the learning rate of a weight by.

    1 for the head and the norm before it, `decay` for the last block, down to `decay ** (num_blocks + 1)` for the stem.
    """
    top, index = name.split("/")[:2]
    return decay ** (num_blocks + 1 if top == "stem" else num_blocks - int(index) if top == "blocks" else 0)


def in_each_block(function: Callable[[str], Any], name: str, weight: Any) -> np.ndarray:
    """`function(name)`, for each block where an array holds all blocks, in a shape that broadcasts against the array."""
    values = [function(full) for full in _in_blocks(name, weight)]
    return np.reshape(values, (-1, *[1] * (weight.ndim - 1)))


def masked(patterns: str, tree: Any, fill: float) -> Any:
    """Gradients or updates with `fill` where a weight is not trained."""
    import jax.numpy as jnp

    masks = trainable(named_weights(tree), patterns)
    return map_named(lambda name, leaf: leaf if masks[name].all() else jnp.where(masks[name], leaf, fill), tree)


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of weights with `function(name, weight)` in the place of each."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, weight: function(_name(path), weight), tree)


def named_weights(model: Any) -> dict[str, Any]:
    """{name: weight} of a Flax model, or of a tree of weights."""
    import jax
    from flax import nnx

    tree = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    return {_name(path): weight for path, weight in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part.key) for part in path if hasattr(part, "key"))  # a Variable's own level has no key


def _in_blocks(name: str, weight: Any) -> list[str]:
    top, _, rest = name.partition("/")
    return [name] if top != "blocks" or rest[0].isdigit() else [f"blocks/{i}/{rest}" for i in range(weight.shape[0])]


def _levels(name: str) -> set[str]:
    """A name and every level above it, with and without the index of the block."""
    spellings = (name.split("/"), re.sub(r"^blocks/\d+/", "blocks/", name).split("/"))
    return {"/".join(parts[:end]) for parts in spellings for end in range(1, len(parts) + 1)}


def _no_match(pattern: str, levels: set[str]) -> str:
    nearest = difflib.get_close_matches(pattern.removesuffix("/*"), sorted(levels), n=3, cutoff=0)
    return f"no weight is called {pattern!r}: the nearest names are {', '.join(nearest)}"
