"""Where the weights, the optimiser's state and the images live on a mesh of devices: one table, by the names of the weights."""

__all__ = ["Placement", "mesh_of"]

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convert import MixerConfig

DATA, MODEL = "data", "model"  # the axes of a mesh: images are split over the first, widths of MLPs over the second

# The size along each axis of a weight that may be split; in front of it a stacked block's weight has the axis of the blocks.
# Vectors without such an axis are on every device: all of them together are a thousandth of the weights.
SIZES = {
    "stem/kernel": (None, None, None, "hidden_dim"),
    "token_mixing/dense_0/kernel": (None, "tokens_mlp_dim"),
    "token_mixing/dense_0/bias": ("tokens_mlp_dim",),
    "token_mixing/dense_1/kernel": ("tokens_mlp_dim", None),
    "channel_mixing/dense_0/kernel": (None, "channels_mlp_dim"),
    "channel_mixing/dense_0/bias": ("channels_mlp_dim",),
    "channel_mixing/dense_1/kernel": ("channels_mlp_dim", None),
    "head/kernel": ("hidden_dim", None),
}
WIDTHS = ("tokens_mlp_dim", "channels_mlp_dim")  # split over `model`: each MLP then ends in one sum over it


def mesh_of(text: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a text such as "data=4,model=2" names; by default all devices are on data.

    Raises ValueError for another axis, and unless the sizes multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {DATA: len(devices), MODEL: 1}
    if text is not None:
        parts = [part.partition("=") for part in text.split(",")]
        if wrong := [name for name, _, size in parts if name not in sizes or not size.isdecimal() or not int(size)]:
            raise ValueError(f"mesh {text!r}: {wrong[0]!r} is not data=N or model=N")
        sizes = {DATA: 1, MODEL: 1} | {name: int(size) for name, _, size in parts}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {DATA}={sizes[DATA]},{MODEL}={sizes[MODEL]} is not of {len(devices)} devices, which there are")
    grid = np.array(devices).reshape(sizes[DATA], sizes[MODEL])
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclass(frozen=True)
class Placement:
    """What is where on a mesh with the axes data and model: `placement(name, shape)` is the sharding of a weight.

    Images are split over data. The hidden widths of both MLPs are split over model (tensor parallelism), so that each half of a
    block sums once over it. With `split_weights` every kernel is split over data too, and with it its gradient and its part
    of the optimiser's state (fully sharded data parallelism): a block's kernels are gathered when it runs.

    The axes may be explicit, `AxisType.Explicit`: weights, gradients and logits then have these shardings in their types.
    Inside the model the axes are automatic, so masks and what a hook returns may not have them.
    """

    mesh: Mesh
    split_weights: bool = False

    @classmethod
    def checked(cls, mesh: Mesh, config: MixerConfig, *, split_weights: bool = False, batch_size: int | None = None) -> Self:
        """Raises ValueError, naming what would do, for a width or a batch that the mesh does not divide."""
        placement = cls(mesh, split_weights)
        over = dict.fromkeys(WIDTHS, mesh.shape[MODEL] * (mesh.shape[DATA] if split_weights else 1))
        over["hidden_dim"] = mesh.shape[DATA] if split_weights else 1
        for name, parts in over.items():
            if (size := getattr(config, name)) % parts:
                divisors = ", ".join(str(n) for n in range(1, size + 1) if not size % n)
                raise ValueError(f"{name} {size} cannot be split into {parts} parts; it can into {divisors}")
        if batch_size is not None and batch_size % mesh.shape[DATA]:
            raise ValueError(f"a batch of {batch_size} images cannot be split over data={mesh.shape[DATA]}")
        return placement

    def __call__(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding in which a weight is kept, by the Flax model's name and the shape."""
        return self._sharding(name, len(shape), kept=True)

    @property
    def images(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(DATA))

    @property
    def everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def put(self, batch: np.ndarray) -> jax.Array:
        """A batch split over data, of which this process needs to have its own `rows` alone."""
        return jax.make_array_from_callback(batch.shape, self.images, lambda index: batch[index])

    def gathered(self, outputs: Any) -> Any:
        """Arrays of a compiled function, whole on every device."""
        return jax.lax.with_sharding_constraint(outputs, self.everywhere)

    def rows(self, batch_size: int) -> np.ndarray:
        """The rows of a batch that devices of this process hold."""
        indices = self.images.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))

    @property
    def is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types

    def automatic(self, function: Callable[..., jax.Array], *, like: jax.Array) -> Callable[..., jax.Array]:
        """A function of arrays on the mesh, with automatic axes inside; its result's batch is split as that of `like`."""
        batch = jax.typeof(like).sharding.spec[:1]
        return jax.sharding.auto_axes(function, out_sharding=NamedSharding(self.mesh, P(*batch)))

    def used(self, name: str, weight: jax.Array) -> jax.Array:
        """A weight as it is computed with: gathered over data. Its gradient is split again where it arises."""
        if not self.split_weights:
            return weight
        inside = replace(self, mesh=self.mesh.update(axis_types=(AxisType.Auto,) * len(self.mesh.axis_names)))
        kept, gathered = (inside._sharding(name, weight.ndim, kept=kept) for kept in (True, False))
        return weight if kept == gathered else _gather(weight, kept, gathered)

    def tree(self, tree: Any) -> Any:
        """The shardings of a state's arrays: each by the name of the weight that it belongs to."""

        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [str(part.key) for part in path if hasattr(part, "key")]
            return self(names[-1], leaf.shape) if leaf.ndim else self.everywhere

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def _sharding(self, name: str, ndim: int, *, kept: bool) -> NamedSharding:
        within = re.sub(r"^blocks/(\d+/)?", "", name)
        over_data = (DATA,) if kept and self.split_weights and name.endswith("/kernel") else ()
        axes = [((MODEL,) if size in WIDTHS else ()) + over_data if size else None for size in SIZES.get(within, ())]
        return NamedSharding(self.mesh, P(*[None] * (ndim - len(axes)), *axes))


def _gather(weight: jax.Array, kept: NamedSharding, gathered: NamedSharding) -> jax.Array:
    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(weight, gathered)

    gather.defvjp(
        lambda weight: (gather(weight), None), lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),)
    )
    return gather(weight)
