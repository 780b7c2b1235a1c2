"""Hooks and masks, dropout and stochastic depth, in the Flax and the PyTorch model."""

import numpy as np
import pytest
from conftest import TINY, both, random_images, random_weights
from implementations import IMPLEMENTATIONS
from models import MODELS, STOCHASTIC, intermediates, model

import mixer_jax

pytestmark = pytest.mark.usefixtures("unoptimised")


@both
@pytest.mark.parametrize("rates", [STOCHASTIC, {"dropout_rate": 0.5}, {"stochastic_depth_rate": 0.5}])
def test_each_rate_acts_after_train_and_none_after_eval(framework, rates):
    images = random_images(TINY)
    features, others = (model(framework, "train", **rates).features(images) for _ in range(2))
    assert np.abs(features - others).max() > 1e-3
    features, others = (model(framework, "eval", **rates).features(images) for _ in range(2))
    assert np.array_equal(features, others)


@both
@pytest.mark.parametrize(("rescale", "factor"), [(True, 4), (False, 1)])
def test_stochastic_depth_keeps_or_drops_a_branch_whole(framework, rescale, factor):
    images = random_images(TINY, count=400)
    arrays = intermediates(model(framework, "train", stochastic_depth_rate=0.75, rescale=rescale), images)
    added = arrays["blocks/2/token_mixing/sum"] - arrays["blocks/1/channel_mixing/sum"]
    branch = np.swapaxes(arrays["blocks/2/token_mixing/dense_1"], 1, 2)
    kept = added.any(axis=(1, 2))
    assert np.allclose(added[kept], factor * branch[kept], atol=1e-5)
    assert abs(kept.mean() - 0.25) < 0.09  # 4 standard errors


@both
def test_stochastic_depth_rises_from_zero_in_the_first_block(framework):
    """With a rate close to 1 in the last block, images differ between draws only from the second block on."""
    deep, images = model(framework, "train", stochastic_depth_rate=0.9), random_images(TINY, count=8)
    first, second = intermediates(deep, images), intermediates(deep, images)
    assert np.array_equal(first["blocks/0/channel_mixing/sum"], second["blocks/0/channel_mixing/sum"])
    assert not np.array_equal(first["blocks/2/channel_mixing/sum"], second["blocks/2/channel_mixing/sum"])


@both
def test_masks_are_requested_by_name_shape_and_keep_rate(framework):
    requested = {}

    def masks(name, shape, keep_rate):
        requested[name] = (shape, keep_rate)
        return np.ones(shape, bool)

    model(framework, "train", **STOCHASTIC)(random_images(TINY), masks=masks)
    expected = {}
    for i, keep_rate in enumerate((1.0, 0.7, 0.4)):  # 1 - 0.6 * i / 2
        for mixing, shape, hidden in (("token_mixing", (2, 7, 20), 11), ("channel_mixing", (2, 20, 7), 13)):
            expected[f"blocks/{i}/{mixing}/dropout_0"] = ((*shape[:2], hidden), 0.7)
            expected[f"blocks/{i}/{mixing}/dropout_1"] = (shape, 0.7)
            if keep_rate < 1:
                expected[f"blocks/{i}/{mixing}/stochastic_depth"] = ((2, 1, 1), keep_rate)
    assert list(requested) == list(expected)
    for name, (shape, keep_rate) in expected.items():
        assert requested[name] == (shape, pytest.approx(keep_rate, rel=1e-15)), name


@both
def test_no_mask_is_requested_in_eval_or_without_rates(framework):
    def masks(name, shape, keep_rate):
        raise AssertionError(name)

    images = random_images(TINY)
    for mode, rates in (("eval", STOCHASTIC), ("eval", {}), ("train", {})):
        network = model(framework, mode, **rates)
        assert np.array_equal(network(images, masks=masks), network(images))


@both
def test_each_mask_acts(framework):
    """A mask that drops everything of the first image changes the features of that image and of no other."""
    network, images, names = model(framework, "train", **STOCHASTIC), random_images(TINY), []

    def features_without(dropped):
        def masks(name, shape, keep_rate):
            names.append(name)
            mask = np.ones(shape, bool)
            mask[:1] = name != dropped
            return mask

        return network.features(images, masks=masks)

    plain = features_without(None)
    for name in list(names):
        changed = features_without(name)
        assert np.array_equal(changed[1], plain[1]), name
        assert np.abs(changed[0] - plain[0]).max() > 1e-4, name


@both
@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 1), "bool"), ((), "bool"), ((2, 7, 11), "float32")])  # two broadcast
def test_a_mask_that_does_not_fit_is_refused(framework, shape, dtype):
    with pytest.raises(ValueError, match="^masks: ") as error:
        model(framework, "train", **STOCHASTIC)(random_images(TINY), masks=lambda *_: np.ones(shape, dtype))
    wrong = f"not {dtype} of shape {shape}"
    assert str(error.value) == f"masks: blocks/0/token_mixing/dropout_0 must be bool of shape (2, 7, 11), {wrong}"


def test_a_loop_over_blocks_with_and_without_remat_is_the_masked_and_the_hooked_forward():
    """Those run block by block, here with the same random bits. In float64, with every gradient."""
    import jax
    from flax import nnx

    from mixer_jax.blocks import random_masks

    def value_and_gradients(**options):
        return nnx.jit(nnx.value_and_grad(lambda model, key: (model.features(images, rngs=key, **options) ** 2).sum()))

    def distance(a, b):
        leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
        assert len(leaves) == len(others) > 10
        return max(float(np.abs(x - y).max()) for x, y in zip(leaves, others))

    def replayed(name, shape, keep_rate):
        _, block, name = name.split("/", 2)
        return random_masks(jax.random.split(key, config.num_blocks)[int(block)])(name, shape, keep_rate)

    config = TINY.replace(num_blocks=2)
    # Keys of a generator that compiles in a fraction of the time of the default one.
    key, another_key = (jax.random.key(seed, impl="unsafe_rbg") for seed in (5, 6))
    with jax.enable_x64(True):
        images = random_images(TINY, dtype="float64")
        model = mixer_jax.MlpMixer(config, rngs=nnx.Rngs(0), param_dtype="float64", **STOCHASTIC)
        loop = value_and_gradients()
        plain = loop(model, key)
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
        assert distance(plain, value_and_gradients(masks=replayed)(model, key)) < 1e-13 * scale  # measured: 4e-16
        assert distance(plain, value_and_gradients(hook=lambda name, array: array)(model, key)) < 1e-13 * scale
        assert distance(plain, loop(model, another_key)) > 1e-3 * scale  # sabotage: other bits
        model.remat = True
        assert distance(plain, loop(model, key)) < 1e-13 * scale


@both
@pytest.mark.parametrize("rate", ["dropout_rate", "stochastic_depth_rate"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5])
def test_an_impossible_rate_is_refused(framework, rate, value):
    with pytest.raises(ValueError, match=f"{rate} must be at least 0 and below 1, not {value}"):
        MODELS[framework](TINY, **{rate: value})


@both
def test_a_hooked_forward_is_the_plain_forward(framework):
    weights, images = random_weights(TINY), random_images(TINY)
    plain = IMPLEMENTATIONS[framework](weights, images, TINY)
    hooked = IMPLEMENTATIONS[framework](weights, images, TINY, lambda name, array: array)
    assert np.abs(plain - hooked).max() <= 1e-14 * np.abs(plain).max()  # measured: 4e-16


@both
def test_the_forward_pass_continues_with_what_a_hook_returns(framework):
    weights, images = random_weights(TINY), random_images(TINY)
    logits = IMPLEMENTATIONS[framework](weights, images, TINY, lambda name, array: array * (name != "mean"))
    assert np.array_equal(logits, np.tile(weights["head/bias"].astype(np.float64), (2, 1)))
