"""MLP-Mixer in Flax NNX (paper, section 2). Smallest part first, the model last.

Blocks are stacked: one MixerBlock whose weights have a leading axis over the depth, so that compiling takes the same
time at any depth. A `tap(name, array) -> array` sees the result of every operation and returns what the forward pass goes
on with; names are those of `mixer_jax.referee`. The random bits of dropout and stochastic depth come from a source of
`mixer_jax.masks`: drawn from a key, or the caller's, so that two frameworks can train with the same ones.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from convert import MixerConfig

from .images import check_images
from .masks import check_mask

Array = jax.Array
Tap = Callable[[str, Array], Array]
Masks = Callable[[str, tuple[int, ...], float | Array], ArrayLike]
Precision = jax.lax.PrecisionLike


def identity(name: str, array: Array) -> Array:
    return array


def drawn(key: Array) -> Masks:
    """Masks drawn anew, each from the key and its own name."""

    def masks(name: str, shape: tuple[int, ...], keep: float | Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), keep, shape)

    return masks


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


class Dropout(nnx.Module):
    """Zeroes a share of the values and divides the others by the share that is kept."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: Array, name: str, masks: Masks | None) -> Array:
        if self.deterministic or masks is None or not self.rate:
            return x
        keep = 1 - self.rate
        return jnp.where(masks(name, x.shape, keep), x / keep, 0)


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
        self.dropout = Dropout(dropout_rate)
        self.gelu = gelu

    def __call__(self, x: Array, *, masks: Masks | None, tap: Tap) -> Array:
        x = tap("dense_0", self.dense_0(x))
        x = tap("gelu", _gelu(x, self.gelu))
        x = self.dropout(x, "dropout_0", masks)
        x = tap("dense_1", self.dense_1(x))
        return self.dropout(x, "dropout_1", masks)


def _gelu(x: Array, kind: str) -> Array:
    """In float32 or better, rounded once. Bfloat16 would round at each step, and takes longer on a CPU."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nnx.gelu(wide, approximate=kind == "tanh").astype(x.dtype)  # the released weights were trained with tanh


class StochasticDepth(nnx.Module):
    """Drops a residual branch (b, n, c) for whole images; `rescale` divides what is kept by the share that is kept."""

    def __init__(self, *, rescale: bool):
        self.rescale = rescale
        self.deterministic = False

    def __call__(self, x: Array, name: str, masks: Masks | None, keep: float | Array | None) -> Array:
        if self.deterministic or masks is None or keep is None:  # None: the branch always stays
            return x
        kept = masks(name, (x.shape[0], 1, 1), keep)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype) if self.rescale else x, 0)


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

    def __call__(
        self, x: Array, keep: float | Array | None = None, masks: Masks | None = None, *, tap: Tap = identity
    ) -> Array:
        y = rearrange(tap("token_norm", self.token_norm(x)), "b n c -> b c n")
        y = self.token_mixing(y, masks=_under("token_mixing", masks), tap=_under("token_mixing", tap))
        y = rearrange(y, "b c n -> b n c")
        x = tap("token_mixing/sum", x + self.stochastic_depth(y, "token_mixing/stochastic_depth", masks, keep))
        y = tap("channel_norm", self.channel_norm(x))
        y = self.channel_mixing(y, masks=_under("channel_mixing", masks), tap=_under("channel_mixing", tap))
        return tap("channel_mixing/sum", x + self.stochastic_depth(y, "channel_mixing/stochastic_depth", masks, keep))


class MlpMixer(nnx.Module):
    """Images (b, h, w, channels) -> logits (b, classes), or features (b, hidden) if the config has no classes.

    `dropout_rate` is that of every MLP; `stochastic_depth_rate` that of the last block, rising linearly from 0 in the
    first, with kept branches divided by the share that is kept unless `rescale=False`. Both act after `train()`, not
    after `eval()`, and draw from `rngs`. `dtype` computes (None: what images and weights promote to), `param_dtype` stores,
    `precision` is that of the products. The mean over tokens and the head are in float32 or better, so logits are too.
    For the backward pass each block keeps its input and the results of three operations (`KEPT`) and computes LayerNorms and
    GELUs again; with `remat` it keeps the input alone and computes most products again, too.

    With `masks`, a source as in `mixer_jax.masks`, a call draws nothing and runs the blocks one by one, as with a tap.

    Raises ValueError for images of another shape or of integers, for float64 while JAX is not told to allow it, and for
    masks of another shape or dtype.
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
                require_x64(jnp.dtype(asked), f"{name}=float64")
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

    def __call__(self, images: ArrayLike, *, tap: Tap = identity, masks: Masks | None = None) -> Array:
        x = self.features(images, tap=tap, masks=masks)
        return x if self.head is None else tap("head", self.head(x))

    def features(self, images: ArrayLike, *, tap: Tap = identity, masks: Masks | None = None) -> Array:
        """What the head sees: the mean over tokens of the normalised output, (b, hidden)."""
        x = tap("stem", self.stem(self.checked(images)))
        keeps = 1 - np.linspace(0, self.stochastic_depth_rate, self.config.num_blocks) if self.stochastic_depth_rate else None
        drawing = masks is None and self.stream is not None and not self.deterministic
        keys = jax.random.split(self.stream(), self.config.num_blocks) if drawing else None
        if tap is identity and masks is None and not isinstance(self.blocks, nnx.List):
            through = _through_blocks_again if self.remat else _through_blocks
            x = through(x, self.blocks, None if keeps is None else jnp.asarray(keeps), keys)
        else:  # one by one, so that each array and each mask has a name of its own
            for i in range(self.config.num_blocks):
                keep = None if keeps is None or keeps[i] == 1 else float(keeps[i])
                own = None if keys is None else drawn(keys[i])
                source = own if masks is None else _given(masks, f"blocks/{i}")
                x = self.block(i)(x, keep, source, tap=_under(f"blocks/{i}", tap))
        x = tap("pre_head_norm", self.pre_head_norm(x))
        return tap("mean", x.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)))

    def block(self, index: int) -> MixerBlock:
        """A block by itself, with a copy of its weights where they are stacked."""
        if isinstance(self.blocks, nnx.List):
            return self.blocks[index]
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))

    def unstacked(self) -> Self:
        """The same model with every block's weights in arrays of their own: to call, not to save."""
        other = nnx.clone(self, variables=False)
        other.blocks = nnx.List(self.block(i) for i in range(self.config.num_blocks))
        return other

    def checked(self, images: ArrayLike) -> Array:
        """The images as an array of JAX, if the model can take them."""
        dtype = jnp.result_type(images) if isinstance(images, jax.Array) else np.asarray(images).dtype
        require_x64(dtype, "these images are float64, which")
        require_x64(self.stem.kernel.dtype, "this model's weights are float64, which")
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


def _through_block(x: Array, block: MixerBlock, keep: Array | None, key: Array | None) -> Array:
    return block(x, keep, None if key is None else drawn(key), tap=lambda name, array: checkpoint_name(array, name))


# What a backward pass finds of each block beside its input; the rest is the work of moments on it.
KEPT = ("token_mixing/dense_0", "token_mixing/sum", "channel_mixing/dense_0")

_scan = nnx.scan(in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry)
_kept = jax.checkpoint_policies.save_only_these_names(*KEPT)
_through_blocks = _scan(nnx.remat(_through_block, prevent_cse=False, policy=_kept))
_through_blocks_again = _scan(nnx.remat(_through_block, prevent_cse=False))


Named = TypeVar("Named", Tap, Masks | None)


def _under(prefix: str, function: Named) -> Named:
    """A tap or a source of masks whose names start with a prefix."""
    if function is None or function is identity:
        return function
    return lambda name, *rest: function(f"{prefix}/{name}", *rest)


def _given(masks: Masks, prefix: str) -> Masks:
    """The caller's masks for the block of this name, each checked."""

    def source(name: str, shape: tuple[int, ...], keep: float | Array) -> Array:
        mask = jnp.asarray(masks(f"{prefix}/{name}", shape, keep))
        check_mask(f"{prefix}/{name}", mask.shape, mask.dtype.name, shape)
        return mask

    return source


def require_x64(dtype: np.dtype, what: str) -> None:
    if dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(f"{what} needs 64-bit JAX: make, load and call the model `with jax.enable_x64(True):`, or use float32")
