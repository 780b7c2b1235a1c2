"""Against what other people's code computed, in float64."""

import dataclasses

import numpy as np
import pytest
from conftest import GOLDENS, random_images, random_weights
from einops import rearrange
from implementations import IMPLEMENTATIONS, checkpoint, distance, flax_model, of_numpy

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, layouts

CLOSE = 1e-10  # relative to max abs; measured: 8e-16 on outputs, 2e-14 on gradients
TORCH = pytest.param("torch", marks=pytest.mark.torch)
implementations = pytest.mark.parametrize("name", ["numpy", "flax", TORCH])
models = pytest.mark.parametrize("name", ["flax", TORCH])


def of_linen(weights, images, config, dtype="float64"):
    """The network of the benchmarks, so that they compare equal things."""
    import jax
    from linen_mixer import MlpMixer

    with jax.enable_x64(True):
        variables = checkpoint(weights, config).astype("float64").as_linen()
        return np.asarray(jax.jit(MlpMixer(config, dtype=dtype).apply)(variables, np.asarray(images, np.float64)))


def google_names(config: MixerConfig) -> dict[str, list[str]]:
    """What Google's modules call the arrays that the hook sees."""
    names = {"stem": ["stem"], "pre_head_norm": ["pre_head_layer_norm"]}
    names |= {"head": ["head", "output"]} if config.num_classes else {"mean": ["output"]}
    for i in range(config.num_blocks):
        ours, google = f"blocks/{i}", f"MixerBlock_{i}"
        names[f"{ours}/token_norm"] = [f"{google}/LayerNorm_0"]
        names[f"{ours}/channel_norm"] = [f"{google}/LayerNorm_1"]
        names[f"{ours}/channel_mixing/sum"] = [google]
        for mixing in ("token_mixing", "channel_mixing"):
            names[f"{ours}/{mixing}/dense_0"] = [f"{google}/{mixing}/Dense_0"]
            names[f"{ours}/{mixing}/dense_1"] = [f"{google}/{mixing}/Dense_1", f"{google}/{mixing}"]
    return names


@pytest.mark.parametrize("name", ["numpy", "flax", "linen", TORCH])
def test_logits_or_features_are_googles(name, golden):
    error = distance((IMPLEMENTATIONS | {"linen": of_linen})[name](golden.weights, golden.images, golden.config), golden.result)
    print(f"{golden.name}, {name}: {error:.1e} relative to max abs")
    assert error < CLOSE


@implementations
def test_every_intermediate_is_googles(name, golden):
    results = {}

    def hook(name, array):
        results[name] = np.asarray(array)
        return array

    hooked = IMPLEMENTATIONS[name](golden.weights, golden.images, golden.config, hook)
    assert distance(hooked, golden.result) < CLOSE
    wanted = {k.removeprefix("f64/intermediates/"): v for k, v in golden.outputs.items() if k.startswith("f64/inter")}
    wanted["stem"] = rearrange(wanted["stem"], "b h w c -> b (h w) c")
    names = google_names(golden.config)
    assert {theirs for ours in names.values() for theirs in ours} == wanted.keys()
    for ours, all_theirs in names.items():
        for theirs in all_theirs:
            assert distance(results[ours], wanted[theirs]) < CLOSE, (ours, theirs)
    rest = {name.split("/")[-1] for name in results.keys() - names.keys()}
    assert rest <= {"gelu", "sum", "mean"}  # what Google's modules do not record


@implementations
@pytest.mark.parametrize(
    ("code", "epsilon"), [("timm", 1e-6), ("reference", 1e-5), ("jeonsworld", 1e-6)]
)  # all three with the exact GELU
def test_logits_with_another_codes_numerics_are_that_codes(name, code, epsilon, square):
    config = square.config.replace(gelu="exact", layer_norm_epsilon=epsilon)
    wanted = square.load("torch_outputs.npz")[f"{code}/f64/logits"]
    assert distance(IMPLEMENTATIONS[name](square.weights, square.images, config), wanted) < CLOSE


@pytest.mark.parametrize("golden", [golden for golden in GOLDENS.values() if golden.config.num_classes], ids=lambda g: g.name)
@models
def test_loss_and_every_gradient_are_googles(name, golden):
    loss, gradients = {"flax": flax_gradients, "torch": torch_gradients}[name](golden)
    assert abs(loss - golden.outputs["f64/loss"]) < CLOSE
    canonical = Checkpoint.from_arrays(gradients).to("google").arrays
    wanted = {k.removeprefix("f64/grads/"): v for k, v in golden.outputs.items() if k.startswith("f64/grads/")}
    assert canonical.keys() == wanted.keys()
    largest, distances = max(np.abs(value).max() for value in wanted.values()), {}
    for key, value in wanted.items():
        if key.endswith("token_mixing/Dense_1/bias"):
            # Adds the same to all channels of a token, which every LayerNorm after it takes away: zero but for rounding.
            assert max(np.abs(value).max(), np.abs(canonical[key]).max()) < 1e-15 * largest, key
        else:
            distances[key] = distance(np.asarray(canonical[key]), value)
    print(f"{golden.name}, {name}: gradients within {max(distances.values()):.1e}")
    assert max(distances.values()) < CLOSE


def flax_gradients(golden):
    import jax
    import optax
    from flax import nnx

    with jax.enable_x64(True):
        model = flax_model(golden.weights, golden.config)

        def loss(model):
            logits = model(golden.images.astype(np.float64))
            return optax.softmax_cross_entropy_with_integer_labels(logits, golden.outputs["labels"]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        flat = nnx.to_flat_state(nnx.state(gradients, nnx.Param))
        return float(value), {"/".join(path): np.asarray(leaf[...]) for path, leaf in flat}


def torch_gradients(golden):
    import torch
    from implementations import torch_model

    model = torch_model(golden.weights, golden.config)
    logits = model(torch.from_numpy(golden.images).double().permute(0, 3, 1, 2))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(golden.outputs["labels"]))
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def test_linen_names_its_parameters_as_google_does(golden):
    import jax
    from linen_mixer import MlpMixer

    variables = jax.eval_shape(MlpMixer(golden.config).init, jax.random.key(0), golden.images[:1])
    wanted = checkpoint(golden.weights, golden.config).as_linen()
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)


def test_linen_keeps_to_a_dtype(square):
    logits = of_linen(square.weights, square.images, square.config, dtype="bfloat16")
    assert logits.dtype == "bfloat16"
    assert 1e-4 < distance(logits.astype(np.float64), square.result) < 0.1  # bfloat16 keeps 8 bits


def test_timms_file_holds_googles_weights(square):
    timm = convert.read(square.weights_file.with_name("timm.safetensors"))
    google = timm.to("google").arrays
    assert google.keys() == square.weights.keys()
    assert all(np.array_equal(np.asarray(google[name]), array) for name, array in square.weights.items())
    assert (timm.config.gelu, timm.config.layer_norm_epsilon) == ("exact", 1e-6)


# Sabotage: a fault in the table or the config must not pass the comparisons above.


def swapped(a, b):
    return lambda t: {"modules": t.modules | {a: t.modules[b], b: t.modules[a]}}


def with_axes(kind, axes):
    """Other axes for the weight of a kind of module: a dict by the layout's name."""

    def change(t):
        (weight, _), *others = t.leaves[kind].items()
        return {"leaves": t.leaves | {kind: dict([(weight, axes[t.name]), *others])}}

    return change


TABLE_FAULTS = {
    "swapped norms": swapped("token_norm", "channel_norm"),
    "token Dense_0 and Dense_1 swapped": swapped("token_mixing/dense_0", "token_mixing/dense_1"),
    "channel Dense_0 and Dense_1 swapped": swapped("channel_mixing/dense_0", "channel_mixing/dense_1"),
    "stem axes": with_axes("stem", {"flax": "w h i o", "timm": "o i w h"}),
    "a transposed kernel": with_axes("mlp", {"flax": "o i", "timm": "i o"}),
}
# Where both matmuls of an MLP have one shape, no check of shapes can help.
EQUAL = MixerConfig(
    patch_size=(3, 3), image_size=(12, 12), num_blocks=2, hidden_dim=10, tokens_mlp_dim=16, channels_mlp_dim=10, num_classes=4
)


@models
@pytest.mark.parametrize("fault", TABLE_FAULTS)
@pytest.mark.parametrize("shapes", ["golden", "equal"])
def test_a_fault_in_the_table_is_caught(monkeypatch, square, name, fault, shapes):
    weights, images, config, wanted = square.weights, square.images, square.config, square.result
    if shapes == "equal":
        weights, images, config = random_weights(EQUAL), random_images(EQUAL), EQUAL
        wanted = of_numpy(weights, images, config)  # reads Google's names without the table
    assert distance(IMPLEMENTATIONS[name](weights, images, config), wanted) < CLOSE
    column = layouts.LAYOUTS[{"flax": "flax", "torch": "timm"}[name]]
    monkeypatch.setitem(layouts.LAYOUTS, column.name, dataclasses.replace(column, **TABLE_FAULTS[fault](column)))
    try:
        logits = IMPLEMENTATIONS[name](weights, images, config)
    except CheckpointError:
        assert shapes == "golden"  # caught by the shapes
    else:
        assert distance(logits, wanted) > 1e-3


@pytest.mark.parametrize(
    ("a", "b"), [("LayerNorm_0", "LayerNorm_1"), ("token_mixing/Dense_0/kernel", "token_mixing/Dense_1/kernel")]
)
def test_weights_in_a_wrong_place_of_linen_are_caught(a, b):
    weights, images = random_weights(EQUAL), random_images(EQUAL)
    right = of_numpy(weights, images, EQUAL)
    assert distance(of_linen(weights, images, EQUAL), right) < CLOSE
    a, b = ([name for name in weights if name.startswith(f"MixerBlock_0/{prefix}")] for prefix in (a, b))
    swapped = weights | {ours: weights[theirs] for ours, theirs in zip(a + b, b + a, strict=True)}
    assert distance(of_linen(swapped, images, EQUAL), right) > 1e-3


numerics_faults = pytest.mark.parametrize("fault", [{"gelu": "exact"}, {"layer_norm_epsilon": 1e-5}])


@implementations
@numerics_faults
def test_wrong_numerics_are_caught(name, fault, golden):
    logits = IMPLEMENTATIONS[name](golden.weights, golden.images, golden.config.replace(**fault))
    assert distance(logits, golden.result) > 1e4 * CLOSE


@numerics_faults
def test_a_wrong_default_in_the_table_is_caught(monkeypatch, square, fault):
    def logits():
        return of_numpy(square.weights, square.images, convert.read(square.weights_file).config)

    assert distance(logits(), square.result) < CLOSE
    monkeypatch.setitem(layouts.LAYOUTS, "google", dataclasses.replace(layouts.GOOGLE, **fault))
    assert distance(logits(), square.result) > 1e4 * CLOSE
