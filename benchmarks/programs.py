"""Programs by their abstract arguments. `python programs.py TARGET REQUEST RESULT` compiles what ahead_of_time.py requests.

A builder takes devices and options and returns a jitted function and its arguments, as shapes with shardings.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from linen_mixer import MlpMixer as Linen
from worker import MOMENTUM, RATE

from convert import MixerConfig
from mixer_jax import MlpMixer
from mixer_jax.sharding.placement import Placement, mesh_of
from mixer_jax.training.recipe import Recipe
from mixer_jax.training.step import initial_state, make_train_step, with_weights

MEMORY = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
Built = tuple[Any, tuple[Any, ...]]


def forward(devices: Sequence[Any], **options: Any) -> Built:
    """The jitted function (parameters, images) -> logits, and its abstract arguments."""
    function, parameters, images, _ = _network(devices, **options)
    return jax.jit(function), (parameters, images)


def train_step(devices: Sequence[Any], **options: Any) -> Built:
    """One step of SGD with momentum on the cross-entropy, parameters and optimiser state updated in place."""
    function, parameters, images, labels = _network(devices, **options)
    optimizer, step = jitted_step(function)
    state = _placed(jax.eval_shape(optimizer.init, parameters), jax.tree.leaves(parameters)[0].sharding)
    return step, (parameters, state, images, labels)


def jitted_step(function: Callable[..., Any]) -> tuple[Any, Any]:
    """optax's SGD with momentum, and a jitted step on the cross-entropy that updates in place."""
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        logits = function(parameters, images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    return optimizer, step


def placed_forward(devices: Sequence[Any], **options: Any) -> Built:
    """The jitted function (weights by name, images) -> logits of a model on a mesh, and its abstract arguments."""
    model, state, (images, *_) = _placed_model(devices, Recipe(), **options)
    return jax.jit(lambda weights, images: with_weights(model, weights)(images)), (state.params, images)


def placed_step(
    devices: Sequence[Any], *, optimizer: str = "sgd", momentum_dtype: str | None = None, accumulation: int = 1, **options: Any
) -> Built:
    """One step of the official fine-tuning recipe on a mesh, the state updated in place, and its abstract arguments."""
    recipe = Recipe(optimizer=optimizer, momentum_dtype=momentum_dtype, accumulation=accumulation)
    model, state, batch = _placed_model(devices, recipe, **options)
    return jax.jit(make_train_step(model, recipe), donate_argnums=0), (state, *batch)


def _placed_model(
    devices: Sequence[Any],
    recipe: Recipe,
    *,
    batch: int,
    chips: int | None = None,
    mesh: str | None = None,
    split_weights: bool = False,
    variant: str = "B/16",
    sizes: dict[str, Any] | None = None,
    dtype: str | None = "bfloat16",
    remat: bool = False,
) -> tuple[MlpMixer, Any, tuple[Any, ...]]:
    """A model without weights, its state, and images, labels and key, as shapes with shardings; `batch` is the whole mesh's."""
    config = MixerConfig.named(variant).replace(**sizes or {})
    placement = Placement.checked(mesh_of(mesh, devices[:chips]), config, split_weights=split_weights, batch_size=batch)

    def create() -> MlpMixer:
        return MlpMixer(config, rngs=nnx.Rngs(0), remat=remat, dtype=dtype)

    state = jax.eval_shape(lambda: initial_state(create(), recipe))
    state = jax.tree.map(_shape, state, placement.tree(state))
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), jnp.float32, sharding=placement.images)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=placement.images)
    key = _shape(jax.eval_shape(lambda: jax.random.key(0)), placement.everywhere)
    model = nnx.eval_shape(create)
    model.placement = placement
    model.eval()
    return model, state, (images, labels, key)


def _network(
    devices: Sequence[Any],
    *,
    model: str,
    batch: int,
    variant: str = "B/16",
    blocks: int | None = None,
    dtype: str | None = "bfloat16",
    precision: str | None = None,
    param_dtype: str = "float32",
    unstacked: bool = False,
    remat: bool = False,
    data_parallel: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """The function, and its parameters, images and labels as shapes; `batch` is that of one device."""
    config = MixerConfig.named(variant)
    config = config.replace(num_blocks=blocks or config.num_blocks)
    mesh = Mesh(np.array(devices if data_parallel else devices[:1]), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    batch *= mesh.size
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    if model == "linen":
        linen = Linen(config, dtype=dtype, precision=precision)
        parameters = jax.eval_shape(linen.init, jax.random.key(0), images)
        parameters = jax.tree.map(lambda leaf: leaf.update(dtype=param_dtype), parameters)
        return linen.apply, _placed(parameters, replicated), images, labels

    def create() -> MlpMixer:
        numerics: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
        mixer = MlpMixer(config, rngs=nnx.Rngs(0), remat=remat, **numerics)
        return mixer.unstacked() if unstacked else mixer

    graphdef, parameters = nnx.split(nnx.eval_shape(create))

    def function(parameters: Any, images: Any) -> Any:
        return nnx.merge(graphdef, parameters)(images)

    return function, _placed(parameters, replicated), images, labels


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: _shape(leaf, sharding), tree)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def devices_of(target: str) -> list[Any]:
    if target.startswith("cpu:"):
        return jax.devices()
    description = Path(__file__).with_name("h100.txtpb").read_text()
    h100 = {"platform": "cuda", "topology": "1x1x1", "target_config": description}
    options = h100 if target == "h100" else {"platform": "tpu", "topology_name": target}
    return list(topologies.get_topology_desc(**options).devices)


def main(target: str, request: str, result: str) -> None:
    devices, programs = devices_of(target), []
    for builder, options, compiler_options in json.loads(Path(request).read_text()):
        module, _, function = builder.partition(":")
        jitted, arguments = getattr(importlib.import_module(module), function)(devices, **options)
        lowered = jitted.lower(*arguments)
        started = time.process_time()
        try:
            compiled = lowered.compile(compiler_options)
        except jax.errors.JaxRuntimeError as error:
            sys.exit(str(error)[:1000])  # what does not fit in memory, and by how much; a list of all arrays follows
        seconds = time.process_time() - started
        memory = compiled.memory_analysis()
        sizes = {name: getattr(memory, f"{size}_size_in_bytes") for name, size in MEMORY.items()}
        programs.append((compiled.as_text(), sizes.pop("temporaries"), seconds, sizes))
    Path(result).write_text(json.dumps(programs))


if __name__ == "__main__":
    main(*sys.argv[1:])
