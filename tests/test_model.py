"""The Flax model and its twin: options, initialisation, and what they refuse."""

import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from scipy.stats import truncnorm
from sides import SIDES, checkpoint, flax_model, twin_model

from convert import MixerConfig

sides = pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])
STOCHASTIC = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6}


class Flax:
    """A model of either framework behind the same verbs, images (b, h, w, c) in and NumPy out."""

    def __init__(self, config: MixerConfig, **options):
        from flax import nnx

        from mixer_jax import MlpMixer

        self.model = MlpMixer(config, rngs=nnx.Rngs(0), **options)

    def __call__(self, images, **options):
        return np.asarray(self.model(images, **options))

    def features(self, images):
        return np.asarray(self.model.features(images))

    def weights(self):
        from mixer_jax.pretrained import to_checkpoint

        return {name: np.asarray(array) for name, array in to_checkpoint(self.model).to("google").arrays.items()}


class Twin(Flax):
    def __init__(self, config: MixerConfig, **options):
        import torch

        from mixer_jax.torch_model import MlpMixer

        torch.manual_seed(0)
        options = {k: getattr(torch, v) if k.endswith("dtype") else v for k, v in options.items()}
        self.model = MlpMixer(config, **options)

    def __call__(self, images, **options):
        return self.model(self.tensor(images), **options).detach().float().numpy()

    def features(self, images):
        return self.model.features(self.tensor(images)).detach().float().numpy()

    def tensor(self, images):
        import torch

        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))

    def weights(self):
        from mixer_jax.torch_model import to_checkpoint

        return {name: np.asarray(array) for name, array in to_checkpoint(self.model).to("google").arrays.items()}


MODELS = {"flax": Flax, "twin": Twin}


@sides
def test_initialisation_has_googles_moments(side):
    """Kernels: a normal cut at two deviations with variance 1 / fan-in; biases and the head zero; scales one."""
    config = MixerConfig(
        patch_size=(8, 8),
        image_size=(64, 128),
        num_blocks=2,
        hidden_dim=160,
        tokens_mlp_dim=192,
        channels_mlp_dim=256,
        num_classes=10,
    )
    cut, kernels = truncnorm(-2, 2), 0
    for name, array in MODELS[side](config).weights().items():
        if name.startswith("head/") or name.endswith("bias"):
            assert not array.any(), name
        elif name.endswith("scale"):
            assert (array == 1).all(), name
        else:
            kernels += 1
            unit = array.astype(np.float64) * np.sqrt(np.prod(array.shape[:-1]))  # of variance 1
            error = 5 / np.sqrt(array.size)  # five standard errors, of moments about 1
            assert abs(unit.mean()) < error, name
            assert abs(unit.var() - 1) < error * 1.2, name
            assert abs((unit**4).mean() - cut.moment(4) / cut.var() ** 2) < error * 4, name
            assert 2.2 < np.abs(unit).max() <= 2 / cut.std() * (1 + 1e-6), name
    assert kernels == 1 + 2 * 4


@sides
def test_blocks_start_different(side):
    weights = MODELS[side](TINY).weights()
    a, b = (weights[f"MixerBlock_{i}/channel_mixing/Dense_0/kernel"] for i in (0, 1))
    assert not np.array_equal(a, b)


@sides
def test_without_classes_the_model_ends_in_features(side):
    model, headless = MODELS[side](TINY), MODELS[side](TINY.replace(num_classes=0))
    images = random_images(TINY)
    assert model(images).shape == (2, 5)
    assert model.features(images).shape == (2, 7)
    assert headless(images).shape == (2, 7)
    assert np.array_equal(headless(images), headless.features(images))


@sides
def test_train_draws_and_eval_does_not(side):
    model, images = MODELS[side](TINY, **STOCHASTIC), random_images(TINY)
    model.model.train()
    assert np.abs(model.features(images) - model.features(images)).max() > 1e-3
    model.model.eval()
    assert np.array_equal(model.features(images), model.features(images))


@sides
@pytest.mark.parametrize("rate", ["dropout_rate", "stochastic_depth_rate"])
def test_each_rate_acts_by_itself(side, rate):
    model, images = MODELS[side](TINY, **{rate: 0.5}), random_images(TINY)
    model.model.train()
    assert np.abs(model.features(images) - model.features(images)).max() > 1e-3


def branch_share(side, *, rescale):
    """What stochastic depth makes of a branch of ones in the last of three blocks, over many images."""
    if side == "flax":
        import jax

        from mixer_jax.model import StochasticDepth, drawn

        depth, ones = StochasticDepth(rescale=rescale), jax.numpy.ones((4000, 1, 1))
        return np.asarray(depth(ones, "stochastic_depth", drawn(jax.random.key(0)), jax.numpy.float32(0.25))).ravel()
    import torch

    from mixer_jax.torch_model import StochasticDepth, drawn

    torch.manual_seed(0)
    ones = torch.ones(4000, 1, 1)
    return StochasticDepth(0.75, rescale=rescale)(ones, "stochastic_depth", drawn(ones.device)).numpy().ravel()


@sides
def test_stochastic_depth_keeps_or_drops_a_branch_whole(side):
    for rescale, kept in ((True, 4.0), (False, 1.0)):
        share = branch_share(side, rescale=rescale)
        assert set(share) == {0.0, kept}
        assert abs((share > 0).mean() - 0.25) < 0.03  # 4 standard errors


@sides
def test_stochastic_depth_rises_from_zero_in_the_first_block(side):
    """With a rate close to 1 in the last block, images differ between draws only from the second block on."""
    model, images = MODELS[side](TINY, stochastic_depth_rate=0.9), random_images(TINY, count=8)
    model.model.train()

    def seen():
        arrays = {}
        model(images, tap=lambda name, array: arrays.setdefault(name, array))
        return {name: np.asarray(array.detach() if side == "twin" else array) for name, array in arrays.items()}

    first, second = seen(), seen()
    assert np.array_equal(first["blocks/0/channel_mixing/sum"], second["blocks/0/channel_mixing/sum"])
    assert not np.array_equal(first["blocks/2/channel_mixing/sum"], second["blocks/2/channel_mixing/sum"])


def some_masks(name, shape, keep):
    """A source that gives the same booleans for the same name."""
    return np.random.default_rng(list(name.encode())).random(shape) < keep


@sides
def test_masks_are_asked_for_by_name_shape_and_share(side):
    model, images, asked = MODELS[side](TINY, **STOCHASTIC), random_images(TINY), {}

    def masks(name, shape, keep):
        asked[name] = (shape, keep)
        return some_masks(name, shape, keep)

    model.model.train()
    model(images, masks=masks)
    wanted = {}
    for i, keep in enumerate((1.0, 0.7, 0.4)):  # 1 - 0.6 * i / 2
        for mixing, shape, hidden in (("token_mixing", (2, 7, 20), 11), ("channel_mixing", (2, 20, 7), 13)):
            wanted[f"blocks/{i}/{mixing}/dropout_0"] = ((*shape[:2], hidden), 0.7)
            wanted[f"blocks/{i}/{mixing}/dropout_1"] = (shape, 0.7)
            if keep < 1:
                wanted[f"blocks/{i}/{mixing}/stochastic_depth"] = ((2, 1, 1), keep)
    assert list(asked) == list(wanted)
    for name, (shape, keep) in wanted.items():
        assert asked[name] == (shape, pytest.approx(keep, rel=1e-15)), name


@sides
def test_no_mask_is_asked_for_in_eval_or_without_rates(side):
    def masks(name, shape, keep):
        raise AssertionError(name)

    images = random_images(TINY)
    for model in (MODELS[side](TINY, **STOCHASTIC), MODELS[side](TINY)):
        model.model.eval()
        assert np.array_equal(model(images, masks=masks), model(images))
    model.model.train()
    assert np.array_equal(model(images, masks=masks), model(images))


@sides
def test_each_mask_acts(side):
    """With one unit at a time taken away by its mask, the features change, and by as much as the source says: not at all
    for what is kept."""
    model, images = MODELS[side](TINY, **STOCHASTIC), random_images(TINY)
    model.model.train()
    names = []

    def without(gone):
        def masks(name, shape, keep):
            names.append(name)
            kept = np.ones(shape, bool)
            kept[:1] = name != gone
            return kept

        return as_array(model.model.features(images if side == "flax" else model.tensor(images), masks=masks))

    whole = without(None)
    for name in list(names):
        changed = without(name)
        assert np.array_equal(changed[1], whole[1]), name  # the other image
        assert np.abs(changed[0] - whole[0]).max() > 1e-4, name


def as_array(result):
    return np.asarray(result.detach() if hasattr(result, "detach") else result)


@sides
@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (np.ones((2, 7, 1), bool), "bool of shape (2, 7, 1)"),  # would broadcast
        (True, "bool of shape ()"),
        (np.ones((2, 7, 11), "float32"), "float32 of shape (2, 7, 11)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(side, mask, found):
    model = MODELS[side](TINY, **STOCHASTIC)
    model.model.train()
    with pytest.raises(ValueError, match="^masks: ") as error:
        model(random_images(TINY), masks=lambda name, shape, keep: mask)
    assert str(error.value) == f"masks: blocks/0/token_mixing/dropout_0 must be bool of shape (2, 7, 11), not {found}"


@pytest.mark.parametrize("remat", [False, True])
def test_the_plain_forward_is_the_masked_one_with_the_bits_it_draws(remat):
    """And the tapped one: the same draws block by block. In float64, with every gradient."""
    import jax
    from flax import nnx

    from mixer_jax import MlpMixer
    from mixer_jax.model import drawn

    with jax.enable_x64(True):
        model = MlpMixer(TINY, rngs=nnx.Rngs(0), param_dtype="float64", remat=remat, **STOCHASTIC)
        images = random_images(TINY, dtype="float64")

        def rngs(seed):  # of a generator that compiles in a fraction of the time of the usual one
            return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))

        def run(**options):
            model.seed(rngs(5))
            return nnx.jit(nnx.value_and_grad(lambda model: (model.features(images, **options) ** 2).sum()))(model)

        def replayed(seed):
            model.seed(rngs(seed))
            sources = [drawn(key) for key in jax.random.split(model.stream(), TINY.num_blocks)]

            def masks(name, shape, keep):
                _, index, name = name.split("/", 2)
                return sources[int(index)](name, shape, keep)

            return masks

        def apart(a, b):
            return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

        plain = run()
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
        assert len(jax.tree.leaves(plain)) > 10
        assert apart(plain, run(masks=replayed(5))) < 1e-13 * scale  # measured: 4e-16
        assert apart(plain, run(tap=lambda name, array: array)) < 1e-13 * scale
        assert apart(plain, run(masks=replayed(6))) > 1e-3 * scale  # sabotage: other bits


@sides
@pytest.mark.parametrize("rate", ["dropout_rate", "stochastic_depth_rate"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5])
def test_an_impossible_rate_is_refused(side, rate, value):
    with pytest.raises(ValueError, match=f"{rate} must be at least 0 and below 1, not {value}"):
        MODELS[side](TINY, **{rate: value})


@sides
def test_a_tapped_forward_is_the_plain_forward(side):
    weights, images = random_weights(TINY), random_images(TINY)
    plain = SIDES[side](weights, images, TINY)
    tapped = SIDES[side](weights, images, TINY, lambda name, array: array)
    assert np.abs(plain - tapped).max() <= 1e-14 * np.abs(plain).max()  # measured: 4e-16


@sides
def test_what_the_tap_returns_is_what_goes_on(side):
    weights, images = random_weights(TINY), random_images(TINY)
    zeroed = SIDES[side](weights, images, TINY, lambda name, array: array * (name != "mean"))
    assert np.array_equal(zeroed, np.tile(weights["head/bias"].astype(np.float64), (2, 1)))


def test_rematerialisation_changes_no_gradient():
    import jax
    from flax import nnx

    from mixer_jax import MlpMixer

    with jax.enable_x64(True):
        images = random_images(TINY, dtype="float64")
        gradients = []
        for remat in (False, True):
            model = MlpMixer(TINY, rngs=nnx.Rngs(0), param_dtype="float64", remat=remat, **STOCHASTIC)
            gradients.append(nnx.grad(lambda model: (model.features(images) ** 2).sum())(model))
        plain, remat = (jax.tree.leaves(g) for g in gradients)
        assert len(plain) == len(remat) > 10
        for a, b in zip(plain, remat):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("remat", "again"), [(False, 0), (True, 3)])
def test_a_backward_pass_repeats_products_only_with_remat(remat, again):
    """Beside the two for each of a block's four products; nothing needs the result of the last, which is only added."""
    import jax
    from flax import nnx

    from mixer_jax import MlpMixer

    graph, parameters = nnx.split(MlpMixer(TINY, rngs=nnx.Rngs(0), remat=remat))
    gradient = jax.grad(lambda parameters, images: nnx.merge(graph, parameters)(images).sum())
    loops = [e for e in jax.make_jaxpr(gradient)(parameters, random_images(TINY)).eqns if e.primitive.name == "scan"]
    forward, backward = (str(loop.params["jaxpr"]).count(" dot_general[") for loop in loops)
    assert (forward, backward) == (4, 8 + again)


@sides
def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(side):
    weights, images = random_weights(TINY), random_images(TINY)
    exact = SIDES["referee"](weights, images, TINY)
    dtypes, logits = {}, None
    if side == "flax":
        import jax.numpy as jnp

        model = flax_model(weights, TINY, param_dtype="float32", dtype=jnp.bfloat16)
        logits = model(images, tap=lambda name, array: dtypes.setdefault(name, str(array.dtype)) and array)
    else:
        import torch

        model = twin_model(weights, TINY, param_dtype=torch.float32, dtype=torch.bfloat16)
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
        logits = model(tensor, tap=lambda name, array: dtypes.setdefault(name, str(array.dtype)[6:]) and array).detach()
    assert {dtypes.pop(name) for name in ("mean", "head")} == {"float32"}
    assert set(dtypes.values()) == {"bfloat16"}
    error = np.abs(np.asarray(logits) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: measured 0.01


@sides
def test_weights_stored_in_bfloat16_compute_in_the_images_dtype(side):
    model, images = MODELS[side](TINY, param_dtype="bfloat16"), random_images(TINY)
    assert {array.dtype.name for array in model.weights().values()} == {"bfloat16"}
    assert model.features(images).dtype == np.float32


@sides
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ("b other order", "float32", "the channels are on the wrong axis, use images."),
        ("b 8 15 4", "float32", "resize or crop them"),
        ("b 16 15 3", "float32", "resize or crop them"),
        ("8 15 3", "float32", "one image is a batch of one, images[None]"),
        ("1 b 8 15 3", "float32", "images must be (batch, "),
        ("b 8 15 3", "uint8", "not uint8: the released weights take pixels of 0 to 255 as x / 127.5 - 1"),
        ("b 8 15 3", "int64", "not int64"),
        ("b 8 15 3", "float64", "these images are float64"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_advice(side, shape, dtype, message):
    if shape == "b other order":
        sizes = {"flax": [2, 3, 8, 15], "twin": [2, 8, 15, 3]}[side]
    else:
        *batch, h, w, c = [2 if size == "b" else int(size) for size in shape.split()]
        sizes = [*batch, h, w, c] if side == "flax" else [*batch, c, h, w]
    images = np.zeros(sizes, dtype)
    if side == "twin":
        import torch

        images = torch.from_numpy(images)
    with pytest.raises(ValueError, match="^") as error:
        MODELS[side](TINY).model(images)
    assert message in str(error.value)


def test_float64_without_x64_is_refused_wherever_it_is_asked_for():
    import jax

    from mixer_jax import load

    weights, images = random_weights(TINY), random_images(TINY)
    match = r"needs 64-bit JAX: .*jax.enable_x64\(True\)"
    with pytest.raises(ValueError, match="param_dtype=float64 " + match):
        load(checkpoint(weights, TINY), param_dtype="float64")
    with pytest.raises(ValueError, match="dtype=float64 " + match):
        Flax(TINY, dtype="float64")
    with jax.enable_x64(True):
        model = load(checkpoint(weights, TINY), param_dtype="float64")
    with pytest.raises(ValueError, match="this model's weights are float64, which " + match):
        model(images)


@pytest.mark.torch
def test_the_twin_refuses_what_is_no_tensor():
    with pytest.raises(ValueError, match="images must be a torch.Tensor, not ndarray: use torch.from_numpy"):
        Twin(TINY).model(np.zeros((2, 3, 8, 15), "float32"))


@pytest.mark.torch
def test_the_twins_precision_sets_the_switches_and_puts_them_back():
    import torch

    def switches():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before, during = switches(), []
    model = Twin(TINY, precision="highest")
    model(random_images(TINY), tap=lambda name, array: during.append(switches()) or array)
    assert set(during) == {("ieee", "ieee")}
    assert switches() == before != ("ieee", "ieee")
    with pytest.raises(ValueError, match="precision must be None or one of highest, high, default, not 'best'"):
        Twin(TINY, precision="best")


@pytest.mark.torch
def test_the_twins_names_are_timms(square):
    from safetensors.numpy import load_file

    theirs = {k: v.shape for k, v in load_file(square.weights_file.with_name("timm.safetensors")).items()}
    assert {k: tuple(v.shape) for k, v in Twin(square.config).model.state_dict().items()} == theirs


def test_the_stem_is_the_same_as_a_product_and_as_a_convolution():
    import jax
    import jax.numpy as jnp

    from mixer_jax.model import _stem_convolution, _stem_product

    with jax.enable_x64(True):
        images = jnp.asarray(random_images(TINY, dtype="float64"))
        kernel = jnp.asarray(random_weights(TINY, dtype="float64")["stem/kernel"])
        a, b = (stem(images, kernel, precision="highest") for stem in (_stem_product, _stem_convolution))
        assert np.abs(a - b).max() < 1e-14


def test_a_program_for_a_tpu_has_the_tpus_stem():
    """Chosen by the platform that a program is lowered for, not by the machine that lowers it."""
    import jax
    from flax import nnx

    model = Flax(TINY).model
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    lowered = forward.trace(state, random_images(TINY)).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" in lowered
    assert "stablehlo.convolution" not in forward.trace(state, random_images(TINY)).lower().as_text()


def test_importing_the_model_sets_no_global_switch():
    import jax

    import mixer_jax.model

    assert mixer_jax.model
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_matmul_precision is None
