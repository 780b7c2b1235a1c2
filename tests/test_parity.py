"""The models against the referee and each other, on weights nobody computed anything from before."""

import numpy as np
import pytest
from conftest import random_images, random_weights
from einops import rearrange
from sides import SIDES, flax_model, of_referee, twin_model

from convert import MixerConfig
from mixer_jax.parity import agreement

sides = pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])
# As many tokens as channels, and square kernels, so that no fault below is caught by a shape.
CONFIG = MixerConfig(
    patch_size=(4, 4), image_size=(16, 16), num_blocks=3, hidden_dim=16, tokens_mlp_dim=16, channels_mlp_dim=16, num_classes=6
)


@pytest.fixture(scope="module")
def b16():
    config = MixerConfig.named("B/16")
    weights, images = random_weights(config), random_images(config)
    return config, weights, images, of_referee(weights, images, config)


@sides
def test_float32_b16_is_the_referee_to_float32(side, b16):
    config, weights, images, wanted = b16
    if side == "flax":
        found = np.asarray(flax_model(weights, config, param_dtype="float32", precision="highest")(images))
    else:
        import torch

        with torch.inference_mode():
            model = twin_model(weights, config, param_dtype=torch.float32, precision="highest")
            found = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    a = agreement(found, wanted)
    print(f"B/16 float32, {side}: {a.largest / a.scale:.1e} of the largest logit")
    assert a.largest <= 2e-6 * a.scale  # measured: 5.6e-7 by Flax, 4.2e-7 by the twin
    assert a.same_class == 1


# Sabotage of one side. Each fault is planted through the tap or the parameters of a loaded model, and must show against
# the referee in float64, where an honest side agrees to 1e-12.


class Plant:
    """A tap that knows what came before, so that it can undo or replace it."""

    def __init__(self, fault):
        self.fault, self.before = fault, {}

    def __call__(self, name, array):
        self.before[name] = array
        return getattr(self, self.fault)(name, array)

    def column_major_patches(self, name, array):
        return rearrange(array, "b (gh gw) c -> b (gw gh) c", gh=4) if name == "stem" else array

    def mean_over_channels(self, name, array):
        return rearrange(array, "b n c -> b c n") if name == "pre_head_norm" else array

    def dropped_residual(self, name, array):
        if name == "blocks/1/channel_mixing/sum":
            return self.before["blocks/1/channel_mixing/dense_1"]
        return array

    def no_token_transpose_back(self, name, array):
        return rearrange(array, "b c n -> b n c") if name == "blocks/2/token_mixing/dense_1" else array


def plant_in_weights(fault, weights):
    """The same faults of bookkeeping in a model, as other weights in its places."""
    w = dict(weights)
    if fault == "shared norm":
        for i in range(CONFIG.num_blocks):
            for leaf in ("scale", "bias"):
                w[f"MixerBlock_{i}/LayerNorm_1/{leaf}"] = w[f"MixerBlock_{i}/LayerNorm_0/{leaf}"]
    elif fault == "block order":
        last = CONFIG.num_blocks - 1
        for name in weights:
            if name.startswith("MixerBlock_"):
                index, rest = name.removeprefix("MixerBlock_").split("/", 1)
                w[name] = weights[f"MixerBlock_{last - int(index)}/{rest}"]
    elif fault == "dropped bias":
        w["MixerBlock_1/channel_mixing/Dense_1/bias"] = np.zeros(16, "float32")
    elif fault == "dropped token bias":
        w["MixerBlock_1/token_mixing/Dense_0/bias"] = np.zeros(16, "float32")
    assert any(not np.array_equal(w[name], weights[name]) for name in w)
    return w


def parity(side, weights, tap=None):
    honest, images = random_weights(CONFIG), random_images(CONFIG)
    a = agreement(SIDES[side](weights or honest, images, CONFIG, tap), of_referee(honest, images, CONFIG))
    return a.largest / a.scale


@sides
def test_an_honest_side_agrees_to_the_last_digits(side):
    assert parity(side, None) < 1e-12  # measured: 1e-15
    assert parity(side, None, lambda name, array: array) < 1e-12


@sides
@pytest.mark.parametrize("fault", [name for name in vars(Plant) if not name.startswith("_")])
def test_a_fault_planted_in_the_forward_pass_shows(side, fault):
    assert parity(side, None, Plant(fault)) > 1e-3


@sides
@pytest.mark.parametrize("fault", ["shared norm", "block order", "dropped bias", "dropped token bias"])
def test_a_fault_planted_in_the_weights_shows(side, fault):
    assert parity(side, plant_in_weights(fault, random_weights(CONFIG))) > 1e-3


def test_logits_without_spread_are_no_parity():
    """A fresh zero head makes any two models agree."""
    from flax import nnx

    from mixer_jax import MlpMixer

    images = random_images(CONFIG)
    one, other = (np.asarray(MlpMixer(CONFIG, rngs=nnx.Rngs(seed))(images)) for seed in (0, 1))
    with pytest.raises(ValueError, match="the logits of an image are all alike, as after a fresh head"):
        agreement(one, other)
    spread = np.random.default_rng(0).normal(size=one.shape)
    with pytest.raises(ValueError, match="all alike"):
        agreement(spread, one + 3)  # one side without spread is enough


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_parity(value):
    logits = np.random.default_rng(0).normal(size=(2, 5))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        agreement(logits, np.where(logits > 1, value, logits))


def test_logits_of_different_shapes_are_no_parity():
    with pytest.raises(ValueError, match=r"found \(2, 5\) and \(2, 4\)"):
        agreement(np.zeros((2, 5)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="two classes or more"):
        agreement(np.zeros((2, 1)), np.zeros((2, 1)))


def test_agreement_counts_what_it_says():
    a = np.array([[1.0, 2.0, -4.0], [3.0, 0.0, 1.0]])
    b = np.array([[1.0, 2.5, -4.0], [0.0, 0.0, 1.0]])
    found = agreement(a, b)
    assert (found.largest, found.scale, found.same_class) == (3.0, 4.0, 0.5)
    assert found.rms == pytest.approx(np.sqrt((0.25 + 9) / 6))
