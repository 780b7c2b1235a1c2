"""A model as one compiled function, for inference."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from .images import few_enough
from .model import MlpMixer

Output = TypeVar("Output")


def compiled(
    model: MlpMixer,
    outputs: Callable[[MlpMixer, jax.Array], Output] = MlpMixer.__call__,  # type: ignore[assignment]
) -> Callable[[ArrayLike], Output]:
    """Images (b, h, w, channels) -> what `outputs(model, images)` gives after `eval()`: the logits, unless said.

    Compiled once for each shape of images, with the weights that the model has now. A call of a tiny model takes a quarter of
    the time of `nnx.jit`, which goes through every parameter each time. On a CPU a batch passes a few images at a time.
    `compiled(model.unstacked())` copies no weights, at the price of a compilation that takes time by the block: a few per
    cent faster on a CPU, fewer temporaries in the program for a TPU.
    """
    few = few_enough(model.config, jnp.dtype(model.stem.dtype or model.stem.kernel.dtype).itemsize)
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)

    def whole(leaves: list[jax.Array], images: jax.Array) -> Output:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        model.eval()
        return outputs(model, images)

    def sliced(leaves: list[jax.Array], images: jax.Array) -> Output:
        single = jax.lax.map(lambda image: whole(leaves, image[None]), images, batch_size=few)
        return jax.tree.map(lambda array: array[:, 0], single)

    @jax.jit
    def forward(leaves: list[jax.Array], images: jax.Array) -> Output:
        if len(images) <= few:
            return whole(leaves, images)
        return jax.lax.platform_dependent(leaves, images, cpu=sliced, default=whole)

    return lambda images: forward(leaves, model.checked(images))
