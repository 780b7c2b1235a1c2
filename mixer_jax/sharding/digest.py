"""A digest of arrays that does not depend on where their parts are."""

__all__ = ["digests"]

from collections.abc import Mapping

import jax
import jax.numpy as jnp

GOLDEN_RATIO = 0x9E3779B1  # odd: the positions of words stay apart


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """32 bits of each array: the sum modulo 2**32 of its words, each hashed with its position.

    Any order of summation gives the same number, so every sharding does, and each device reads its own part alone.
    """
    return {name: int(digest) for name, digest in _digests(dict(arrays)).items()}


@jax.jit
def _digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _digest(array) for name, array in arrays.items()}


def _digest(array: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32))
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = words.astype(jnp.uint32) ^ (position * jnp.uint32(GOLDEN_RATIO))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
