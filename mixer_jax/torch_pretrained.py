"""Checkpoint <-> PyTorch model. `pretrained` is the same for Flax, and says what the arguments mean."""

__all__ = ["load", "save", "to_checkpoint"]

import os

from convert import Checkpoint, usual_layout, write
from convert.tensors import from_torch, to_torch

from .pretrained import Source, checkpoint_for, require_fits, require_model
from .torch_model import MlpMixer, dtype_name, torch, torch_dtype


def load(
    source: Source,
    *,
    num_classes: int | None = None,
    dropout_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    rescale: bool = True,
    dtype: torch.dtype | str | None = None,
    param_dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    device: torch.device | str | None = None,
) -> MlpMixer:
    """A PyTorch model with a checkpoint's weights, in eval mode.

    Raises CheckpointError for everything about the file that does not fit.
    """
    dtype = None if dtype is None else torch_dtype(dtype, "dtype")
    checkpoint = checkpoint_for(source, num_classes, param_dtype).to("timm")
    with torch.device("meta"):
        model = MlpMixer(
            checkpoint.config,
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            rescale=rescale,
            dtype=dtype,
            param_dtype=torch_dtype(checkpoint.dtype, "param_dtype"),
            precision=precision,
        )
    shapes = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in model.state_dict().items()}
    require_fits(checkpoint.arrays, shapes, checkpoint.source)
    # Copied: an array may be somebody's or a file's, and a model is written to.
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
    """Write a PyTorch model's weights with its metadata, as `mixer_jax.save` does for a Flax model."""
    require_model(model, path, MlpMixer, other="mixer_jax.save")
    write(path, to_checkpoint(model), layout=layout or usual_layout(path), dtype=dtype, force=force)


def to_checkpoint(model: MlpMixer) -> Checkpoint:
    """A PyTorch model's weights and metadata. The arrays share the memory of weights on a CPU."""
    arrays = {name: from_torch(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint.of_model(arrays, "timm", model.config, labels=model.labels, preprocessing=model.preprocessing)
