"""The implementations that parity compares, behind one call: which one, where it runs, what it computes in."""

__all__ = ["Implementation"]

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError
from convert.dtypes import SHORT_NAMES

from .numpy_model import Hook, forward
from .programs import PROGRAMS, device_of, dtype_of, open_program
from .rounding import Rounding

# Images (b, h, w, c) and a hook or None -> logits. A hook that returns the array it was given changes nothing.
Run = Callable[[np.ndarray, Hook | None], np.ndarray]
DTYPES = ("float32", "float64", "bfloat16", "float16")
PRECISIONS = ("highest", "high", "default")
ALIASES = SHORT_NAMES | {"cuda": "gpu"}  # other words that people type
# How a device's matmul unit takes float32 operands at each precision; where several are possible, the largest tolerance holds.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(PRECISIONS, ("float32",)),
    "gpu": dict.fromkeys(PRECISIONS, ("tf32", "tf32_truncated")) | {"highest": ("float32",)},
    "tpu": {"highest": ("bfloat16_6x",), "high": ("bfloat16_3x",), "default": ("bfloat16",)},
}


@dataclass(frozen=True)
class Implementation:
    """An implementation on a device: `name` is "flax", "torch", "timm" or "numpy", the NumPy model in float64 on the CPU.

    It computes in `dtype` (weights are rounded to it, but stored in at least float32), with matmuls at `precision`, as JAX
    names it. In PyTorch every precision but "highest" allows TF32 on a GPU. The Flax model computes on all devices of a kind
    with a `mesh` such as "data=2,model=4". "onnx", "openvino", "stablehlo" and "pt2" run the exported program at `path`.
    """

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    precision: str = "highest"
    mesh: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        allowed = {"name": tuple(_OPEN), "device": tuple(UNITS), "dtype": DTYPES, "precision": PRECISIONS}
        for entry, values in allowed.items():
            if getattr(self, entry) not in values:
                raise ValueError(f"{getattr(self, entry)!r} is not a {entry} of an implementation: {', '.join(values)}")
        if self.name == "numpy" and (self.device, self.dtype) != ("cpu", "float64"):
            raise ValueError("the NumPy model computes in float64 on the CPU")
        if (self.name in PROGRAMS) != bool(self.path):
            raise ValueError(f"{self.name} runs the program of a file: {self.name}:FILE, as in onnx:model.onnx")

    @classmethod
    def parse(cls, text: str, dtype: str = "float32") -> "Implementation":
        """ "flax", "flax:gpu", "torch:cuda:bf16" or "torch:cpu:bfloat16:default"; `dtype` holds where the text has none.

        "onnx:model.onnx", which computes in what the file says. Raises CheckpointError for a file that is no such program.
        """
        program, _, path = text.partition(":")
        if program in PROGRAMS and path:
            return cls(program, device=device_of(program), dtype=dtype_of(program, path), path=path)
        name, *rest = (ALIASES.get(word, word) for word in text.split(":"))
        if len(rest) > 3:
            raise ValueError(f"an implementation is NAME[:DEVICE[:DTYPE[:PRECISION]]], not {text!r}")
        entries = {"dtype": "float64" if name == "numpy" else dtype} | dict(zip(("device", "dtype", "precision"), rest))
        return cls(name, **entries)

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.name}:{self.path}"
        text = ":".join((self.name, self.device, self.dtype, self.precision)) if self.name != "numpy" else self.name
        return text if self.mesh is None else f"{text} on {self.mesh}"

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """The ways in which it may round, by the kind of its device."""
        units = UNITS[self.device][self.precision] if self.dtype != "float64" else ("float32",)
        return tuple(Rounding(self.dtype, unit) for unit in units)

    def open(self, checkpoint: Checkpoint) -> Run:
        """Load the weights. Raises CheckpointError where the device is not there, ImportError where a package is not."""
        return _OPEN[self.name](self, checkpoint)

    def device_name(self) -> str:
        """The name that the maker gave the device."""
        if self.name in ("flax", "stablehlo") and self.device != "cpu":
            return str(_jax_device(self).device_kind)
        if self.device == "gpu":
            import torch

            return str(torch.cuda.get_device_name())
        return self.device


def _open_numpy(implementation: Implementation, checkpoint: Checkpoint) -> Run:
    config, weights = checkpoint.config, checkpoint.to("google").as_numpy()
    return lambda images, hook: forward(config, weights, images, hook=hook or (lambda name, array: array))


def _open_flax(implementation: Implementation, checkpoint: Checkpoint) -> Run:
    import jax
    import jax.numpy as jnp

    from ..pretrained import load
    from ..sharding.processes import whole

    device = _jax_device(implementation)
    context: Callable[[], Any] = (lambda: jax.enable_x64(True)) if implementation.dtype == "float64" else contextlib.nullcontext
    dtype = jnp.dtype(implementation.dtype)
    stored = jnp.promote_types(dtype, jnp.float32)
    with context():
        placement = _placement(implementation, checkpoint, None)
        options: dict[str, Any] = {"param_dtype": stored, "dtype": dtype, "precision": implementation.precision}
        model = load(checkpoint, sharding=placement or device, **options)

    def from_jax(array: Any) -> np.ndarray:
        return whole(array).astype(np.float64)

    def to_jax(values: np.ndarray, like: Any) -> Any:
        values = values.astype(like.dtype)
        return jax.make_array_from_callback(values.shape, like.sharding, lambda index: values[index])

    def run(images: np.ndarray, hook: Hook | None) -> np.ndarray:
        with context():
            images, split = images.astype(stored), _placement(implementation, checkpoint, len(images))
            x = jax.device_put(images, device) if split is None else split.put(images)
            logits = _forward()(model, x) if hook is None else model(x, hook=_converted(hook, from_jax, to_jax))
            return from_jax(logits)

    return run


def _placement(implementation: Implementation, checkpoint: Checkpoint, batch_size: int | None) -> Any:
    """On its mesh, if it has one. Raises CheckpointError where that does not divide the widths or the batch."""
    import jax

    from ..sharding.placement import Placement, mesh_of

    if implementation.mesh is None:
        return None
    try:
        mesh = mesh_of(implementation.mesh, jax.devices(implementation.device))
        return Placement.checked(mesh, checkpoint.config, batch_size=batch_size)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


@functools.cache
def _forward() -> Any:
    """The compiled forward pass, one for all models, so that models of one shape compile once."""
    from flax import nnx

    return nnx.jit(lambda model, images: model(images))


def _jax_device(implementation: Implementation) -> Any:
    import jax

    try:
        return jax.devices(implementation.device)[0]
    except RuntimeError as error:
        raise CheckpointError(f"JAX finds no {implementation.device} here: {error}") from None


def _open_torch(implementation: Implementation, checkpoint: Checkpoint) -> Run:
    import torch

    from .. import torch_pretrained

    dtype, device = getattr(torch, implementation.dtype), _torch_device(implementation)
    stored, precision = torch.promote_types(dtype, torch.float32), implementation.precision
    model = torch_pretrained.load(checkpoint, param_dtype=stored, dtype=dtype, precision=precision, device=device)
    return _run_torch(model, lambda images, hook: model(images) if hook is None else model(images, hook=hook), stored)


def _open_timm(implementation: Implementation, checkpoint: Checkpoint) -> Run:
    try:
        from timm.models.mlp_mixer import MlpMixer
    except ImportError as error:
        raise ImportError(f"comparing with timm needs timm and torchvision: pip install timm ({error})") from None
    import torch

    from ..torch_model import tf32_switches

    config, dtype = checkpoint.config, getattr(torch, implementation.dtype)
    if not config.num_classes:
        raise CheckpointError("timm's model needs a head, and this checkpoint has none")
    model = MlpMixer(
        num_classes=config.num_classes,
        img_size=config.image_size,
        in_chans=config.in_channels,
        patch_size=config.patch_size,
        num_blocks=config.num_blocks,
        embed_dim=config.hidden_dim,
        # timm truncates width x ratio to an integer
        mlp_ratio=tuple((width + 0.5) / config.hidden_dim for width in (config.tokens_mlp_dim, config.channels_mlp_dim)),
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=config.layer_norm_epsilon),
        act_layer=functools.partial(torch.nn.GELU, approximate={"tanh": "tanh", "exact": "none"}[config.gelu]),
    ).eval()
    model.load_state_dict(checkpoint.astype("float32").to("timm").as_torch(), strict=True)
    model.to(_torch_device(implementation), dtype)

    def forward(images: Any, hook: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for handle in [] if hook is None else _hooks(model, hook):
                stack.enter_context(handle)
            stack.enter_context(tf32_switches(implementation.precision))
            return model(images)

    return _run_torch(model, forward, dtype)


def _hooks(model: Any, hook: Any) -> list[Any]:
    """Hooks on timm's operations, under our names: results by forward hooks, sums and the mean as the next module's input."""
    results, inputs = {"stem": model.stem, "pre_head_norm": model.norm, "head": model.head}, {"mean": model.head}
    for i, block in enumerate(model.blocks):
        ours = f"blocks/{i}"
        results |= {f"{ours}/token_norm": block.norm1, f"{ours}/channel_norm": block.norm2, f"{ours}/channel_mixing/sum": block}
        inputs[f"{ours}/token_mixing/sum"] = block.norm2
        for mixing, mlp in (("token_mixing", block.mlp_tokens), ("channel_mixing", block.mlp_channels)):
            operations = {"dense_0": mlp.fc1, "gelu": mlp.act, "dense_1": mlp.fc2}
            results |= {f"{ours}/{mixing}/{name}": module for name, module in operations.items()}

    def result(name: str) -> Any:
        return lambda module, arguments, output: hook(name, output)

    def argument(name: str) -> Any:
        return lambda module, arguments: (hook(name, arguments[0]), *arguments[1:])

    handles = [module.register_forward_hook(result(name)) for name, module in results.items()]
    return handles + [module.register_forward_pre_hook(argument(name)) for name, module in inputs.items()]


def _run_torch(model: Any, forward: Callable[[Any, Any], Any], dtype: Any) -> Run:
    import torch

    def from_torch(tensor: Any) -> np.ndarray:
        return tensor.double().cpu().numpy()

    def to_torch(values: np.ndarray, like: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)

    def run(images: np.ndarray, hook: Hook | None) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(next(model.parameters()).device, dtype)
        with torch.inference_mode():
            return from_torch(forward(x, None if hook is None else _converted(hook, from_torch, to_torch)))

    return run


def _open_program(implementation: Implementation, checkpoint: Checkpoint) -> Run:
    assert implementation.path is not None
    return open_program(implementation.name, implementation.path, checkpoint)


def _torch_device(implementation: Implementation) -> str:
    import torch

    if implementation.device == "tpu" or (implementation.device == "gpu" and not torch.cuda.is_available()):
        raise CheckpointError(f"PyTorch finds no {implementation.device} here")
    return "cuda" if implementation.device == "gpu" else "cpu"


def _converted(
    hook: Hook, out: Callable[[Any], np.ndarray], back: Callable[[np.ndarray, Any], Any]
) -> Callable[[str, Any], Any]:
    """A hook of float64 NumPy arrays as one of another library's. An array returned unchanged is not converted back."""

    def converted(name: str, array: Any) -> Any:
        values = out(array)
        result = hook(name, values)
        return array if result is values else back(result, array)

    return converted


_OPEN = {"flax": _open_flax, "torch": _open_torch, "timm": _open_timm, "numpy": _open_numpy} | dict.fromkeys(
    PROGRAMS, _open_program
)
