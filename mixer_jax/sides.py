"""The implementations that parity compares, behind one call: which one, where it runs, what it computes in."""

__all__ = ["Side"]

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError

from .precision import Precision
from .referee import Tap, forward

# Images (b, h, w, c) and a tap or None -> logits. A tap that returns the array it was given changes nothing.
Run = Callable[[np.ndarray, Tap | None], np.ndarray]
DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = ("highest", "high", "default")
# What a device's unit makes of float32 operands at each precision; where several are possible, the budget is the largest.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(PRECISIONS, ("float32",)),
    "gpu": {"highest": ("float32",), "high": ("tf32", "tf32_truncated"), "default": ("tf32", "tf32_truncated")},
    "tpu": {"highest": ("bfloat16_6x",), "high": ("bfloat16_3x",), "default": ("bfloat16",)},
}


@dataclass(frozen=True)
class Side:
    """An implementation on a device: `name` is "flax", "torch", "timm" or "referee", which is NumPy float64 on the CPU.

    `dtype` is what it computes in (weights are rounded to it, and kept in float32 below that), `precision` that of the
    products, as JAX names them. In PyTorch all but "highest" allow TF32 on a GPU.
    """

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self) -> None:
        allowed = {"name": tuple(_OPEN), "device": tuple(UNITS), "dtype": DTYPES, "precision": PRECISIONS}
        for entry, values in allowed.items():
            if getattr(self, entry) not in values:
                raise ValueError(f"a side's {entry} is one of {', '.join(values)}, not {getattr(self, entry)!r}")
        if self.name == "referee" and (self.device, self.dtype) != ("cpu", "float64"):
            raise ValueError("the referee computes in float64 on the CPU")

    @classmethod
    def parsed(cls, text: str) -> "Side":
        """ "flax", "flax:gpu" or "torch:cpu:bfloat16:default"."""
        name, *rest = text.split(":")
        if len(rest) > 3:
            raise ValueError(f"a side is NAME[:DEVICE[:DTYPE[:PRECISION]]], not {text!r}")
        options = dict(zip(("device", "dtype", "precision"), rest))
        return cls(name, **({"dtype": "float64"} if name == "referee" else {}) | options)

    def __str__(self) -> str:
        return ":".join((self.name, self.device, self.dtype, self.precision)) if self.name != "referee" else self.name

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """How it may round, by the kind of its device."""
        units = UNITS[self.device][self.precision] if self.dtype != "float64" else ("float32",)
        return tuple(Precision(self.dtype, unit) for unit in units)

    def open(self, checkpoint: Checkpoint) -> Run:
        """Load the weights. Raises CheckpointError where the device is not there, ImportError where a package is not."""
        return _OPEN[self.name](self, checkpoint)

    def device_name(self) -> str:
        """The device in its maker's words."""
        if self.name == "flax" and self.device != "cpu":
            return str(_jax_device(self).device_kind)
        if self.device == "gpu":
            import torch

            return str(torch.cuda.get_device_name())
        return self.device


def _open_referee(side: Side, checkpoint: Checkpoint) -> Run:
    weights = {name: np.asarray(array) for name, array in checkpoint.to("google").arrays.items()}
    config = checkpoint.config
    return lambda images, tap: forward(config, weights, images, tap=tap or (lambda name, array: array))


def _open_flax(side: Side, checkpoint: Checkpoint) -> Run:
    import jax
    import jax.numpy as jnp

    from .pretrained import load

    device = _jax_device(side)
    context: Callable[[], Any] = (lambda: jax.enable_x64(True)) if side.dtype == "float64" else contextlib.nullcontext
    dtype = jnp.dtype(side.dtype)
    stored = jnp.promote_types(dtype, jnp.float32)
    with context():
        # Whoever has the checkpoint has said that its depth is meant.
        depth = checkpoint.config.num_blocks
        model = load(checkpoint, num_blocks=depth, param_dtype=stored, dtype=dtype, precision=side.precision, sharding=device)

    def run(images: np.ndarray, tap: Tap | None) -> np.ndarray:
        with context():
            x = jax.device_put(images.astype(stored), device)
            if tap is None:
                return np.asarray(_forward()(model, x), np.float64)
            return np.asarray(model(x, tap=_converted(tap, _from_jax, _to_jax)), np.float64)

    return run


@functools.cache
def _forward() -> Any:
    """The compiled forward pass, one for all models, so that models of one shape compile once."""
    from flax import nnx

    return nnx.jit(lambda model, images: model(images))


def _from_jax(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _to_jax(values: np.ndarray, like: Any) -> Any:
    import jax

    return jax.device_put(values.astype(like.dtype), like.sharding)


def _jax_device(side: Side) -> Any:
    import jax

    try:
        return jax.devices(side.device)[0]
    except RuntimeError as error:
        raise CheckpointError(f"JAX finds no {side.device} here: {error}") from None


def _open_torch(side: Side, checkpoint: Checkpoint) -> Run:
    import torch

    from . import torch_model

    dtype = getattr(torch, side.dtype)
    stored = torch.promote_types(dtype, torch.float32)
    depth, device = checkpoint.config.num_blocks, _torch_device(side)
    model = torch_model.load(
        checkpoint, num_blocks=depth, param_dtype=stored, dtype=dtype, precision=side.precision, device=device
    )
    return _run_torch(model, lambda images, tap: model(images) if tap is None else model(images, tap=tap), stored)


def _open_timm(side: Side, checkpoint: Checkpoint) -> Run:
    try:
        from timm.models.mlp_mixer import MlpMixer
    except ImportError as error:
        raise ImportError(f"this side needs timm, which needs torchvision: pip install timm ({error})") from None
    from functools import partial

    import torch

    from .torch_model import switches

    config, dtype = checkpoint.config, getattr(torch, side.dtype)
    if not config.num_classes:
        raise CheckpointError("timm's side needs a head")
    model = MlpMixer(
        num_classes=config.num_classes,
        img_size=config.image_size,
        in_chans=config.in_channels,
        patch_size=config.patch_size,
        num_blocks=config.num_blocks,
        embed_dim=config.hidden_dim,
        # timm cuts the products off to whole widths
        mlp_ratio=tuple((width + 0.5) / config.hidden_dim for width in (config.tokens_mlp_dim, config.channels_mlp_dim)),
        norm_layer=partial(torch.nn.LayerNorm, eps=config.layer_norm_epsilon),
        act_layer=partial(torch.nn.GELU, approximate={"tanh": "tanh", "exact": "none"}[config.gelu]),
    ).eval()
    model.load_state_dict(checkpoint.astype("float32").to("timm").as_torch(), strict=True)
    model.to(_torch_device(side), dtype)

    def forward(images: Any, tap: Any) -> Any:
        hooks = [] if tap is None else _hooks(model, tap)
        try:
            with switches(side.precision):
                return model(images)
        finally:
            for hook in hooks:
                hook.remove()

    return _run_torch(model, forward, dtype)


def _hooks(model: Any, tap: Any) -> list[Any]:
    """timm's operations under our names: results by forward hooks, what lies between modules by what the next one is given."""

    def result(name: str) -> Any:
        return lambda module, inputs, output: tap(name, output)

    def given(name: str) -> Any:
        return lambda module, inputs: (tap(name, inputs[0]), *inputs[1:])

    hooks = [model.stem.register_forward_hook(result("stem"))]
    for i, block in enumerate(model.blocks):
        ours = f"blocks/{i}"
        hooks.append(block.norm1.register_forward_hook(result(f"{ours}/token_norm")))
        hooks.append(block.norm2.register_forward_pre_hook(given(f"{ours}/token_mixing/sum")))
        hooks.append(block.norm2.register_forward_hook(result(f"{ours}/channel_norm")))
        for mixing, mlp in (("token_mixing", block.mlp_tokens), ("channel_mixing", block.mlp_channels)):
            for name, module in (("dense_0", mlp.fc1), ("gelu", mlp.act), ("dense_1", mlp.fc2)):
                hooks.append(module.register_forward_hook(result(f"{ours}/{mixing}/{name}")))
        hooks.append(block.register_forward_hook(result(f"{ours}/channel_mixing/sum")))
    hooks.append(model.norm.register_forward_hook(result("pre_head_norm")))
    hooks.append(model.head.register_forward_pre_hook(given("mean")))
    hooks.append(model.head.register_forward_hook(result("head")))
    return hooks


def _run_torch(model: Any, forward: Callable[[Any, Any], Any], dtype: Any) -> Run:
    import torch

    def run(images: np.ndarray, tap: Tap | None) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        x = x.to(next(model.parameters()).device, dtype)
        with torch.inference_mode():
            return _from_torch(forward(x, None if tap is None else _converted(tap, _from_torch, _to_torch)))

    return run


def _from_torch(tensor: Any) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _to_torch(values: np.ndarray, like: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)


def _torch_device(side: Side) -> str:
    import torch

    if side.device == "tpu" or (side.device == "gpu" and not torch.cuda.is_available()):
        raise CheckpointError(f"PyTorch finds no {side.device} here")
    return "cuda" if side.device == "gpu" else "cpu"


def _converted(tap: Tap, out: Callable[[Any], np.ndarray], back: Callable[[np.ndarray, Any], Any]) -> Callable[[str, Any], Any]:
    """A tap of float64 NumPy arrays for another library's. What it leaves alone is not converted back."""

    def converted(name: str, array: Any) -> Any:
        values = out(array)
        returned = tap(name, values)
        return array if returned is values else back(returned, array)

    return converted


_OPEN: dict[str, Callable[[Side, Checkpoint], Run]] = {
    "flax": _open_flax,
    "torch": _open_torch,
    "timm": _open_timm,
    "referee": _open_referee,
}
