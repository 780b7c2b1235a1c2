"""MLP-Mixer in Flax NNX (paper, section 2). Smallest part first, the model last.

Blocks are stacked: one MixerBlock whose weights have a leading axis over the depth, so that the time to compile does not
grow with depth. What a hook sees and what masks replace is in `mixer_jax.hooks`.
"""

__all__ = ["MlpMixer"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.errors import TraceContextError
from jax.typing import ArrayLike, DTypeLike

from convert import MixerConfig
from convert.dtypes import weights_dtype

from .blocks import Array, Masks, as_used, block_function, block_of, random_masks
from .hooks import check_mask, no_hook, under
from .inputs import check_images, require_array
from .sharding.placement import Placement

Hook = Callable[[str, Array], Array]
Randomness: TypeAlias = Array | nnx.Rngs | nnx.RngStream | None  # a key, or where to take one from


@dataclass(frozen=True)
class Numerics:
    """Dtypes of the computation (None: that to which inputs and weights promote) and of the weights; precision of matmuls."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: jax.lax.PrecisionLike


class Stem(nnx.Module):
    """One matmul for every patch: images (b, h, w, i) -> tokens (b, n, o) in row-major order."""

    def __init__(self, config: MixerConfig, numerics: Numerics, *, rngs: nnx.Rngs):
        shape = (*config.patch_size, config.in_channels, config.hidden_dim)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, numerics.param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.hidden_dim, numerics.param_dtype))
        self.dtype, self.precision = numerics.dtype, numerics.precision

    def __call__(self, images: Array) -> Array:
        images, kernel, bias = nnx.nn.dtypes.promote_dtype((images, self.kernel[...], self.bias[...]), dtype=self.dtype)
        # A matmul is faster than a convolution on a CPU and slower on a TPU.
        matmul, convolution = (partial(f, precision=self.precision) for f in (_stem_matmul, _stem_convolution))
        return jax.lax.platform_dependent(images, kernel, cpu=matmul, default=convolution) + bias


def _stem_matmul(images: Array, kernel: Array, *, precision: jax.lax.PrecisionLike) -> Array:
    h, w, _, _ = kernel.shape
    rows = rearrange(images, "b (gh h) w i -> b gh h w i", h=h)  # axis by axis: a mesh with explicit axes needs it
    patches = rearrange(rearrange(rows, "b gh h (gw w) i -> b gh gw h w i", w=w), "b gh gw h w i -> b gh gw (h w i)")
    grid = jnp.matmul(patches, rearrange(kernel, "h w i o -> (h w i) o"), precision=precision)
    return rearrange(grid, "b gh gw o -> b (gh gw) o")


def _stem_convolution(images: Array, kernel: Array, *, precision: jax.lax.PrecisionLike) -> Array:
    h, w, _, _ = kernel.shape
    grid = jax.lax.conv_general_dilated(
        images, kernel, (h, w), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )
    return rearrange(grid, "b gh gw o -> b (gh gw) o")


class Dropout(nnx.Module):
    """Sets values to zero at a rate and divides the others by the rate that is kept."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: Array, name: str, masks: Masks | None) -> Array:
        if self.deterministic or masks is None or not self.rate:
            return x
        keep_rate = 1 - self.rate
        return jnp.where(masks(name, x.shape, keep_rate), x / keep_rate, 0)


class MlpBlock(nnx.Module):
    """Two matmuls with a GELU in between, over the last axis."""

    def __init__(self, features: int, hidden: int, numerics: Numerics, *, gelu: str, dropout_rate: float, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, **vars(numerics), rngs=rngs)
        self.dense_0 = dense(features, hidden)
        self.dense_1 = dense(hidden, features)
        self.dropout = Dropout(dropout_rate)
        self.gelu = gelu

    def __call__(self, x: Array, *, masks: Masks | None, hook: Hook) -> Array:
        x = hook("dense_0", self.dense_0(x))
        x = hook("gelu", _gelu(x, self.gelu))
        x = self.dropout(x, "dropout_0", masks)
        x = hook("dense_1", self.dense_1(x))
        return self.dropout(x, "dropout_1", masks)


def _gelu(x: Array, kind: str) -> Array:
    """In float32 or better, rounded once: bfloat16 would round at each step, and is slower on a CPU."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nnx.gelu(wide, approximate=kind == "tanh").astype(x.dtype)  # the released weights were trained with tanh


class StochasticDepth(nnx.Module):
    """Drops a residual branch (b, n, c) for whole images; `rescale` divides kept branches by the rate that is kept."""

    def __init__(self, *, rescale: bool):
        self.rescale = rescale
        self.deterministic = False

    def __call__(self, x: Array, name: str, masks: Masks | None, keep_rate: float | Array | None) -> Array:
        if self.deterministic or masks is None or keep_rate is None:  # None: the branch is always kept
            return x
        kept = masks(name, (x.shape[0], 1, 1), keep_rate)
        return jnp.where(kept, x / jnp.asarray(keep_rate, x.dtype) if self.rescale else x, 0)


class MixerBlock(nnx.Module):
    """Mixes tokens, then channels, each with a residual connection: (b, n, c) -> (b, n, c)."""

    def __init__(self, config: MixerConfig, numerics: Numerics, *, dropout_rate: float, rescale: bool, rngs: nnx.Rngs):
        norm = partial(_layer_norm, config, numerics, rngs=rngs)
        mlp = partial(MlpBlock, numerics=numerics, gelu=config.gelu, dropout_rate=dropout_rate, rngs=rngs)
        self.token_norm = norm()
        self.token_mixing = mlp(config.num_tokens, config.tokens_mlp_dim)
        self.channel_norm = norm()
        self.channel_mixing = mlp(config.hidden_dim, config.channels_mlp_dim)
        self.stochastic_depth = StochasticDepth(rescale=rescale)

    def __call__(
        self, x: Array, keep_rate: float | Array | None = None, masks: Masks | None = None, *, hook: Hook = no_hook
    ) -> Array:
        y = rearrange(hook("token_norm", self.token_norm(x)), "b n c -> b c n")
        y = self.token_mixing(y, masks=under("token_mixing", masks), hook=under("token_mixing", hook))
        y = rearrange(y, "b c n -> b n c")
        x = hook("token_mixing/sum", x + self.stochastic_depth(y, "token_mixing/stochastic_depth", masks, keep_rate))
        y = hook("channel_norm", self.channel_norm(x))
        y = self.channel_mixing(y, masks=under("channel_mixing", masks), hook=under("channel_mixing", hook))
        return hook("channel_mixing/sum", x + self.stochastic_depth(y, "channel_mixing/stochastic_depth", masks, keep_rate))


class MlpMixer(nnx.Module):
    """Images (b, h, w, channels) -> logits (b, classes), or features (b, hidden) if the config has no classes.

    `dropout_rate` holds for every MLP. The rate of stochastic depth rises linearly from 0 in the first block to
    `stochastic_depth_rate` in the last; kept branches are divided by the rate that is kept unless `rescale=False`. Both act
    after `train()` only. Their random bits come from the `rngs` of the call, a key or an nnx.Rngs, or else from the model's
    own stream, which only Flax's transforms (nnx.jit, nnx.grad, ...) can advance. A call with a key, and any call after
    `eval()`, is a pure function under every transform of JAX.

    `dtype` is the dtype of the computation (None: that to which images and weights promote), `param_dtype` that of the
    weights, `precision` that of the matmuls. The mean over tokens and the head are computed in float32 or better, and so
    are the logits. For the backward pass each block saves its input and the results of three operations (`SAVED`) and
    recomputes the rest; with `remat` it saves its input alone.

    With `masks` or a hook the blocks are run one by one.

    Raises ValueError for images of another shape or of integers, for float64 unless JAX allows it, and for masks of another
    shape or dtype.
    """

    labels: tuple[str, ...] | None = None
    preprocessing: str | None = None
    placement: Placement | None = None

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
        precision: jax.lax.PrecisionLike = None,
        remat: bool = False,
    ):
        for name, rate in (("dropout_rate", dropout_rate), ("stochastic_depth_rate", stochastic_depth_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {rate}")
        dtype = None if dtype is None else weights_dtype(dtype, "dtype")
        param_dtype = weights_dtype(param_dtype, "param_dtype")
        for name, wanted in (("dtype", dtype), ("param_dtype", param_dtype)):
            require_x64(wanted, f"{name}=float64")
        numerics = Numerics(dtype, param_dtype, precision)
        block = partial(MixerBlock, config, numerics, dropout_rate=dropout_rate, rescale=rescale)
        self.config = config
        self.stem = Stem(config, numerics, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_blocks))
        self.pre_head_norm = _layer_norm(config, numerics, rngs=rngs)
        head = partial(nnx.Linear, kernel_init=nnx.initializers.zeros_init(), param_dtype=param_dtype, precision=precision)
        self.head = head(config.hidden_dim, config.num_classes, rngs=rngs) if config.num_classes else None
        self.dropout_rate, self.stochastic_depth_rate = dropout_rate, stochastic_depth_rate
        self.remat = remat
        self.deterministic = False
        self.seed(rngs)

    def seed(self, rngs: nnx.Rngs) -> None:
        """Take the random bits of dropout and stochastic depth from `rngs` from now on."""
        random = self.dropout_rate or self.stochastic_depth_rate
        self.stream = nnx.data(rngs.dropout.fork() if random else None)

    def __call__(
        self, images: ArrayLike, *, rngs: Randomness = None, hook: Hook = no_hook, masks: Masks | None = None
    ) -> Array:
        x = self.features(images, rngs=rngs, hook=hook, masks=masks)
        return x if self.head is None else hook("head", self.logits(x))

    def features(
        self, images: ArrayLike, *, rngs: Randomness = None, hook: Hook = no_hook, masks: Masks | None = None
    ) -> Array:
        """The input of the head: the mean over tokens of the normalised output, (b, hidden)."""

        def run(model: MlpMixer, images: Array, keys: Array | None) -> Array:
            x = hook("stem", model._used("stem")(images))
            x = hook("pre_head_norm", model._used("pre_head_norm")(model._run_blocks(x, keys, hook, masks)))
            return hook("mean", x.mean(axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)))

        return self._on_mesh(run, self.checked(images), self._block_keys(rngs) if masks is None else None)

    def logits(self, features: Array) -> Array:
        """The logits (b, classes) of features (b, hidden)."""
        return self._on_mesh(lambda model, features: model._used("head")(features), features)

    def _on_mesh(self, function: Callable[..., Array], x: Array, *arrays: Any) -> Array:
        """`function(model, x, *arrays)`, with automatic axes inside where those of the placement's mesh are explicit."""
        if self.placement is None or not self.placement.is_explicit:
            return function(self, x, *arrays)
        graphdef, state = nnx.split(self)
        inside = self.placement.automatic(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays), like=x)
        return inside(state, x, *arrays)

    def _used(self, name: str) -> Any:
        """The stem, the last norm or the head, with weights as they are computed with."""
        module = getattr(self, name)
        if self.placement is None:
            return module
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, as_used(self.placement, state, f"{name}/"))

    def _run_blocks(self, x: Array, keys: Array | None, hook: Hook, masks: Masks | None) -> Array:
        """In a loop over the stacked weights. With a hook or masks one by one, so that every array and mask has a name."""
        plain, keep_rates = hook is no_hook and masks is None, self._keep_rates()
        if plain and not isinstance(self.blocks, nnx.List):
            graphdef, state = nnx.split(self.blocks)  # jax.lax.scan, since nnx.scan fails under JAX's own transforms
            rates = None if keep_rates is None else jnp.asarray(keep_rates)
            return jax.lax.scan(
                block_function(graphdef, self.remat, in_loop=True, placement=self.placement), x, (state, rates, keys)
            )[0]
        for i in range(self.config.num_blocks):
            rate = None if keep_rates is None or keep_rates[i] == 1 else float(keep_rates[i])
            key = None if keys is None else keys[i]
            if plain and self.remat:
                graphdef, state = nnx.split(self.blocks[i])
                x, _ = block_function(graphdef, self.remat, in_loop=False, placement=self.placement)(x, (state, rate, key))
            else:
                own = None if key is None else random_masks(key)
                x = self.block(i)(x, rate, own if masks is None else _checked(masks, i), hook=under(f"blocks/{i}", hook))
        return x

    def _keep_rates(self) -> np.ndarray | None:
        """The rate at which the residual branches of each block are kept; None without stochastic depth."""
        rate = self.stochastic_depth_rate
        return 1 - np.linspace(0, rate, self.config.num_blocks) if rate else None

    def block(self, index: int) -> MixerBlock:
        """A block by itself; if the blocks are stacked, its weights are a copy. Raises IndexError for an index out of range."""
        if not -self.config.num_blocks <= index < self.config.num_blocks:
            raise IndexError(f"no block {index}: this model has {self.config.num_blocks}, counted from 0")
        return self.blocks[index] if isinstance(self.blocks, nnx.List) else block_of(self.blocks, index)

    def unstacked(self) -> Self:
        """A copy of the model whose blocks have arrays of their own. It shares no weight and no random stream."""
        graphdef, state = nnx.split(self)
        other = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # new variables
        if not isinstance(self.blocks, nnx.List):
            other.blocks = nnx.List(self.block(i) for i in range(self.config.num_blocks))
        return other

    def checked(self, images: Any) -> Any:
        """The images as a JAX array, after all checks; a jax.ShapeDtypeStruct stays one."""
        require_array(images)
        images = images if hasattr(images, "dtype") and hasattr(images, "shape") else np.asarray(images)
        dtype = np.dtype(images.dtype)
        require_x64(dtype, "these images are float64, which")
        require_x64(self.stem.kernel.dtype, "this model's weights are float64, which")
        check_images(images.shape, dtype.name, self.config, axes="b h w c")
        return images if isinstance(images, jax.ShapeDtypeStruct) else jnp.asarray(images)

    def _block_keys(self, rngs: Randomness) -> Array | None:
        """A key for each block, or None if nothing is random."""
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


def _layer_norm(config: MixerConfig, numerics: Numerics, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_dim,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses all digits where the mean is large
        dtype=numerics.dtype,
        param_dtype=numerics.param_dtype,
        rngs=rngs,
    )


def _checked(masks: Masks, block: int) -> Masks:
    """The caller's masks for a block, each checked."""

    def checked(name: str, shape: tuple[int, ...], keep_rate: float | Array) -> Array:
        name = f"blocks/{block}/{name}"
        mask = jnp.asarray(masks(name, shape, keep_rate))
        check_mask(name, mask.shape, mask.dtype.name, shape)
        return mask

    return checked


def require_x64(dtype: np.dtype | None, what: str) -> None:
    """Raise ValueError if `what` is float64 and JAX does not allow it."""
    if dtype is not None and dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            f"{what} needs 64-bit JAX: create, load and call the model `with jax.enable_x64(True):`, or use float32"
        )
