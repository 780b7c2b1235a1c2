"""A model as one compiled function."""

import jax
import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from flax import nnx
from implementations import flax_model

import mixer_jax
from mixer_jax import inputs

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def model():
    return flax_model(random_weights(TINY), TINY, param_dtype="float32")


@nnx.jit
def jitted(model, images):
    return model(images)


@pytest.mark.parametrize("microbatch", [2, 100])
@pytest.mark.parametrize("unstack", [False, True])
def test_microbatches_give_what_the_whole_batch_gives(monkeypatch, model, microbatch, unstack):
    """To a unit in the last place: a matmul of fewer rows may add up in another order."""
    monkeypatch.setattr(inputs, "CPU_CACHE", microbatch * 4 * TINY.num_tokens * TINY.channels_mlp_dim)
    forward = mixer_jax.compiled(model.unstacked() if unstack else model)
    for count in (2, 5):
        images = random_images(TINY, count)
        logits, expected = np.asarray(forward(images)), np.asarray(jitted(model, images))
        assert logits.shape == (count, TINY.num_classes)
        assert np.abs(logits - expected).max() <= 5e-7 * np.abs(expected).max()


def test_an_unstacked_model_is_the_model(model):
    other, images = model.unstacked(), random_images(TINY)
    assert isinstance(other.blocks, nnx.List)
    assert not isinstance(model.blocks, nnx.List)
    names, others = [], []
    logits = model(images, hook=lambda name, array: names.append(name) or array)
    assert np.array_equal(logits, other(images, hook=lambda name, array: others.append(name) or array))
    assert names == others


def test_a_compiled_model_keeps_the_weights_it_was_made_with(model):
    forward, images = mixer_jax.compiled(model), random_images(TINY)
    before = np.asarray(forward(images))
    other = nnx.clone(model)
    other.head.bias[...] = other.head.bias[...] + 1
    assert np.array_equal(forward(images), before)
    assert np.allclose(mixer_jax.compiled(other)(images), before + 1, atol=1e-6)


def test_a_training_model_is_compiled_for_inference():
    model = mixer_jax.MlpMixer(TINY, rngs=nnx.Rngs(0), dropout_rate=0.5)
    model.head.kernel[...] = jax.random.normal(jax.random.key(0), model.head.kernel.shape)
    model.train()
    forward, images = mixer_jax.compiled(model), random_images(TINY)
    assert np.array_equal(forward(images), forward(images))
    assert not model.deterministic  # still a training model


def test_other_outputs_come_out_of_the_same_pass(model):
    images = random_images(TINY, 3)
    features = np.asarray(mixer_jax.compiled(model, lambda model, images: model.features(images))(images))
    assert np.allclose(features, model.features(images), atol=1e-5)


def test_images_of_another_shape_or_dtype_are_refused(model):
    forward = mixer_jax.compiled(model)
    with pytest.raises(ValueError, match="one image is a batch of one"):
        forward(random_images(TINY)[0])
    with pytest.raises(ValueError, match="images must be floating point, not uint8"):
        forward(random_images(TINY).astype(np.uint8))


def test_a_shape_is_compiled_once(model):
    forward, traced = mixer_jax.compiled(model, lambda model, images: traced.append(images.shape) or model(images)), []
    for _ in range(3):
        forward(random_images(TINY, 2))
    assert traced == [(2, *TINY.image_size, 3)]
    forward(random_images(TINY, 4))
    assert len(traced) == 2


def test_it_lowers_as_jax_jit_does_and_tells_cost_and_memory(model):
    forward, images = mixer_jax.compiled(model), random_images(TINY)
    for like in (images, jax.ShapeDtypeStruct(images.shape, images.dtype)):
        program = forward.lower(like).compile()
        assert program.cost_analysis()["flops"] > len(images) * TINY.forward_flops
        assert program.memory_analysis().temp_size_in_bytes > 0
    with pytest.raises(ValueError, match="one image is a batch of one"):
        forward.lower(images[0])


def test_on_a_cpu_the_blocks_run_one_by_one_on_views_of_the_weights():
    config = TINY.replace(hidden_dim=64, channels_mlp_dim=64)  # kernels that begin on the boundary of a cache line
    model = flax_model(random_weights(config), config, param_dtype="float32")
    forward = mixer_jax.compiled(model)
    assert "stablehlo.while" not in forward.lower(random_images(config)).as_text()
    assert "stablehlo.while" in jax.jit(model).lower(random_images(config)).as_text()
    stacked = model.blocks.channel_mixing.dense_0.kernel[...]
    start, size = stacked.unsafe_buffer_pointer(), stacked[0].nbytes
    views = [model.unstacked().block(i).channel_mixing.dense_0.kernel[...].unsafe_buffer_pointer() for i in range(3)]
    assert views == [start + i * size for i in range(3)]


def test_a_compiled_model_composes_with_plain_transforms(model):
    forward, images = mixer_jax.compiled(model), random_images(TINY)
    expected = np.asarray(forward(images))
    assert np.allclose(jax.jit(forward)(images), expected, atol=1e-6)
    assert np.abs(jax.grad(lambda images: forward(images).sum())(jax.numpy.asarray(images))).max() > 0
    assert np.allclose(nnx.jit(lambda model, images: mixer_jax.compiled(model)(images))(model, images), expected, atol=1e-6)
