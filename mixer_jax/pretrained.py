"""Checkpoint <-> Flax model. `torch_pretrained` is the same for PyTorch.

No weight is initialised to be thrown away, and none is set before its name, shape and dtype have been checked.
"""

__all__ = ["load", "save", "to_checkpoint"]

import contextlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import Checkpoint, CheckpointError, ReadOptions, read, usual_layout, write
from convert.arrays import Array, Arrays, is_by_item, stacked
from convert.dtypes import weights_dtype

if TYPE_CHECKING:
    import jax
    from flax import nnx
    from jax.typing import DTypeLike

    from .model import MlpMixer

Source = str | os.PathLike[str] | Checkpoint


def load(
    source: Source,
    *,
    num_classes: int | None = None,
    dropout_rate: float = 0.0,
    stochastic_depth_rate: float = 0.0,
    rescale: bool = True,
    rngs: "nnx.Rngs | None" = None,
    dtype: "DTypeLike | None" = None,
    param_dtype: "DTypeLike | None" = None,
    precision: "jax.lax.PrecisionLike" = None,
    remat: bool = False,
    sharding: "jax.Device | jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None" = None,
) -> "MlpMixer":
    """A Flax model with a checkpoint's weights, in eval mode.

    `source` is a file or a folder in any layout and format, the name of a published file, "hf:owner/name", or a Checkpoint:
    `load(convert.read(file, ReadOptions(key="ema")))` for all options of reading. Another `num_classes`
    than the file's gives a new head of zeros, with a warning; 0 gives a model that returns features.

    Rates above 0 need `rngs`. `dtype`, `precision`, `rescale` and `remat` are MlpMixer's; `param_dtype` defaults to the
    file's. Dtypes are NumPy's, JAX's or PyTorch's, or their names. `sharding` places the weights: a device, a Sharding for
    all, a function of name ("blocks/token_mixing/dense_0/kernel") and shape, or a `sharding.placement.Placement`.

    Raises CheckpointError for everything about the file that does not fit.
    """
    from flax import nnx

    from .model import MlpMixer
    from .sharding.placement import Placement

    if (dropout_rate or stochastic_depth_rate) and rngs is None:
        raise ValueError("dropout and stochastic depth need rngs, as in load(..., rngs=flax.nnx.Rngs(0))")
    dtype = None if dtype is None else weights_dtype(dtype)
    checkpoint = checkpoint_for(source, num_classes, param_dtype).to("flax")
    model = nnx.eval_shape(
        lambda: MlpMixer(
            checkpoint.config,
            rngs=nnx.Rngs(0),
            dropout_rate=dropout_rate,
            stochastic_depth_rate=stochastic_depth_rate,
            rescale=rescale,
            dtype=dtype,
            param_dtype=checkpoint.dtype,
            precision=precision,
            remat=remat,
        )
    )
    _set_params(model, checkpoint, sharding)
    if isinstance(sharding, Placement):
        model.placement = sharding
    if rngs is not None:  # without randomness no key is needed, and none is compiled
        model.seed(rngs)
    model.labels, model.preprocessing = checkpoint.metadata.labels, checkpoint.metadata.preprocessing
    model.eval()
    return model


def _set_params(model: "MlpMixer", checkpoint: Checkpoint, sharding: Any) -> None:
    """Replace the abstract parameters of a model by a checkpoint's arrays, after all of them have been checked."""
    import jax
    from flax import nnx

    params = {"/".join(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    shapes = {name: (param.shape, param.dtype.name) for name, param in params.items()}
    require_fits(checkpoint.arrays, shapes, checkpoint.source)
    for name, param in params.items():
        array, place = checkpoint.arrays[name], sharding(name, param.shape) if callable(sharding) else sharding
        if isinstance(place, jax.sharding.Sharding) and place.num_devices > 1:
            params[name] = param.replace(_split(array, place))
            continue
        values = np.asarray(array)
        if not is_by_item(array):  # not fresh, so it may be somebody's, and on a CPU JAX shares memory with NumPy
            values = np.array(values, order="C")
        params[name] = param.replace(jax.device_put(values, place))
    nnx.update(model, nnx.from_flat_state([(tuple(name.split("/")), param) for name, param in params.items()]))


def _split(array: Array, sharding: "jax.sharding.Sharding") -> "jax.Array":
    """An array on several devices. Of one that is assembled from items, one item at a time is in memory beside the parts."""
    import jax

    shape = tuple(array.shape)
    places: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
    parts: dict[str, np.ndarray] = {}  # by index: devices may hold the same part
    if is_by_item(array):
        for i in range(shape[0]):
            item = np.asarray(array[i])
            for index in {str(index): index for index in places.values()}.values():
                first, own = index[0].indices(shape[0]), item[index[1:]]
                part = parts.setdefault(str(index), np.empty((first[1] - first[0], *own.shape), own.dtype))
                if first[0] <= i < first[1]:
                    part[i - first[0]] = own
    else:
        values = np.asarray(array)
        parts = {str(index): np.array(values[index], order="C") for index in places.values()}
    shards = [jax.device_put(parts[str(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def save(
    model: "MlpMixer",
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write a Flax model's weights with its numerics, grid, `model.labels` and `model.preprocessing`, completely or not at all.

    The ending of `path` decides the format; `layout` defaults to the usual one: google in .npz, timm in .safetensors and
    .pt, flax in .msgpack and an Orbax folder. `dtype` casts. An existing file is replaced only with `force`. A model on
    devices of several processes is saved by a call in all of them, and written by the first.
    """
    from .model import MlpMixer
    from .sharding.processes import all_or_none, is_first

    require_model(model, path, MlpMixer, other="mixer_jax.torch_pretrained.save")
    shared = model.placement is not None and not model.placement.everywhere.is_fully_addressable
    checkpoint = to_checkpoint(model)
    with all_or_none() if shared else contextlib.nullcontext():
        if is_first() or not shared:
            write(path, checkpoint, layout=layout or usual_layout(path), dtype=dtype, force=force)


def to_checkpoint(model: "MlpMixer") -> Checkpoint:
    """A Flax model's weights and metadata, whether its blocks are stacked or not."""
    from flax import nnx

    from .sharding.processes import whole

    params = [(path, whole(param[...])) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    blocks: dict[str, list[Array]] = defaultdict(list)  # of an unstacked model, in order
    for path, array in sorted(params):
        if isinstance(path[1], int):
            blocks["/".join((path[0], *path[2:]))].append(array)
    arrays: dict[str, Array] = {"/".join(path): array for path, array in params if not isinstance(path[1], int)}
    arrays |= {name: stacked(items) for name, items in blocks.items()}
    return Checkpoint.of_model(arrays, "flax", model.config, labels=model.labels, preprocessing=model.preprocessing)


def checkpoint_for(source: Source, num_classes: int | None, param_dtype: object) -> Checkpoint:
    """The checkpoint of a source with the head and the dtype that a model is to have."""
    dtype = None if param_dtype is None else weights_dtype(param_dtype, "param_dtype")
    checkpoint = source if isinstance(source, Checkpoint) else read(source, ReadOptions(dtype=dtype))
    try:
        checkpoint.require_depth()
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None
    classes = checkpoint.sizes["num_classes"]
    checkpoint = checkpoint if num_classes is None else checkpoint.with_classes(num_classes)
    if num_classes not in (None, 0, classes):
        warnings.warn(f"{checkpoint.source}: the head for {classes} classes is now zeros for {num_classes}", stacklevel=3)
    return checkpoint if dtype is None else checkpoint.astype(dtype)


def require_model(model: object, path: object, kind: type, *, other: str) -> None:
    """Raise TypeError, with a remedy, unless `save` was given a model of its framework and then a path."""
    if isinstance(model, kind):
        return
    if isinstance(path, kind):
        raise TypeError(f"save takes the model first and then the path, save(model, {str(model)!r})")
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(f"save takes a {kind.__module__}.{kind.__qualname__}, not {found}; the other framework's is {other}")


def require_fits(arrays: Arrays, expected: Mapping[str, tuple[tuple[int, ...], str]], source: str) -> None:
    """Raise CheckpointError unless the arrays have exactly these names, each with its shape and dtype."""
    actual = {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}
    wrong = [
        f"  {name}: found {actual.get(name, 'nothing')}, wanted {expected.get(name, 'nothing')}"
        for name in sorted(actual.keys() | expected.keys())
        if actual.get(name) != expected.get(name)
    ]
    if wrong:
        raise CheckpointError("\n".join([f"{source}: the weights do not fit the model", *wrong]))
