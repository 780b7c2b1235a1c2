"""MLP-Mixer in Flax NNX (paper, section 2). Smallest part first, the model last.

Blocks are stacked: one MixerBlock whose weights have a leading axis over the depth, so that compiling takes the same
time at any depth. A `tap(name, array) -> array` sees the result of every operation and returns what the forward pass goes
on with; names are those of `mixer_jax.referee`. The random bits of dropout and stochastic depth come from a source of
`mixer_jax.masks`: drawn from a key, or the caller's, so that two frameworks can train with the same ones.
"""

__all__ = ["MlpMixer"]

import functools
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.errors import TraceContextError
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from convert import MixerConfig
from convert.dtypes import weights_dtype

from .images import check_images, require_array
from .masks import check_mask

Array = jax.Array
Tap = Callable[[str, Array], Array]
Masks = Callable[[str, tuple[int, ...], float | Array], ArrayLike]
Randomness: TypeAlias = Array | nnx.Rngs | nnx.RngStream | None  # what a call draws with
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
    rows = rearrange(images, "b (gh h) w i -> b gh h w i", h=h)  # axis by axis, as a mesh with explicit axes needs it
    patches = rearrange(rearrange(rows, "b gh h (gw w) i -> b gh gw h w i", w=w), "b gh gw h w i -> b gh gw (h w i)")
    grid = jnp.matmul(patches, rearrange(kernel, "h w i o -> (h w i) o"), precision=precision)
    return rearrange(grid, "b gh gw o -> b (gh gw) o")


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
    after `eval()`, and draw from `rngs`: that of the call, a key or an nnx.Rngs, else the model's own stream, which only
    Flax's transforms (nnx.jit, nnx.grad, ...) can advance. A call with a key, and any call after `eval()`, is a pure
    function under every transform of JAX. `dtype` computes (None: what images and weights promote to), `param_dtype` stores,
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
        dtype = None if dtype is None else weights_dtype(dtype, "dtype")
        param_dtype = weights_dtype(param_dtype, "param_dtype")
        for name, wanted in (("dtype", dtype), ("param_dtype", param_dtype)):
            require_x64(wanted, f"{name}=float64")
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

    def __call__(self, images: ArrayLike, *, rngs: Randomness = None, tap: Tap = identity, masks: Masks | None = None) -> Array:
        x = self.features(images, rngs=rngs, tap=tap, masks=masks)
        return x if self.head is None else tap("head", self.head(x))

    def features(self, images: ArrayLike, *, rngs: Randomness = None, tap: Tap = identity, masks: Masks | None = None) -> Array:
        """What the head sees: the mean over tokens of the normalised output, (b, hidden)."""
        x = tap("stem", self.stem(self.checked(images)))
        x = self._through_blocks(x, self._block_keys(rngs) if masks is None else None, tap, masks)
        x = tap("pre_head_norm", self.pre_head_norm(x))
        return tap("mean", x.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)))

    def _through_blocks(self, x: Array, keys: Array | None, tap: Tap, masks: Masks | None) -> Array:
        count, plain = self.config.num_blocks, tap is identity and masks is None
        keeps = 1 - np.linspace(0, self.stochastic_depth_rate, count) if self.stochastic_depth_rate else None
        if plain and not isinstance(self.blocks, nnx.List):
            graphdef, state = nnx.split(self.blocks)  # jax.lax.scan, not nnx.scan, which no plain transform of JAX takes
            inputs = state, None if keeps is None else jnp.asarray(keeps), keys
            return jax.lax.scan(_block_function(graphdef, self.remat, in_loop=True), x, inputs)[0]
        for i in range(count):  # one by one, so that each array and each mask has a name of its own
            keep = None if keeps is None or keeps[i] == 1 else float(keeps[i])
            key = None if keys is None else keys[i]
            if plain and self.remat:
                graphdef, state = nnx.split(self.blocks[i])
                x, _ = _block_function(graphdef, self.remat, in_loop=False)(x, (state, keep, key))
                continue
            own = None if key is None else drawn(key)
            source = own if masks is None else _given(masks, f"blocks/{i}")
            x = self.block(i)(x, keep, source, tap=_under(f"blocks/{i}", tap))
        return x

    def block(self, index: int) -> MixerBlock:
        """A block by itself. Where blocks are stacked its weights are a copy. Raises IndexError where there is none."""
        if not -self.config.num_blocks <= index < self.config.num_blocks:
            raise IndexError(f"no block {index}: this model has {self.config.num_blocks}, counted from 0")
        if isinstance(self.blocks, nnx.List):
            return self.blocks[index]
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: _item(leaf, index), state))

    def unstacked(self) -> Self:
        """A copy of the model with each block's weights in arrays of their own. It shares no weight and no random stream."""
        graphdef, state = nnx.split(self)
        other = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # new variables
        if not isinstance(self.blocks, nnx.List):
            other.blocks = nnx.List(self.block(i) for i in range(self.config.num_blocks))
        return other

    def checked(self, images: Any) -> Any:
        """The images as an array of JAX, if the model can take them; a jax.ShapeDtypeStruct stays one."""
        require_array(images)
        images = images if hasattr(images, "dtype") and hasattr(images, "shape") else np.asarray(images)
        dtype = np.dtype(images.dtype)
        require_x64(dtype, "these images are float64, which")
        require_x64(self.stem.kernel.dtype, "this model's weights are float64, which")
        check_images(images.shape, dtype.name, self.config, axes="b h w c")
        return images if isinstance(images, jax.ShapeDtypeStruct) else jnp.asarray(images)

    def _block_keys(self, rngs: Randomness) -> Array | None:
        """A key for each block to draw with, or None where nothing is drawn."""
        if self.deterministic or self.stream is None:
            return None
        if isinstance(rngs, jax.Array):
            return jax.random.split(rngs, self.config.num_blocks)
        stream = self.stream if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        try:
            return jax.random.split(stream(), self.config.num_blocks)
        except TraceContextError:
            raise ValueError(
                "dropout and stochastic depth would draw from the model's own stream, which a plain transform of JAX cannot "
                "advance: give the call a key, model(images, rngs=key), or use Flax's transforms with the model as an argument"
            ) from None


def _layer_norm(config: MixerConfig, *, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_dim,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses all digits where the mean is large
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


# What a backward pass finds of each block beside its input; the rest is the work of moments on it.
KEPT = ("token_mixing/dense_0", "token_mixing/sum", "channel_mixing/dense_0")


@functools.cache  # JAX knows a function by its identity: the same one is traced and compiled once
def _block_function(graphdef: nnx.GraphDef, remat: bool, *, in_loop: bool) -> Callable[[Array, Any], tuple[Array, None]]:
    """A block as a function of tokens and (state, keep, key), whose backward pass recomputes what KEPT does not name."""

    def body(x: Array, inputs: tuple[Any, float | Array | None, Array | None]) -> tuple[Array, None]:
        state, keep, key = inputs
        block = nnx.merge(graphdef, state)
        return block(x, keep, None if key is None else drawn(key), tap=lambda name, array: checkpoint_name(array, name)), None

    policy = None if remat else jax.checkpoint_policies.save_only_these_names(*KEPT)
    return jax.checkpoint(body, prevent_cse=not in_loop, policy=policy)


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


def _item(leaf: Array, index: int) -> Array:
    """One item of a stacked array: on a CPU without a copy where it is aligned, since arrays of JAX do not change."""
    if isinstance(leaf, jax.core.Tracer) or [device.platform for device in leaf.devices()] != ["cpu"]:
        return leaf[index]
    return jax.device_put(np.asarray(leaf)[index], leaf.sharding if leaf.committed else None, may_alias=True)


def require_x64(dtype: np.dtype | None, what: str) -> None:
    if dtype is not None and dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(f"{what} needs 64-bit JAX: make, load and call the model `with jax.enable_x64(True):`, or use float32")
