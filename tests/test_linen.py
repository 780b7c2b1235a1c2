"""The benchmarks' Linen network computes what ours does, so that benchmarks compare equal things."""

import numpy as np
import pytest
from conftest import random_images, random_weights
from sides import checkpoint, of_flax, of_referee

from convert import MixerConfig

CLOSE = 1e-10  # of the largest magnitude; measured: 8e-16 (goldens)
SQUARE_MLP = MixerConfig(  # where the two norms, and the two products of an MLP, can be swapped without a shape telling
    patch_size=(3, 3), image_size=(12, 12), num_blocks=2, hidden_dim=10, tokens_mlp_dim=16, channels_mlp_dim=10, num_classes=4
)


def of_linen(weights, images, config) -> np.ndarray:
    import jax
    from linen_mixer import MlpMixer

    with jax.enable_x64(True):
        variables = checkpoint(weights, config).astype("float64").as_linen()
        return np.asarray(MlpMixer(config).apply(variables, np.asarray(images, np.float64)))


def distance(found, wanted) -> float:
    """Largest difference relative to the largest magnitude."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_linen_gives_what_google_flax_and_the_referee_give(golden):
    found = of_linen(golden.weights, golden.images, golden.config)
    sides = (of_flax, of_referee)
    distances = [
        distance(found, golden.result),
        *(distance(found, f(golden.weights, golden.images, golden.config)) for f in sides),
    ]
    print(f"{golden.name}: {max(distances):.1e} of the largest")
    assert max(distances) < CLOSE


def test_linen_names_its_parameters_as_google_does(golden):
    import jax
    from linen_mixer import MlpMixer

    made = jax.eval_shape(MlpMixer(golden.config).init, jax.random.key(0), golden.images[:1])
    wanted = checkpoint(golden.weights, golden.config).as_linen()
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, wanted)


def test_linen_keeps_to_a_dtype(square):
    import jax.numpy as jnp
    from linen_mixer import MlpMixer

    variables = checkpoint(square.weights, square.config).as_linen()
    exact = of_linen(square.weights, square.images, square.config)
    found = MlpMixer(square.config, dtype=jnp.bfloat16).apply(variables, square.images)
    assert found.dtype == jnp.bfloat16
    assert 1e-4 < distance(np.asarray(found, np.float64), exact) < 0.1  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("fault", [{"gelu": "exact"}, {"layer_norm_epsilon": 1e-5}])
def test_other_numerics_are_seen(fault, golden):
    other = of_flax(golden.weights, golden.images, golden.config.replace(**fault))
    assert distance(of_linen(golden.weights, golden.images, golden.config), other) > 1e4 * CLOSE


@pytest.mark.parametrize(
    ("a", "b"), [("LayerNorm_0", "LayerNorm_1"), ("token_mixing/Dense_0/kernel", "token_mixing/Dense_1/kernel")]
)
def test_weights_in_a_wrong_place_are_seen(a, b):
    weights, images = random_weights(SQUARE_MLP), random_images(SQUARE_MLP)
    wanted = of_flax(weights, images, SQUARE_MLP)
    assert distance(of_linen(weights, images, SQUARE_MLP), wanted) < CLOSE

    def moved(name: str) -> str:
        _, _, rest = name.partition("MixerBlock_0/")
        return name.replace(a, b) if rest.startswith(a) else name.replace(b, a) if rest.startswith(b) else name

    swapped = {name: weights[moved(name)] for name in weights}
    assert distance(of_linen(swapped, images, SQUARE_MLP), wanted) > 1e-3
