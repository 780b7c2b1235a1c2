"""Checkpoint <-> model, for both frameworks; the Flax half here, the other in `torch_model`.

No weight is initialised to be thrown away, and none is set without its name, shape and dtype having been checked.
"""

__all__ = ["load", "save", "to_checkpoint"]

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from convert import Checkpoint, CheckpointError, memory, read, usual_layout, write
from convert.arrays import Array, Arrays, stacked
from convert.config import Gelu, Size
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
    rngs: "nnx.Rngs | None" = None,
    dtype: "DTypeLike | None" = None,
    param_dtype: "DTypeLike | None" = None,
    precision: "jax.lax.PrecisionLike" = None,
    remat: bool = False,
    sharding: "jax.Device | jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None" = None,
) -> "MlpMixer":
    """A Flax model with a checkpoint's weights, in eval mode. Sizes and class count are read off the file.

    `source` is a file, an Orbax folder or a Checkpoint, in any layout. `variant` refuses all but, say, "B/16"; another
    `num_classes` than the file's gives a fresh zero head, with a warning that says so; `num_blocks` and `image_size`
    (pixels) say what the file cannot; `gelu` and `layer_norm_epsilon` override its numerics; `key` names one of several sets
    of weights in it. Rates above 0 need `rngs`. `dtype`, `precision`, `rescale` and `remat` are MlpMixer's; `param_dtype`
    defaults to the file's. Dtypes are NumPy's, JAX's or PyTorch's, or their names. `sharding` places the weights: a device, a
    Sharding for all, or a function of name (`"blocks/token_mixing/dense_0/kernel"`) and shape. To train on a mesh with
    explicit axes the weights must lie on it: `NamedSharding(mesh, PartitionSpec())`.

    Raises CheckpointError for anything about the file that does not fit, naming every fault.
    """
    import jax
    import numpy as np
    from flax import nnx

    from .model import MlpMixer

    if (dropout_rate or stochastic_depth_rate) and rngs is None:
        raise ValueError("dropout and stochastic depth need rngs, as in load(..., rngs=flax.nnx.Rngs(0))")
    if dtype is not None:
        dtype = weights_dtype(dtype)
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
    ).to("flax")
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
    wanted = {"/".join(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    require_same(
        checkpoint.arrays, {name: (param.shape, param.dtype.name) for name, param in wanted.items()}, checkpoint.source
    )
    with memory.reused():
        for name, param in wanted.items():
            place = sharding(name, param.shape) if callable(sharding) else sharding
            array = checkpoint.arrays[name]
            values = np.asarray(array)
            if not getattr(array, "by_item", False):  # not put together for this call, so it may be somebody's
                values = np.array(values, order="C")  # and JAX keeps to NumPy's memory where it can
            wanted[name] = param.replace(jax.device_put(values, place))
    nnx.update(model, nnx.from_flat_state([(tuple(name.split("/")), param) for name, param in wanted.items()]))
    if rngs is not None:  # a model that draws nothing needs no key, which would be compiled
        model.seed(rngs)
    model.labels, model.preprocessing = checkpoint.metadata.labels, checkpoint.metadata.preprocessing
    model.eval()
    return model


def save(
    model: "MlpMixer",
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write a Flax model's weights with its numerics, grid, `model.labels` and `model.preprocessing`, whole or not at all.

    The ending of `path` says the format; `layout` defaults to what is usual in it: google in .npz, timm in .safetensors
    and .pt, flax in an Orbax folder. `dtype` rounds. An existing file is replaced only with `force`.
    """
    from .model import MlpMixer

    require_model(model, path, MlpMixer, other="mixer_jax.torch_model.save")
    write(path, to_checkpoint(model), layout=layout or usual_layout(path), dtype=dtype, force=force)


def to_checkpoint(model: "MlpMixer") -> Checkpoint:
    """A Flax model's weights, stacked or not, with all that makes them a function."""
    import numpy as np
    from flax import nnx

    parameters = [(path, np.asarray(param[...])) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    blocks: dict[str, list[Array]] = defaultdict(list)  # of an unstacked model, in order
    for path, array in sorted(parameters):
        if isinstance(path[1], int):
            blocks["/".join((path[0], *path[2:]))].append(array)
    arrays: dict[str, Array] = {"/".join(path): array for path, array in parameters if not isinstance(path[1], int)}
    arrays |= {name: stacked(items) for name, items in blocks.items()}
    return Checkpoint.of_model(arrays, "flax", model.config, labels=model.labels, preprocessing=model.preprocessing)


def require_model(model: object, path: object, kind: type, *, other: str) -> None:
    """Raise TypeError, saying what to do, unless `save` was given a model of its framework, and then a path."""
    if isinstance(model, kind):
        return
    if isinstance(path, kind):
        raise TypeError(f"save takes the model first and then the path, save(model, {str(model)!r})")
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    raise TypeError(f"save takes a {kind.__module__}.{kind.__qualname__}, not {found}; the other framework's is {other}")


def require_same(arrays: Arrays, wanted: Mapping[str, tuple[tuple[int, ...], str]], source: str) -> None:
    """Raise CheckpointError unless the arrays have exactly these names, each with its shape and dtype."""
    found = {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}
    wrong = [
        f"  {name}: found {found.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        raise CheckpointError("\n".join([f"{source}: the weights do not fit the model", *wrong]))
