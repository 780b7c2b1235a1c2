"""MLP-Mixer in Flax NNX (paper, section 2). Smallest part first, the model last.

Blocks are stacked: one MixerBlock whose weights have a leading axis over the depth, so that compiling takes the same
time at any depth. A `tap(name, array) -> array` sees the result of every operation and returns what the forward pass goes
on with; names are those of `mixer_jax.referee`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from convert import MixerConfig

from .images import check_images

Array = jax.Array
Tap = Callable[[str, Array], Array]
Precision = jax.lax.PrecisionLike


def identity(name: str, array: Array) -> Array:
    return array


class Stem(nnx.Module):
    """One product for every patch: images (b, h, w, i) -> tokens (b, n, o), row by row."""

    def __init__(
        self,
        config: MixerConfig,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (*config.patch_size, config.in_channels, config.hidden_dim)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.hidden_dim, param_dtype))
        self.dtype, self.precision = dtype, precision

    def __call__(self, images: Array) -> Array:
        images, kernel, bias = nnx.nn.dtypes.promote_dtype((images, self.kernel[...], self.bias[...]), dtype=self.dtype)
        # A product beats a convolution on the CPU and loses to it on a TPU.
        product, convolution = (partial(f, precision=self.precision) for f in (_stem_product, _stem_convolution))
        return jax.lax.platform_dependent(images, kernel, cpu=product, default=convolution) + bias


def _stem_product(images: Array, kernel: Array, *, precision: Precision) -> Array:
    h, w, _, _ = kernel.shape
    patches = rearrange(images, "b (gh h) (gw w) i -> b (gh gw) (h w i)", h=h, w=w)
    return jnp.matmul(patches, rearrange(kernel, "h w i o -> (h w i) o"), precision=precision)


def _stem_convolution(images: Array, kernel: Array, *, precision: Precision) -> Array:
    h, w, _, _ = kernel.shape
    grid = jax.lax.conv_general_dilated(
        images, kernel, (h, w), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )
    return rearrange(grid, "b gh gw o -> b (gh gw) o")


class MlpBlock(nnx.Module):
    """Two products with a GELU between, over the last axis."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        gelu: str,
        dropout_rate: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        dense = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        self.dense_0 = dense(features, hidden)
        self.dense_1 = dense(hidden, features)
        self.dropout = nnx.Dropout(dropout_rate)
        self.gelu = gelu

    def __call__(self, x: Array, *, rngs: nnx.Rngs | None, tap: Tap) -> Array:
        x = tap("dense_0", self.dense_0(x))
        x = tap("gelu", nnx.gelu(x, approximate=self.gelu == "tanh"))  # the released weights were trained with tanh
        x = self.dropout(x, rngs=rngs)
        x = tap("dense_1", self.dense_1(x))
        return self.dropout(x, rngs=rngs)


class StochasticDepth(nnx.Module):
    """Drops a residual branch (b, n, c) for whole images; `rescale` divides what is kept by the share that is kept."""

    def __init__(self, *, rescale: bool):
        self.rescale = rescale
        self.deterministic = False

    def __call__(self, x: Array, rate: Array, rngs: nnx.Rngs | None) -> Array:
        if self.deterministic or rngs is None:
            return x
        keep = 1 - rate
        kept = jax.random.bernoulli(rngs.stochastic_depth(), keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep.astype(x.dtype) if self.rescale else x, 0)


class MixerBlock(nnx.Module):
    """Mixes tokens, then channels, each with a residual connection: (b, n, c) -> (b, n, c)."""

    def __init__(
        self,
        config: MixerConfig,
        *,
        dropout_rate: float,
        rescale: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        norm = partial(_layer_norm, config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        mlp = partial(
            MlpBlock,
            gelu=config.gelu,
            dropout_rate=dropout_rate,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        self.token_norm = norm()
        self.token_mixing = mlp(config.num_tokens, config.tokens_mlp_dim)
        self.channel_norm = norm()
        self.channel_mixing = mlp(config.hidden_dim, config.channels_mlp_dim)
        self.stochastic_depth = StochasticDepth(rescale=rescale)

    def __call__(self, x: Array, rate: Array, key: Array | None = None, *, tap: Tap = identity) -> Array:
        rngs = None if key is None else nnx.Rngs(key)
        y = rearrange(tap("token_norm", self.token_norm(x)), "b n c -> b c n")
        y = rearrange(self.token_mixing(y, rngs=rngs, tap=_under("token_mixing", tap)), "b c n -> b n c")
        x = tap("token_mixing/sum", x + self.stochastic_depth(y, rate, rngs))
        y = tap("channel_norm", self.channel_norm(x))
        y = self.channel_mixing(y, rngs=rngs, tap=_under("channel_mixing", tap))
        return tap("channel_mixing/sum", x + self.stochastic_depth(y, rate, rngs))


class MlpMixer(nnx.Module):
    """Images (b, h, w, channels) -> logits (b, classes), or features (b, hidden) if the config has no classes.

    `dropout_rate` is that of every MLP; `stochastic_depth_rate` that of the last block, rising linearly from 0 in the
    first, with kept branches divided by the share that is kept unless `rescale=False`. Both act after `train()`, not
    after `eval()`, and draw from `rngs`. `dtype` computes (None: what images and weights promote to), `param_dtype` stores,
    `precision` is that of the products. The mean over tokens and the head are in float32 or better, so logits are too.
    `remat` keeps only the input of each block for the backward pass and computes the rest again.

    Raises ValueError for images of another shape or of integers, and for float64 while JAX is not told to allow it.
    """

    labels: tuple[str, ...] | None = None
    preprocessing: str | None = None

    def __init__(
        self,
        config: MixerConfig,
        *,
        rngs: nnx.Rngs,
        dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        rescale: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        remat: bool = False,
    ):
        for name, rate in (("dropout_rate", dropout_rate), ("stochastic_depth_rate", stochastic_depth_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {rate}")
        for name, asked in (("dtype", dtype), ("param_dtype", param_dtype)):
            if asked is not None:
                _require_x64(jnp.dtype(asked), f"{name}=float64")
        block = partial(
            MixerBlock,
            config,
            dropout_rate=dropout_rate,
            rescale=rescale,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
        )
        self.config = config
        self.stem = Stem(config, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_blocks))
        self.pre_head_norm = _layer_norm(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        head = partial(nnx.Linear, kernel_init=nnx.initializers.zeros_init(), param_dtype=param_dtype, precision=precision)
        self.head = head(config.hidden_dim, config.num_classes, rngs=rngs) if config.num_classes else None
        self.dropout_rate, self.stochastic_depth_rate = dropout_rate, stochastic_depth_rate
        self.remat = remat
        self.deterministic = False
        self.seed(rngs)

    def seed(self, rngs: nnx.Rngs) -> None:
        """Draw dropout and stochastic depth from `rngs` from now on."""
        random = self.dropout_rate or self.stochastic_depth_rate
        self.stream = nnx.data(rngs.dropout.fork() if random else None)

    def __call__(self, images: ArrayLike, *, tap: Tap = identity) -> Array:
        x = self.features(images, tap=tap)
        return x if self.head is None else tap("head", self.head(x))

    def features(self, images: ArrayLike, *, tap: Tap = identity) -> Array:
        """What the head sees: the mean over tokens of the normalised output, (b, hidden)."""
        x = tap("stem", self.stem(self._checked(images)))
        rates = jnp.linspace(0, self.stochastic_depth_rate, self.config.num_blocks, dtype=jnp.float32)
        training = self.stream is not None and not self.deterministic
        keys = jax.random.split(self.stream(), self.config.num_blocks) if training else None
        if tap is identity:
            x = (_through_blocks_again if self.remat else _through_blocks)(x, self.blocks, rates, keys)
        else:  # one by one, so that each array has a name and a value of its own
            for i in range(self.config.num_blocks):
                key = None if keys is None else keys[i]
                x = self.block(i)(x, rates[i], key, tap=_under(f"blocks/{i}", tap))
        x = tap("pre_head_norm", self.pre_head_norm(x))
        return tap("mean", x.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)))

    def block(self, index: int) -> MixerBlock:
        """A block by itself, with a copy of its weights."""
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))

    def _checked(self, images: ArrayLike) -> Array:
        dtype = jnp.result_type(images) if isinstance(images, jax.Array) else np.asarray(images).dtype
        _require_x64(dtype, "these images are float64, which")
        _require_x64(self.stem.kernel.dtype, "this model's weights are float64, which")
        check_images(np.shape(images), dtype.name, self.config, axes="b h w c")
        return jnp.asarray(images)


def _layer_norm(config: MixerConfig, *, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_dim,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses all digits where the mean is large
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _through_block(x: Array, block: MixerBlock, rate: Array, key: Array | None) -> Array:
    return block(x, rate, key)


_scan = nnx.scan(in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry)
_through_blocks = _scan(_through_block)
_through_blocks_again = _scan(nnx.remat(_through_block))


def _under(prefix: str, tap: Tap) -> Tap:
    return tap if tap is identity else lambda name, array: tap(f"{prefix}/{name}", array)


def _require_x64(dtype: np.dtype, what: str) -> None:
    if dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(f"{what} needs 64-bit JAX: make, load and call the model `with jax.enable_x64(True):`, or use float32")
