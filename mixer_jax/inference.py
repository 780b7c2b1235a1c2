"""A model as one compiled function, for inference."""

__all__ = ["compiled"]

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from .inputs import cpu_microbatch
from .model import MlpMixer

Output = TypeVar("Output")


class Forward(Generic[Output]):
    """Images (b, h, w, channels) -> `outputs(model, images)` after `eval()`, with the weights at the time of `compiled`.

    Call it with images, or `lower` it with images or a jax.ShapeDtypeStruct.
    """

    def __init__(self, model: MlpMixer, outputs: Callable[[MlpMixer, jax.Array], Output]):
        concrete = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if not isinstance(leaf, jax.core.Tracer)]
        platforms = {device.platform for leaf in concrete for device in leaf.devices()}
        # A loop over stacked weights copies every block's weights; on a CPU a view of them costs nothing.
        self._model = model.unstacked() if platforms == {"cpu"} and model.placement is None else model
        graphdef, state = nnx.split(self._model)
        self._leaves, structure = jax.tree.flatten(state)
        itemsize = jnp.dtype(model.stem.dtype or model.stem.kernel.dtype).itemsize
        microbatch = cpu_microbatch(model.config, itemsize)

        def whole(leaves: list[jax.Array], images: jax.Array) -> Output:
            model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
            model.eval()
            return outputs(model, images)

        def in_microbatches(leaves: list[jax.Array], images: jax.Array) -> Output:
            single = jax.lax.map(lambda image: whole(leaves, image[None]), images, batch_size=microbatch)
            return jax.tree.map(lambda array: array[:, 0], single)

        def by_platform(leaves: list[jax.Array], images: jax.Array) -> Output:
            if len(images) <= microbatch:
                return whole(leaves, images)
            return jax.lax.platform_dependent(leaves, images, cpu=in_microbatches, default=whole)

        self._by_platform, self._whole = jax.jit(by_platform), jax.jit(whole)

    def __call__(self, images: ArrayLike) -> Output:
        images = self._model.checked(images)
        return self._program(images)(self._leaves, images)

    def lower(self, images: ArrayLike | jax.ShapeDtypeStruct, **options: Any) -> jax.stages.Lowered:
        """As `jax.jit(...).lower`; the program takes the list of weights, then images."""
        images = self._model.checked(images)
        return self._program(images).lower(self._leaves, images, **options)

    def _program(self, images: Any) -> Any:
        """Microbatches only for a batch known to be on one device: they would gather a batch that is spread over several."""
        traced = isinstance(images, jax.core.Tracer)
        on_one_device = not traced and (images.sharding is None or images.sharding.num_devices == 1)
        return self._by_platform if on_one_device else self._whole


def compiled(
    model: MlpMixer,
    outputs: Callable[[MlpMixer, jax.Array], Output] = MlpMixer.__call__,  # type: ignore[assignment]
) -> Forward[Output]:
    """The model as one function, compiled at the first call with each shape of images: logits, unless `outputs` is given.

    Later changes of the model's weights have no effect on it. A call of a tiny model takes a quarter of the time of
    `nnx.jit`, which handles every parameter in every call. On a CPU the blocks run one by one on views of the weights, and a
    batch on one CPU in microbatches. Elsewhere the blocks run in a loop, whose time to compile does not grow with depth;
    `compiled(model.unstacked())` unrolls it, which needs fewer temporaries on a TPU and copies every block's weights.
    """
    return Forward(model, outputs)
