"""Against what other people's code computed, in float64."""

import dataclasses

import numpy as np
import pytest
from conftest import GOLDENS, random_images, random_weights
from einops import rearrange
from sides import SIDES, checkpoint, of_referee

from convert import Checkpoint, CheckpointError, MixerConfig, layouts

CLOSE = 1e-10  # of the largest magnitude; measured: 8e-16 on outputs, 2e-14 on gradients
sides = pytest.mark.parametrize("side", ["referee", "flax", pytest.param("twin", marks=pytest.mark.torch)])
models = pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])


def distance(found, wanted) -> float:
    """Largest difference relative to the largest magnitude."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def google_names(config: MixerConfig) -> dict[str, list[str]]:
    """What Google's modules call the arrays that the tap sees."""
    names = {"stem": ["stem"], "pre_head_norm": ["pre_head_layer_norm"], "head": ["head", "output"]}
    if not config.num_classes:
        names = {"stem": ["stem"], "pre_head_norm": ["pre_head_layer_norm"], "mean": ["output"]}
    for i in range(config.num_blocks):
        ours, google = f"blocks/{i}", f"MixerBlock_{i}"
        names[f"{ours}/token_norm"] = [f"{google}/LayerNorm_0"]
        names[f"{ours}/channel_norm"] = [f"{google}/LayerNorm_1"]
        names[f"{ours}/channel_mixing/sum"] = [google]
        for mixing in ("token_mixing", "channel_mixing"):
            names[f"{ours}/{mixing}/dense_0"] = [f"{google}/{mixing}/Dense_0"]
            names[f"{ours}/{mixing}/dense_1"] = [f"{google}/{mixing}/Dense_1", f"{google}/{mixing}"]
    return names


@sides
def test_logits_or_features_are_googles(side, golden):
    found = distance(SIDES[side](golden.weights, golden.images, golden.config), golden.result)
    print(f"{golden.name}, {side}: {found:.1e} of the largest")
    assert found < CLOSE


@sides
def test_every_intermediate_is_googles(side, golden):
    seen = {}

    def tap(name, array):
        seen[name] = np.asarray(array)
        return array

    tapped = SIDES[side](golden.weights, golden.images, golden.config, tap)
    assert distance(tapped, golden.result) < CLOSE
    wanted = {k.removeprefix("f64/intermediates/"): v for k, v in golden.outputs.items() if k.startswith("f64/inter")}
    wanted["stem"] = rearrange(wanted["stem"], "b h w c -> b (h w) c")
    names = google_names(golden.config)
    assert {theirs for ours in names.values() for theirs in ours} == wanted.keys()
    for ours, all_theirs in names.items():
        for theirs in all_theirs:
            assert distance(seen[ours], wanted[theirs]) < CLOSE, (ours, theirs)
    rest = {name.split("/")[-1] for name in seen.keys() - names.keys()}
    assert rest <= {"gelu", "sum", "mean"}  # what Google's modules do not record


@sides
@pytest.mark.parametrize(
    ("code", "epsilon"), [("timm", 1e-6), ("reference", 1e-5), ("jeonsworld", 1e-6)]
)  # all three with the exact GELU
def test_logits_with_another_codes_numerics_are_that_codes(side, code, epsilon, square):
    config = square.config.replace(gelu="exact", layer_norm_epsilon=epsilon)
    wanted = square.load("torch_outputs.npz")[f"{code}/f64/logits"]
    assert distance(SIDES[side](square.weights, square.images, config), wanted) < CLOSE


@pytest.mark.parametrize("name", [name for name, golden in GOLDENS.items() if golden.config.num_classes])
@models
def test_loss_and_every_gradient_are_googles(side, name):
    golden = GOLDENS[name]
    loss, gradients = {"flax": flax_gradients, "twin": twin_gradients}[side](golden)
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
    print(f"{name}, {side}: gradients within {max(distances.values()):.1e}")
    assert max(distances.values()) < CLOSE


def flax_gradients(golden):
    import jax
    import optax
    from flax import nnx
    from sides import flax_model

    with jax.enable_x64(True):
        model = flax_model(golden.weights, golden.config)

        def loss(model):
            logits = model(golden.images.astype(np.float64))
            return optax.softmax_cross_entropy_with_integer_labels(logits, golden.outputs["labels"]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        flat = nnx.to_flat_state(nnx.state(gradients, nnx.Param))
        return float(value), {"/".join(path): np.asarray(leaf[...]) for path, leaf in flat}


def twin_gradients(golden):
    import torch
    from sides import twin_model

    model = twin_model(golden.weights, golden.config)
    logits = model(torch.from_numpy(golden.images).double().permute(0, 3, 1, 2))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(golden.outputs["labels"]))
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def test_timms_file_holds_googles_weights(square):
    import convert

    timm = convert.read(square.weights_file.with_name("timm.safetensors"))
    google = timm.to("google").arrays
    assert google.keys() == square.weights.keys()
    assert all(np.array_equal(np.asarray(google[name]), array) for name, array in square.weights.items())
    assert (timm.config.gelu, timm.config.layer_norm_epsilon) == ("exact", 1e-6)


# Sabotage: a fault in the table or the config must not pass the comparisons above.


def swapped(modules, a, b):
    return modules | {a: modules[b], b: modules[a]}


def with_leaf(leaves, kind, axes):
    weight, *rest = leaves[kind].items()
    return leaves | {kind: dict([(weight[0], axes), *rest])}


TABLE_FAULTS = {
    "swapped norms": lambda t: {"modules": swapped(t.modules, "token_norm", "channel_norm")},
    "token Dense_0 and Dense_1 swapped": lambda t: {
        "modules": swapped(t.modules, "token_mixing/dense_0", "token_mixing/dense_1")
    },
    "channel Dense_0 and Dense_1 swapped": lambda t: {
        "modules": swapped(t.modules, "channel_mixing/dense_0", "channel_mixing/dense_1")
    },
    "stem axes": lambda t: {"leaves": with_leaf(t.leaves, "stem", {"flax": "w h i o", "timm": "o i w h"}[t.name])},
    "a transposed kernel": lambda t: {"leaves": with_leaf(t.leaves, "mlp", {"flax": "o i", "timm": "i o"}[t.name])},
}
# Where both products of an MLP have one shape, no check of shapes can help.
EQUAL = MixerConfig(
    patch_size=(3, 3), image_size=(12, 12), num_blocks=2, hidden_dim=10, tokens_mlp_dim=16, channels_mlp_dim=10, num_classes=4
)


@models
@pytest.mark.parametrize("fault", TABLE_FAULTS)
@pytest.mark.parametrize("shapes", ["golden", "equal"])
def test_a_fault_in_the_table_is_caught(monkeypatch, square, side, fault, shapes):
    weights, images, config, wanted = square.weights, square.images, square.config, square.result
    if shapes == "equal":
        weights, images, config = random_weights(EQUAL), random_images(EQUAL), EQUAL
        wanted = of_referee(weights, images, config)  # reads Google's names without the table
    assert distance(SIDES[side](weights, images, config), wanted) < CLOSE
    column = layouts.LAYOUTS[{"flax": "flax", "twin": "timm"}[side]]
    monkeypatch.setitem(layouts.LAYOUTS, column.name, dataclasses.replace(column, **TABLE_FAULTS[fault](column)))
    try:
        found = SIDES[side](weights, images, config)
    except CheckpointError:
        assert shapes == "golden"  # caught by the shapes
    else:
        assert distance(found, wanted) > 1e-3


@sides
@pytest.mark.parametrize("fault", [{"gelu": "exact"}, {"layer_norm_epsilon": 1e-5}])
def test_wrong_numerics_are_caught(side, fault, golden):
    found = SIDES[side](golden.weights, golden.images, golden.config.replace(**fault))
    assert distance(found, golden.result) > 1e4 * CLOSE


@pytest.mark.parametrize("fault", [{"gelu": "exact"}, {"layer_norm_epsilon": 1e-5}])
def test_a_wrong_default_in_the_table_is_caught(monkeypatch, square, fault):
    def logits():
        import convert

        config = convert.read(square.weights_file).config
        return of_referee(square.weights, square.images, config)

    assert distance(logits(), square.result) < CLOSE
    monkeypatch.setitem(layouts.LAYOUTS, "google", dataclasses.replace(layouts.GOOGLE, **fault))
    assert distance(logits(), square.result) > 1e4 * CLOSE


def test_checkpoint_helper_keeps_the_grid(golden):
    assert checkpoint(golden.weights, golden.config).config == golden.config
