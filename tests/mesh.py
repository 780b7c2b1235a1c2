"""Runs in a process of its own, on eight simulated devices: what every way to call a model gives on a mesh, as JSON lines."""

import contextlib
import json

import jax
import numpy as np
import optax
from conftest import TINY as THREE_BLOCKS
from conftest import random_images, random_weights
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sides import checkpoint

import mixer_jax

TINY = THREE_BLOCKS.replace(num_blocks=2)
WEIGHTS, IMAGES = random_weights(TINY, dtype="float64"), random_images(TINY, 16, dtype="float64")
KEY = jax.random.key(3, impl="unsafe_rbg")


def loaded(sharding=None):
    rates = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6, "rngs": nnx.Rngs(0)}
    return mixer_jax.load(checkpoint(WEIGHTS, TINY), param_dtype="float64", sharding=sharding, **rates)


def step(model, images):
    """A training step with dropout; the first kernel after it."""
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, images):
        gradients = nnx.grad(lambda model: (model(images, rngs=KEY) ** 2).mean())(model)
        optimizer.update(model, gradients)

    update(model, optimizer, images)
    return model.stem.kernel[...]


WAYS = {
    "call": lambda model, images: model(images),
    "jax.jit": lambda model, images: jax.jit(model)(images),
    "nnx.jit": lambda model, images: nnx.jit(lambda model, images: model(images))(model, images),
    "compiled": lambda model, images: mixer_jax.compiled(model)(images),
    "step": step,
}


def main():
    one = {name: np.asarray(way(loaded(), IMAGES)) for name, way in WAYS.items()}
    for axes in ("explicit", "auto"):
        mesh = jax.make_mesh((8,), ("data",), **({"axis_types": (AxisType.Auto,)} if axes == "auto" else {}))
        images = jax.device_put(IMAGES, NamedSharding(mesh, P("data")))
        for context, unstack in ((False, False), (True, False), (False, True)):
            for name, way in WAYS.items():
                # With explicit axes a gradient needs the weights on the mesh; a forward pass does not.
                model = loaded(NamedSharding(mesh, P()) if name == "step" else None)
                with jax.set_mesh(mesh) if context else contextlib.nullcontext():
                    found = way(model.unstacked() if unstack else model, images)
                error = np.abs(np.asarray(found) - one[name]).max() / np.abs(one[name]).max()
                shards = len({str(shard.index) for shard in found.addressable_shards})
                row = {"axes": axes, "context": context, "unstacked": unstack, "way": name}
                print(json.dumps(row | {"error": float(error), "shards": shards}))
        text = mixer_jax.compiled(loaded(NamedSharding(mesh, P()))).lower(images).compile().as_text()
        print(json.dumps({"axes": axes, "collectives": [name for name in ("all-gather", "all-to-all") if name in text]}))


if __name__ == "__main__":
    main()
