"""The Flax and the PyTorch model: initialisation, dtypes, and what they refuse."""

import re

import numpy as np
import pytest
from conftest import TINY, both, random_images, random_weights
from implementations import IMPLEMENTATIONS, flax_model, torch_model
from models import MODELS, as_array, channels_first, model
from scipy.stats import truncnorm

pytestmark = pytest.mark.usefixtures("unoptimised")


@both
def test_initialisation_has_googles_moments(framework):
    """Kernels: a normal cut at two deviations with variance 1 / fan-in; biases and the head zero; scales one."""
    config = TINY.replace(patch_size=(8, 8), image_size=(64, 128), hidden_dim=160, tokens_mlp_dim=192, channels_mlp_dim=256)
    cut, kernels = truncnorm(-2, 2), []
    for name, array in MODELS[framework](config).weights().items():
        if name.startswith("head/") or name.endswith("bias"):
            assert not array.any(), name
        elif name.endswith("scale"):
            assert (array == 1).all(), name
        else:
            kernels.append(array)
            unit = array.astype(np.float64) * np.sqrt(np.prod(array.shape[:-1]))  # of variance 1
            error = 5 / np.sqrt(array.size)  # five standard errors, of moments about 1
            assert abs(unit.mean()) < error, name
            assert abs(unit.var() - 1) < error * 1.2, name
            assert abs((unit**4).mean() - cut.moment(4) / cut.var() ** 2) < error * 4, name
            assert 2.2 < np.abs(unit).max() <= 2 / cut.std() * (1 + 1e-6), name
    assert len(kernels) == 1 + 3 * 4
    assert len({array.ravel()[0] for array in kernels}) == len(kernels)  # no two are drawn alike


@both
def test_without_classes_the_model_ends_in_features(framework):
    classifier, headless = (model(framework, config=TINY.replace(num_classes=classes)) for classes in (5, 0))
    images = random_images(TINY)
    assert classifier(images).shape == (2, 5)
    assert classifier.features(images).shape == (2, 7)
    assert headless(images).shape == (2, 7)
    assert np.array_equal(headless(images), headless.features(images))


@pytest.mark.parametrize(("remat", "repeated"), [(False, 0), (True, 3)])
def test_a_backward_pass_repeats_matmuls_only_with_remat(remat, repeated):
    """Beside the two for each of a block's four matmuls; the result of the last is only added, so nothing needs it."""
    import jax
    from flax import nnx

    graph, parameters = nnx.split(model("flax", remat=remat).model)
    gradient = jax.grad(lambda parameters, images: nnx.merge(graph, parameters)(images).sum())
    loops = [e for e in jax.make_jaxpr(gradient)(parameters, random_images(TINY)).eqns if e.primitive.name == "scan"]
    forward, backward = (str(loop.params["jaxpr"]).count(" dot_general[") for loop in loops)
    assert (forward, backward) == (4, 8 + repeated)


@both
def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(framework):
    weights, images, dtypes = random_weights(TINY), random_images(TINY), {}

    def hook(name, array):
        dtypes[name] = str(array.dtype).removeprefix("torch.")
        return array

    build = {"flax": flax_model, "torch": torch_model}[framework]
    network = build(weights, TINY, param_dtype="float32", dtype="bfloat16")
    logits = network(images if framework == "flax" else channels_first(images), hook=hook)
    assert {dtypes.pop(name) for name in ("mean", "head")} == {"float32"}
    assert set(dtypes.values()) == {"bfloat16"}
    exact = IMPLEMENTATIONS["numpy"](weights, images, TINY)
    error = np.abs(as_array(logits) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: measured 0.01


@both
def test_weights_stored_in_bfloat16_compute_in_the_images_dtype(framework):
    network = model(framework, param_dtype="bfloat16")
    assert {array.dtype.name for array in network.weights().values()} == {"bfloat16"}
    assert network.features(random_images(TINY)).dtype == np.float32


@both
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8, 15, 4), "float32", "resize or crop them"),
        ((2, 16, 15, 3), "float32", "resize or crop them"),
        ((8, 15, 3), "float32", "one image is a batch of one, images[None]"),
        ((1, 2, 8, 15, 3), "float32", "images must be (batch, "),
        ((2, 8, 15, 3), "uint8", "not uint8: the released weights take pixels of 0 to 255 as x / 127.5 - 1"),
        ((2, 8, 15, 3), "int64", "not int64"),
        ((2, 8, 15, 3), "float64", "these images are float64"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_advice(framework, shape, dtype, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(framework)(np.zeros(shape, dtype))


@both
def test_images_in_the_other_frameworks_axes_are_refused_with_advice(framework):
    images = random_images(TINY)
    swapped = np.moveaxis(images, -1, 1) if framework == "flax" else channels_first(images).permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match="the channels are on the wrong axis, use images."):
        model(framework).model(swapped)


def test_float64_without_x64_is_refused():
    import jax

    weights, images = random_weights(TINY), random_images(TINY)
    match = r"needs 64-bit JAX: .*jax.enable_x64\(True\)"
    with pytest.raises(ValueError, match="param_dtype=float64 " + match):
        flax_model(weights, TINY)
    with pytest.raises(ValueError, match="dtype=float64 " + match):
        MODELS["flax"](TINY, dtype="float64")
    with jax.enable_x64(True):
        wide = flax_model(weights, TINY)
    with pytest.raises(ValueError, match="this model's weights are float64, which " + match):
        wide(images)


@pytest.mark.torch
def test_the_pytorch_model_refuses_what_is_not_a_tensor():
    with pytest.raises(ValueError, match="images must be a torch.Tensor, not ndarray: use torch.from_numpy"):
        model("torch").model(np.zeros((2, 3, 8, 15), "float32"))


@pytest.mark.torch
def test_precision_sets_pytorchs_switches_and_restores_them():
    import torch

    def switches():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before, during = switches(), []
    model("torch", precision="highest")(random_images(TINY), hook=lambda name, array: during.append(switches()) or array)
    assert set(during) == {("ieee", "ieee")}
    assert switches() == before != ("ieee", "ieee")
    with pytest.raises(ValueError, match="precision must be None or one of highest, high, default, not 'best'"):
        MODELS["torch"](TINY, precision="best")


@pytest.mark.torch
def test_the_pytorch_models_names_are_timms(square):
    from safetensors.numpy import load_file

    timm = {name: array.shape for name, array in load_file(square.weights_file.with_name("timm.safetensors")).items()}
    assert {name: tuple(tensor.shape) for name, tensor in MODELS["torch"](square.config).model.state_dict().items()} == timm


def test_the_stem_is_the_same_as_a_matmul_and_as_a_convolution():
    import jax

    from mixer_jax.model import _stem_convolution, _stem_matmul

    with jax.enable_x64(True):
        images = jax.numpy.asarray(random_images(TINY, dtype="float64"))
        kernel = jax.numpy.asarray(random_weights(TINY, dtype="float64")["stem/kernel"])
        a, b = (stem(images, kernel, precision="highest") for stem in (_stem_matmul, _stem_convolution))
        assert np.abs(a - b).max() < 1e-14


def test_a_program_for_a_tpu_has_the_tpus_stem():
    """The platform that a program is lowered for decides, not the machine that lowers it."""
    import jax

    program = jax.jit(model("flax").model).trace(random_images(TINY))
    assert "stablehlo.convolution" in program.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in program.lower().as_text()


def test_importing_the_model_sets_no_global_switch():
    import jax

    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_matmul_precision is None
