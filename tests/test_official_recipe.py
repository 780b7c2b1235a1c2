"""The official chain of optax, written out here as google-research/vision_transformer has it, to the last bit in float32."""

import math

import numpy as np
import pytest

from mixer_jax.training.recipe import Recipe, schedule, transformation

STEPS = 20
RECIPES = {
    "in warm-up": {},
    "through warm-up": {"warmup_steps": 5, "total_steps": 30},
    "no warm-up": {"warmup_steps": 0, "total_steps": 40},
}


def official_rate(step, base, warmup_steps, total_steps):
    import jax.numpy as jnp

    progress = jnp.clip((step - warmup_steps) / float(total_steps - warmup_steps), 0.0, 1.0)
    rate = base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    if warmup_steps:
        rate = rate * jnp.minimum(1.0, step / warmup_steps)
    return jnp.asarray(rate, jnp.float32)


def official_chain(recipe):
    import optax

    def rate(step):
        return official_rate(step, recipe.base_rate, recipe.warmup_steps, recipe.total_steps)

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(learning_rate=rate, momentum=0.9, accumulator_dtype="bfloat16")
    )


SHAPES = {"stem/kernel": (2, 3, 3, 7), "blocks/token_norm/scale": (3, 7), "blocks/token_mixing/dense_0/kernel": (3, 20, 11)}


def gradients(step):
    """With a norm of about 0.1, 1 or 20."""
    random = np.random.default_rng(step)
    arrays = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    norm = math.sqrt(sum((array**2).sum() for array in arrays.values()))
    return {name: (array * (0.1, 1.0, 20.0)[step % 3] / norm).astype("float32") for name, array in arrays.items()}


def run(tx):
    """The updates and momenta of each step, and the weights after the last; compiled, as training is."""
    import jax
    import optax

    @jax.jit
    def step(weights, state, gradients):
        updates, state = tx.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, updates

    weights = {name: jax.numpy.asarray(array) for name, array in gradients(-1 % 3).items()}
    state, record = tx.init(weights), []
    for i in range(STEPS):
        weights, state, updates = step(weights, state, gradients(i))
        record.append(jax.tree.map(np.asarray, (updates, optax.tree.get(state, "trace"))))
    return [leaf for entry in [*record, weights] for leaf in jax.tree.leaves(entry)]


def same_bits(one, other):
    return len(one) == len(other) and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, other)
    )


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_clipped_updates_and_momenta_are_the_official_ones_to_the_last_bit(name):
    recipe = Recipe(momentum_dtype="bfloat16", **RECIPES[name])
    assert same_bits(run(transformation(recipe)), run(official_chain(recipe)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_rate_is_the_official_one_to_the_last_bit(name):
    import jax

    recipe = Recipe(**RECIPES[name])
    steps = np.arange(min(recipe.total_steps, 10_000) + 10, dtype="int32")
    arguments = (recipe.base_rate, recipe.warmup_steps, recipe.total_steps)
    for compiled in (lambda f: jax.jit(jax.vmap(f))(steps), lambda f: np.array([f(step) for step in steps[:STEPS]])):
        assert same_bits([compiled(schedule(recipe))], [compiled(lambda step: official_rate(step, *arguments))])


def test_one_bit_of_the_rate_would_show():
    recipe, other = (
        Recipe(momentum_dtype="bfloat16"),
        Recipe(momentum_dtype="bfloat16", base_rate=math.nextafter(0.03, 1) + 3e-9),
    )
    assert not same_bits(run(transformation(other)), run(official_chain(recipe)))
