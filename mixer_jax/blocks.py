"""Stacked blocks: one run in a loop with random bits and rematerialisation, and one taken out of the stack."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from .sharding.placement import Placement

Array = jax.Array
Masks = Callable[[str, tuple[int, ...], float | Array], ArrayLike]

# Activations saved for the backward pass beside each block's input; everything else is cheap to recompute.
SAVED = ("token_mixing/dense_0", "token_mixing/sum", "channel_mixing/dense_0")


def random_masks(key: Array) -> Masks:
    """Masks drawn from the key, each with its own name folded in."""

    def masks(name: str, shape: tuple[int, ...], keep_rate: float | Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), keep_rate, shape)

    return masks


@functools.cache  # JAX caches by the identity of a function: one object is traced and compiled once
def block_function(
    graphdef: nnx.GraphDef, remat: bool, *, in_loop: bool, placement: Placement | None = None
) -> Callable[[Array, Any], tuple[Array, None]]:
    """A block as a function of tokens and (state, keep rate, key); its backward pass recomputes what is not in SAVED."""

    def run(x: Array, inputs: tuple[Any, float | Array | None, Array | None]) -> tuple[Array, None]:
        state, keep_rate, key = inputs
        masks = None if key is None else random_masks(key)
        return nnx.merge(graphdef, as_used(placement, state))(
            x, keep_rate, masks, hook=lambda name, array: checkpoint_name(array, name)
        ), None

    policy = None if remat else jax.checkpoint_policies.save_only_these_names(*SAVED)
    return jax.checkpoint(run, prevent_cse=not in_loop, policy=policy)


def as_used(placement: Placement | None, weights: Any, prefix: str = "") -> Any:
    """The weights of a module as they are computed with, where a placement splits them over devices."""
    if placement is None:
        return weights
    return jax.tree_util.tree_map_with_path(lambda path, leaf: placement.used(prefix + weight_name(path), leaf), weights)


def weight_name(path: tuple[Any, ...]) -> str:
    """The name of a weight, by its path in a tree: "blocks/token_mixing/dense_0/kernel"."""
    return "/".join(str(part.key) for part in path if hasattr(part, "key"))  # a Variable's own level has no key


def block_of(stacked: nnx.Module, index: int) -> Any:
    """One block of the stack. Its weights are a copy; on a CPU a view if they are aligned, since JAX arrays are immutable."""

    def item(leaf: Array) -> Array:
        if isinstance(leaf, jax.core.Tracer) or [device.platform for device in leaf.devices()] != ["cpu"]:
            return leaf[index]
        return jax.device_put(np.asarray(leaf)[index], leaf.sharding if leaf.committed else None, may_alias=True)

    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(item, state))
