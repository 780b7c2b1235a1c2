"""A model as one compiled function, for inference."""

__all__ = ["compiled"]

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from .images import few_enough
from .model import MlpMixer

Output = TypeVar("Output")


class Forward(Generic[Output]):
    """Images (b, h, w, channels) -> what `outputs(model, images)` gives after `eval()`, with the weights of now.

    Call it with images, or `lower` it with images or a jax.ShapeDtypeStruct.
    """

    def __init__(self, model: MlpMixer, outputs: Callable[[MlpMixer, jax.Array], Output]):
        known = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if not isinstance(leaf, jax.core.Tracer)]
        platforms = {device.platform for leaf in known for device in leaf.devices()}
        # A loop over stacked weights copies each block's part of them; a view of it costs a CPU nothing.
        self._model = model.unstacked() if platforms == {"cpu"} else model
        graphdef, state = nnx.split(self._model)
        self._leaves, structure = jax.tree.flatten(state)
        itemsize = jnp.dtype(model.stem.dtype or model.stem.kernel.dtype).itemsize
        few = few_enough(model.config, itemsize)

        def whole(leaves: list[jax.Array], images: jax.Array) -> Output:
            model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
            model.eval()
            return outputs(model, images)

        def sliced(leaves: list[jax.Array], images: jax.Array) -> Output:
            single = jax.lax.map(lambda image: whole(leaves, image[None]), images, batch_size=few)
            return jax.tree.map(lambda array: array[:, 0], single)

        def by_platform(leaves: list[jax.Array], images: jax.Array) -> Output:
            if len(images) <= few:
                return whole(leaves, images)
            return jax.lax.platform_dependent(leaves, images, cpu=sliced, default=whole)

        self._sliced, self._whole = jax.jit(by_platform), jax.jit(whole)

    def __call__(self, images: ArrayLike) -> Output:
        images = self._model.checked(images)
        return self._program(images)(self._leaves, images)

    def lower(self, images: ArrayLike | jax.ShapeDtypeStruct, **options: Any) -> jax.stages.Lowered:
        """What `jax.jit(...).lower` gives; the program takes the list of weights, then images."""
        images = self._model.checked(images)
        return self._program(images).lower(self._leaves, images, **options)

    def _program(self, images: Any) -> Any:
        """Slices would gather, on each device, a batch that is spread over several; of a traced one nobody knows."""
        known = not isinstance(images, jax.core.Tracer)
        alone = known and (images.sharding is None or images.sharding.num_devices == 1)
        return self._sliced if alone else self._whole


def compiled(
    model: MlpMixer,
    outputs: Callable[[MlpMixer, jax.Array], Output] = MlpMixer.__call__,  # type: ignore[assignment]
) -> Forward[Output]:
    """The model as one function, compiled once for each shape of images: logits after `eval()`, unless `outputs` differ.

    It has the weights that the model has now. A call of a tiny model takes a quarter of the time of `nnx.jit`, which goes
    through every parameter each time. Weights on a CPU are run block by block without copying them, and a batch that lies on
    one CPU passes a few images at a time; elsewhere the blocks are a loop, which compiles in the same time at any depth.
    `compiled(model.unstacked())` unrolls it there too: fewer temporaries in the program for a TPU.
    """
    return Forward(model, outputs)
