"""The PyTorch twin of `mixer_jax.model`: same config, options, tap and masks; its state_dict has timm's names.

Images are (b, channels, h, w), as PyTorch has them; what the tap sees has the axes of the Flax model.
"""

__all__ = ["MlpMixer", "load", "save", "to_checkpoint"]

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("the PyTorch twin needs PyTorch: pip install 'mixer-jax[torch]'") from None
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from convert import Checkpoint, Metadata, MixerConfig, read, usual_layout, write
from convert.config import Gelu, Size
from convert.containers import sealed
from convert.containers.pt import from_torch, to_torch
from convert.dtypes import weights_dtype

from . import pretrained
from .images import check_images, few_enough, require_array
from .masks import check_mask

Tap = Callable[[str, Tensor], Tensor]
Masks = Callable[[str, tuple[int, ...], float], Any]


def identity(name: str, array: Tensor) -> Tensor:
    return array


def drawn(device: torch.device) -> Masks:
    """Masks drawn anew from PyTorch's global generator."""
    return lambda name, shape, keep: torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(keep)


class Linear(nn.Linear):
    """A product in the dtype of its input, whatever its weights are stored in; LeCun normal like Google's."""

    def reset_parameters(self) -> None:
        lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Projection(nn.Conv2d):
    """A convolution in the dtype of its input; LeCun normal like Google's."""

    bias: nn.Parameter

    def reset_parameters(self) -> None:
        lecun_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), stride=self.stride)


class LayerNorm(nn.LayerNorm):
    """Over the channels, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Stem(nn.Module):
    """One product for every patch: images (b, i, h, w) -> tokens (b, n, o), row by row."""

    def __init__(self, config: MixerConfig, *, dtype: torch.dtype | None):
        super().__init__()
        self.proj = Projection(config.in_channels, config.hidden_dim, config.patch_size, config.patch_size)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        dtype = self.dtype or torch.promote_types(images.dtype, self.proj.weight.dtype)
        return rearrange(self.proj(images.to(dtype)), "b o gh gw -> b (gh gw) o")


class Dropout(nn.Module):
    """Zeroes a share of the values and divides the others by the share that is kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, name: str, masks: Masks) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return torch.where(masks(name, tuple(x.shape), keep), x / keep, 0)


class MlpBlock(nn.Module):
    """Two products with a GELU between, over the last axis."""

    def __init__(self, features: int, hidden: int, *, gelu: str, dropout_rate: float):
        super().__init__()
        self.fc1 = Linear(features, hidden)
        self.fc2 = Linear(hidden, features)
        self.dropout = Dropout(dropout_rate)
        self.approximate = {"tanh": "tanh", "exact": "none"}[gelu]  # the released weights were trained with tanh

    def forward(self, x: Tensor, *, masks: Masks, tap: Tap) -> Tensor:
        x = tap("dense_0", self.fc1(x))
        x = tap("gelu", F.gelu(x, approximate=self.approximate))
        x = self.dropout(x, "dropout_0", masks)
        x = tap("dense_1", self.fc2(x))
        return self.dropout(x, "dropout_1", masks)


class StochasticDepth(nn.Module):
    """Drops a residual branch (b, n, c) for whole images; `rescale` divides what is kept by the share that is kept."""

    def __init__(self, rate: float, *, rescale: bool):
        super().__init__()
        self.rate, self.rescale = rate, rescale

    def forward(self, x: Tensor, name: str, masks: Masks) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return torch.where(masks(name, (x.shape[0], 1, 1), keep), x / keep if self.rescale else x, 0)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each with a residual connection: (b, n, c) -> (b, n, c)."""

    def __init__(self, config: MixerConfig, *, dropout_rate: float, stochastic_depth_rate: float, rescale: bool):
        super().__init__()
        mlp = partial(MlpBlock, gelu=config.gelu, dropout_rate=dropout_rate)
        self.norm1 = LayerNorm(config.hidden_dim, eps=config.layer_norm_epsilon)
        self.mlp_tokens = mlp(config.num_tokens, config.tokens_mlp_dim)
        self.norm2 = LayerNorm(config.hidden_dim, eps=config.layer_norm_epsilon)
        self.mlp_channels = mlp(config.hidden_dim, config.channels_mlp_dim)
        self.stochastic_depth = StochasticDepth(stochastic_depth_rate, rescale=rescale)

    def forward(self, x: Tensor, masks: Masks, *, tap: Tap = identity) -> Tensor:
        y = rearrange(tap("token_norm", self.norm1(x)), "b n c -> b c n")
        y = self.mlp_tokens(y, masks=_under("token_mixing", masks), tap=_under("token_mixing", tap))
        y = rearrange(y, "b c n -> b n c")
        x = tap("token_mixing/sum", x + self.stochastic_depth(y, "token_mixing/stochastic_depth", masks))
        y = tap("channel_norm", self.norm2(x))
        y = self.mlp_channels(y, masks=_under("channel_mixing", masks), tap=_under("channel_mixing", tap))
        return tap("channel_mixing/sum", x + self.stochastic_depth(y, "channel_mixing/stochastic_depth", masks))


class MlpMixer(nn.Module):
    """Images (b, channels, h, w) -> logits (b, classes), or features (b, hidden) if the config has no classes.

    Options as in `mixer_jax.MlpMixer`, with PyTorch's dtypes; dropout and stochastic depth draw from PyTorch's global
    generator, unless a call is given `masks`, a source as in `mixer_jax.masks`. `precision` ("highest", "high",
    "default") sets the TF32 switches of CUDA for the time of a forward pass: "highest" is full float32, the others allow
    TF32, None leaves them alone.

    `state_dict()` carries numerics, grid, labels and preprocessing in its `_metadata`, where `torch.save` keeps them, `load`
    and `Checkpoint.from_arrays` find them and `load_state_dict` passes over them.

    Raises ValueError for images of another shape or of integers, for float64 images of a model that is not float64, and
    for masks of another shape or dtype.
    """

    labels: tuple[str, ...] | None = None
    preprocessing: str | None = None

    def __init__(
        self,
        config: MixerConfig,
        *,
        dropout_rate: float = 0.0,
        stochastic_depth_rate: float = 0.0,
        rescale: bool = True,
        dtype: torch.dtype | str | None = None,
        param_dtype: torch.dtype | str = torch.float32,
        precision: str | None = None,
    ):
        super().__init__()
        dtype, param_dtype = None if dtype is None else _dtype(dtype, "dtype"), _dtype(param_dtype, "param_dtype")
        for name, rate in (("dropout_rate", dropout_rate), ("stochastic_depth_rate", stochastic_depth_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {rate}")
        if precision not in (None, *PRECISIONS):
            raise ValueError(f"precision must be None or one of {', '.join(PRECISIONS)}, not {precision!r}")
        block = partial(MixerBlock, config, dropout_rate=dropout_rate, rescale=rescale)
        rates = np.linspace(0, stochastic_depth_rate, config.num_blocks).tolist()
        self.config = config
        self.stem = Stem(config, dtype=dtype)
        self.blocks = nn.ModuleList(block(stochastic_depth_rate=rate) for rate in rates)
        self.norm = LayerNorm(config.hidden_dim, eps=config.layer_norm_epsilon)
        self.head = Linear(config.hidden_dim, config.num_classes) if config.num_classes else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
        self.precision = precision
        self.to(param_dtype)
        self.register_state_dict_post_hook(_carry_metadata)

    def forward(self, images: Tensor, *, tap: Tap = identity, masks: Masks | None = None) -> Tensor:
        x = self.features(images, tap=tap, masks=masks)
        with switches(self.precision):
            return x if self.head is None else tap("head", self.head(x))

    def features(self, images: Tensor, *, tap: Tap = identity, masks: Masks | None = None) -> Tensor:
        """What the head sees: the mean over tokens of the normalised output, (b, hidden)."""
        self._check(images)
        masks = drawn(images.device) if masks is None else _given(masks, images.device)
        with switches(self.precision):
            x = tap("stem", self.stem(images))
            for i, block in enumerate(self.blocks):
                x = block(x, _under(f"blocks/{i}", masks), tap=_under(f"blocks/{i}", tap))
            x = tap("pre_head_norm", self.norm(x))
            return tap("mean", x.mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)))

    def _check(self, images: Tensor) -> None:
        require_array(images)
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a torch.Tensor, not {type(images).__name__}: use torch.from_numpy")
        check_images(images.shape, _name(images.dtype), self.config, axes="b c h w")
        if images.dtype == torch.float64 and self.stem.proj.weight.dtype != torch.float64:
            raise ValueError("these images are float64 and the weights are not: use images.float(), or model.double() too")


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill with a normal distribution of variance 1 / fan-in, cut at two standard deviations, as jax.nn.initializers does."""
    fan_in = weight[0].numel()
    deviation = fan_in**-0.5 / 0.87962566103423978  # that of a standard normal cut at 2
    return nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


PRECISIONS = {"highest": "ieee", "high": "tf32", "default": "tf32"}


@contextlib.contextmanager
def switches(precision: str | None) -> Iterator[None]:
    """CUDA's TF32 switches as a precision says, and back as they were."""
    if precision is None:
        yield
        return
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = PRECISIONS[precision]
        yield
    finally:
        for owner, value in zip(owners, before):
            owner.fp32_precision = value


Named = TypeVar("Named", Tap, Masks)


def _under(prefix: str, function: Named) -> Named:
    """A tap or a source of masks whose names start with a prefix."""
    return function if function is identity else lambda name, *rest: function(f"{prefix}/{name}", *rest)


def _given(masks: Masks, device: torch.device) -> Masks:
    """The caller's masks, each checked and on the device."""

    def source(name: str, shape: tuple[int, ...], keep: float) -> Tensor:
        found = masks(name, shape, keep)
        mask = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
        check_mask(name, mask.shape, _name(mask.dtype), shape)
        return mask.to(device)

    return source


def load(
    source: pretrained.Source,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    num_blocks: int | None = None,
    image_size: int | Size | None = None,
    gelu: Gelu | None = None,
    layer_norm_epsilon: float | None = None,
    allow_nonfinite: bool = False,
    key: str | None = None,
    dropout_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    rescale: bool = True,
    dtype: torch.dtype | str | None = None,
    param_dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    device: torch.device | str | None = None,
) -> MlpMixer:
    """A PyTorch model with a checkpoint's weights, in eval mode; options as in `mixer_jax.load`, with PyTorch's dtypes.

    Raises CheckpointError for anything about the file that does not fit, naming every fault.
    """
    dtype = None if dtype is None else _dtype(dtype, "dtype")
    checkpoint = read(
        source,
        variant=variant,
        num_classes=num_classes,
        num_blocks=num_blocks,
        image_size=image_size,
        gelu=gelu,
        layer_norm_epsilon=layer_norm_epsilon,
        dtype=None if param_dtype is None else weights_dtype(param_dtype, "param_dtype"),
        allow_nonfinite=allow_nonfinite,
        key=key,
    ).to("timm")
    with torch.device("meta"):
        model = MlpMixer(
            checkpoint.config,
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            rescale=rescale,
            dtype=dtype,
            param_dtype=getattr(torch, checkpoint.dtype.name),
            precision=precision,
        )
    wanted = {name: (tuple(tensor.shape), _name(tensor.dtype)) for name, tensor in model.state_dict().items()}
    pretrained.require_same(checkpoint.arrays, wanted, checkpoint.source)
    # Cloned: the array may be somebody's or a file's, and models are written to.
    state = {name: to_torch(array).to(device, copy=True) for name, array in checkpoint.arrays.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.labels, model.preprocessing = checkpoint.metadata.labels, checkpoint.metadata.preprocessing
    return model.eval()


def save(
    model: MlpMixer,
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write a PyTorch model's weights with its numerics, grid, labels and preprocessing, as `mixer_jax.save` does."""
    pretrained.require_model(model, path, MlpMixer, other="mixer_jax.save")
    write(path, to_checkpoint(model), layout=layout or usual_layout(path), dtype=dtype, force=force)


def to_checkpoint(model: MlpMixer) -> Checkpoint:
    """A PyTorch model's weights, with all that makes them a function. Shares their memory where it can."""
    arrays = {name: from_torch(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint.of_model(arrays, "timm", model.config, labels=model.labels, preprocessing=model.preprocessing)


def in_microbatches(function: Callable[[Tensor], Tensor], images: Tensor, config: MixerConfig) -> Tensor:
    """What `function`, such as a model or its `features`, gives for a batch, computed a few images at a time.

    On a CPU, without gradients and for a large batch, that takes 6 to 7 % less time: the activations stay in the cache.
    """
    return torch.cat([function(part) for part in images.split(few_enough(config, images.dtype.itemsize))])


def _carry_metadata(model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(model, MlpMixer)
    metadata = Metadata.of_config(model.config, labels=model.labels, preprocessing=model.preprocessing)
    state._metadata["mixer_jax"] = sealed(metadata.said())  # type: ignore[attr-defined]


def _dtype(dtype: torch.dtype | str, name: str) -> torch.dtype:
    return getattr(torch, weights_dtype(dtype, name).name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
