"""The Flax model under every transform of JAX: as a closure, as an argument, through Flax's own, in eval and train mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY as THREE_BLOCKS
from conftest import random_images, random_weights
from flax import nnx
from sides import SIDES, checkpoint

import mixer_jax

TINY = THREE_BLOCKS.replace(num_blocks=2)
WEIGHTS = random_weights(TINY, dtype="float64")
IMAGES = random_images(TINY, 3, dtype="float64")
BOUND = 1e-12  # of the largest value; measured: 3e-15


def key():
    return jax.random.key(7, impl="unsafe_rbg")  # compiles in a fraction of the time of the usual generator


def model_of(kind: str, mode: str, *, remat: bool = False) -> mixer_jax.MlpMixer:
    rates = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6, "rngs": nnx.Rngs(0)} if mode == "train" else {}
    model = mixer_jax.load(checkpoint(WEIGHTS, TINY), param_dtype="float64", remat=remat, **rates)
    if mode == "train":
        model.train()
    return model.unstacked() if kind == "unstacked" else model


@pytest.fixture(params=["stacked", "unstacked"])
def kind(request):
    return request.param


@pytest.fixture(params=["eval", "train"])
def called(request, kind):
    """A model in a mode, and how it is called there: with a key where it draws."""
    with jax.enable_x64(True):
        model = model_of(kind, request.param)
        options = {} if request.param == "eval" else {"rngs": key()}
        yield model, lambda model, images: model(images, **options)


def same(found, wanted):
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= BOUND * np.abs(wanted).max()
    return True


def test_every_transform_with_the_model_as_a_closure_gives_what_a_call_gives(called):
    model, call = called
    images, direction = jnp.asarray(IMAGES), jnp.asarray(random_images(TINY, 3, seed=5, dtype="float64"))

    def plain(images):
        return call(model, images)

    wanted = plain(images)
    if model.deterministic:
        assert same(wanted, SIDES["referee"](WEIGHTS, IMAGES, TINY))
    assert same(jax.jit(plain)(images), wanted)
    assert jax.eval_shape(plain, images).shape == wanted.shape
    assert "dot_general" in str(jax.make_jaxpr(plain)(images))
    exported = jax.export.deserialize(jax.export.export(jax.jit(plain))(images).serialize())
    assert same(exported.call(images), wanted)

    # Derivatives, against differences of second order along one direction.
    step = 1e-5
    slope = (plain(images + step * direction) - plain(images - step * direction)) / (2 * step)
    value, forward = jax.jvp(plain, (images,), (direction,))
    assert same(value, wanted)
    assert np.abs(forward - slope).max() <= 1e-7 * np.abs(slope).max()  # measured: 1e-9
    assert same(jnp.vdot(jax.grad(lambda images: plain(images).sum())(images), direction), forward.sum())
    pattern = "b k n h w c, n h w c -> b k"
    assert same(jnp.einsum(pattern.replace(" ", ""), jax.jacrev(plain)(images), direction), forward)
    assert same(jnp.einsum(pattern.replace(" ", ""), jax.jacfwd(plain)(images), direction), forward)


def test_vmap_over_images_gives_what_the_batch_gives(kind):
    with jax.enable_x64(True):
        model = model_of(kind, "eval")
        assert same(jax.vmap(lambda image: model(image[None])[0])(IMAGES), model(IMAGES))
        each = jax.vmap(jax.grad(lambda image: model(image[None]).sum()))(IMAGES)
        assert same(each, jax.grad(lambda images: model(images).sum())(jnp.asarray(IMAGES)))


def test_every_transform_of_the_model_itself(kind):
    with jax.enable_x64(True):
        model = model_of(kind, "eval")
        logits, features = model(IMAGES), model.features(IMAGES)
        assert same(jax.jit(model)(IMAGES), logits)
        assert same(jax.jit(model.features)(IMAGES), features)
        assert jax.eval_shape(model, IMAGES).shape == logits.shape
        assert same(jax.export.export(jax.jit(model))(IMAGES).call(IMAGES), logits)


def test_every_transform_with_the_model_as_an_argument(called):
    model, call = called
    wanted = call(model, IMAGES)
    assert same(jax.jit(call)(model, IMAGES), wanted)
    assert same(nnx.jit(call)(model, IMAGES), wanted)
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), parameters)
    members = jax.vmap(lambda parameters: call(nnx.merge(graphdef, parameters, rest), IMAGES))(ensemble)
    assert same(members[0], wanted)
    assert not np.allclose(members[1], wanted)

    def loss(model):
        return (call(model, IMAGES) ** 2).sum()

    gradients = jax.grad(lambda parameters: loss(nnx.merge(graphdef, parameters, rest)))(parameters)
    for other in (nnx.grad(loss)(model), nnx.jit(nnx.grad(loss))(model)):
        pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(other), strict=True))
        assert len(pairs) > 10
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))  # some are zero but for rounding
        assert max(float(np.abs(a - b).max()) for a, b in pairs) <= BOUND * largest


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_stacked_and_unstacked_with_and_without_remat_have_one_gradient(mode):
    with jax.enable_x64(True):
        found = []
        for kind in ("stacked", "unstacked"):
            for remat in (False, True):
                model = model_of(kind, mode, remat=remat)
                options = {"rngs": key()} if mode == "train" else {}
                found.append(np.asarray(jax.jit(jax.grad(lambda x: (model(x, **options) ** 2).sum()))(IMAGES)))  # noqa: B023
        assert all(same(gradient, found[0]) for gradient in found)


def test_an_unstacked_model_with_remat_recomputes_each_block():
    def recomputed(remat):
        model = mixer_jax.MlpMixer(TINY, rngs=nnx.Rngs(0), remat=remat).unstacked()
        gradient = jax.make_jaxpr(jax.grad(lambda images: model(images).sum()))(jnp.asarray(random_images(TINY)))
        return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in gradient.eqns)

    assert (recomputed(False), recomputed(True)) == (0, TINY.num_blocks)


def test_a_key_decides_what_is_drawn_and_the_stream_stays():
    images = random_images(TINY)
    rates = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6, "rngs": nnx.Rngs(0)}
    model = mixer_jax.load(checkpoint(random_weights(TINY), TINY), **rates)
    model.train()
    before = int(model.stream.count[...])
    one, same_key, other = (model(images, rngs=jax.random.key(seed)) for seed in (1, 1, 2))
    assert int(model.stream.count[...]) == before
    assert np.array_equal(one, same_key)
    assert not np.array_equal(one, other)
    assert not np.array_equal(model(images, rngs=nnx.Rngs(3)), model(images, rngs=nnx.Rngs(4)))
    model.eval()
    assert np.array_equal(model(images, rngs=jax.random.key(1)), model(images))


def test_drawing_from_the_models_own_stream_inside_a_plain_transform_is_refused_with_advice(kind):
    model = mixer_jax.MlpMixer(TINY, rngs=nnx.Rngs(0), dropout_rate=0.5)
    model.train()
    model = model.unstacked() if kind == "unstacked" else model
    images = random_images(TINY)
    with pytest.raises(ValueError, match=r"give the call a key, model\(images, rngs=key\), or use Flax's transforms"):
        jax.jit(model)(images)
    assert jax.jit(lambda images, key: model(images, rngs=key))(images, jax.random.key(0)).shape == (2, 5)


def test_a_second_call_outside_jit_compiles_nothing(caplog):
    model, images = mixer_jax.load(checkpoint(random_weights(TINY), TINY)), jnp.asarray(random_images(TINY))
    model(images)
    with jax.log_compiles():
        model(images)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
    with jax.log_compiles():
        jax.jit(lambda images: model(images))(images)  # sabotage: what compiles is seen
    assert [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_a_block_is_counted_as_a_list_counts(kind):
    model = mixer_jax.load(checkpoint(random_weights(TINY), TINY))
    model = model.unstacked() if kind == "unstacked" else model
    last, x = model.block(1), jnp.ones((1, TINY.num_tokens, TINY.hidden_dim))
    assert np.array_equal(last(x), model.block(-1)(x))
    assert not np.array_equal(last(x), model.block(0)(x))
    for index in (2, 7, -3):
        with pytest.raises(IndexError, match=f"no block {index}: this model has 2, counted from 0"):
            model.block(index)


def test_an_unstacked_model_shares_no_weight_with_the_one_it_was_made_of():
    model, images = mixer_jax.load(checkpoint(random_weights(TINY), TINY)), random_images(TINY)
    other, before = model.unstacked(), np.asarray(model(images))
    for _, variable in nnx.to_flat_state(nnx.state(other, nnx.Param)):
        variable[...] = variable[...] + 1
    assert np.array_equal(model(images), before)
    assert not np.allclose(other(images), before)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = variable[...] + 1
    assert np.array_equal(model.unstacked()(images), other(images))


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ""])
def test_an_unstacked_model_saves_as_the_stacked_one_does(tmp_path, ending):
    model = mixer_jax.load(checkpoint(random_weights(TINY), TINY))
    mixer_jax.save(model, tmp_path / f"stacked{ending}")
    mixer_jax.save(model.unstacked(), tmp_path / f"unstacked{ending}")
    one, other = (mixer_jax.load(tmp_path / f"{name}{ending}") for name in ("stacked", "unstacked"))
    assert one.config == other.config
    for (_, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (one, other)), strict=True):
        assert np.array_equal(a[...], b[...])
