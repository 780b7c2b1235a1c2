"""The same network in Flax Linen, structured as Google's code is, for benchmarks to measure against.

Module names give the parameter names of the released files, so that `Checkpoint.as_linen()` fits. What differs from
`mixer_jax.model` is what differs there: blocks one by one, a convolution in the stem on every platform, the variance of a
LayerNorm as E[x^2] - E[x]^2, every matmul in `dtype`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convert import MixerConfig

Array = jax.Array


class MlpBlock(nn.Module):
    """Two matmuls with a tanh GELU in between, over the last axis."""

    hidden: int
    dtype: DTypeLike | None
    precision: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, precision=self.precision)(x))
        return nn.Dense(features, dtype=self.dtype, precision=self.precision)(x)


class MixerBlock(nn.Module):
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: DTypeLike | None
    precision: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        y = MlpBlock(self.tokens_mlp_dim, self.dtype, self.precision, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MlpBlock(self.channels_mlp_dim, self.dtype, self.precision, name="channel_mixing")(y)


class MlpMixer(nn.Module):
    """Images (b, h, w, channels) -> logits (b, classes), or features (b, hidden) without classes."""

    config: MixerConfig
    dtype: DTypeLike | None = None
    precision: Any = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        c, numerics = self.config, {"dtype": self.dtype, "precision": self.precision}
        x = nn.Conv(c.hidden_dim, c.patch_size, c.patch_size, **numerics, name="stem")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(c.num_blocks):
            x = MixerBlock(c.tokens_mlp_dim, c.channels_mlp_dim, **numerics)(x)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x).mean(axis=1)
        if not c.num_classes:
            return x
        return nn.Dense(c.num_classes, kernel_init=nn.initializers.zeros, **numerics, name="head")(x)
