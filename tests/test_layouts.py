"""Every layout in every direction, whatever wraps it, and which weights they are."""

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from sides import of_referee

import convert
from convert import Checkpoint, CheckpointError, MixerConfig
from convert.arrays import same_bytes
from convert.identity import can_be, differences, fingerprint
from convert.layouts import LAYOUTS

PAIRS = list(itertools.permutations(LAYOUTS, 2))


def same(a, b) -> bool:
    """Same names and bits, whatever the order."""
    return a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a)


def digest(checkpoint) -> str:
    return fingerprint(checkpoint.arrays, checkpoint.layout)


@pytest.mark.torch
def test_all_golden_files_of_a_folder_are_the_same_weights(golden):
    google = convert.read(golden.weights_file)
    files = [path for path in golden.weights_file.parent.iterdir() if path.suffix in (".npz", ".pth", ".safetensors")]
    files = [path for path in files if "outputs" not in path.name]
    seen = set()
    for path in files:
        other = convert.read(path)
        seen.add(other.layout.name)
        assert same(other.to("google").arrays, google.arrays), path
        assert digest(other) == digest(google), path
    assert seen >= {"google", "legacy"}
    assert golden.name != "square" or seen == LAYOUTS.keys() - {"flax"}


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_ordered_pair_there_and_back_is_bit_exact(golden, a, b):
    start = Checkpoint.from_arrays(golden.weights).to(a)
    assert same(start.to(b).to(a).arrays, start.arrays)


def random_config(random) -> MixerConfig:
    sizes = random.integers(1, 12, 6)
    grid, patch = random.integers(1, 6, 2), random.integers(1, 4, 2)
    return MixerConfig(
        patch_size=tuple(map(int, patch)),
        image_size=tuple(map(int, grid * patch)),
        num_blocks=int(random.integers(1, 31)),
        hidden_dim=int(sizes[0]),
        tokens_mlp_dim=int(sizes[1]),
        channels_mlp_dim=int(sizes[2]),
        num_classes=int(random.integers(0, 5)),
        in_channels=int(sizes[3]),
    )


def random_case(seed: int) -> Checkpoint:
    random = np.random.default_rng(seed)
    weights = random_weights(random_config(random), seed)
    return Checkpoint.from_arrays(weights).astype(random.choice(["float16", "bfloat16", "float32", "float64"]))


def every_pair_agrees(seeds):
    for seed in seeds:
        start = random_case(seed)
        columns = {name: start.to(name) for name in LAYOUTS}
        for a, b in PAIRS:
            assert same(columns[a].to(b).arrays, columns[b].arrays), (seed, a, b)
            if seed % 10 == 0:  # the layout is recognised by itself, too
                assert Checkpoint.from_arrays(columns[a].as_numpy()).layout.name == a


def test_random_cases_for_every_pair():
    every_pair_agrees(range(20))


@pytest.mark.heavy
def test_two_hundred_random_cases_for_every_pair():
    every_pair_agrees(range(200))


@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""])
def test_random_cases_through_every_format(tmp_path, ending):
    for seed in range(20):
        start, layout = random_case(seed), list(LAYOUTS)[seed % len(LAYOUTS)]
        path = tmp_path / f"{seed}{ending}"
        convert.write(path, start, layout=layout)
        known = {"dtype": start.dtype}
        assert same(convert.read(path, **known).to("google").arrays, start.arrays), (seed, layout)


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["timm", "flax", "torch", "reference", "jeonsworld", "legacy"])
def test_what_a_conversion_wrote_gives_googles_logits_with_no_options(tmp_path, square, layout):
    """Also where the target's own code would compute another GELU or epsilon: the file carries Google's numerics."""
    import jax
    import torch

    import mixer_jax
    from mixer_jax import torch_model

    path = tmp_path / {"flax": "w"}.get(layout, "w.pt")
    convert.write(path, convert.read(square.weights_file), layout=layout)
    with jax.enable_x64(True):
        flax = np.asarray(mixer_jax.load(path, param_dtype="float64")(square.images.astype("float64")))
    images = torch.from_numpy(square.images).double().permute(0, 3, 1, 2)
    twin = torch_model.load(path, param_dtype=torch.float64)(images).detach().numpy()
    for logits in (flax, twin):
        assert np.abs(logits - square.result).max() < 1e-10 * np.abs(square.result).max()


# Legacy files


@pytest.mark.parametrize("form", ["squeezed", "another axis", "pre-Linen"])
def test_legacy_files_are_read_in_every_form_and_written_in_one(square, form):
    legacy = square.load("legacy.npz" if form != "pre-Linen" else "legacy_prelinen.npz")
    if form == "squeezed":
        legacy = {name: np.squeeze(array) for name, array in legacy.items()}
    elif form == "another axis":
        legacy = {name: array[None] if "phase" in name else array for name, array in legacy.items()}
    read = Checkpoint.from_arrays(legacy)
    assert read.layout.name == "legacy"
    assert same(read.to("google").arrays, square.weights)
    assert same(read.to("legacy").arrays, square.load("legacy.npz"))


def test_a_legacy_array_of_a_wrong_shape_is_still_refused(square):
    legacy = square.load("legacy.npz")
    legacy["Mixer/encoderblock_0/token_mixing_phase_0/kernel1"] = legacy[
        "Mixer/encoderblock_0/token_mixing_phase_0/kernel1"
    ].swapaxes(1, 2)
    with pytest.raises(CheckpointError, match=r"kernel1: found \(1, 6, 16\), wanted \(1, 16, 6\)"):
        Checkpoint.from_arrays(legacy)


def test_the_two_numberings_are_not_mixed(square):
    legacy = square.load("legacy.npz")
    legacy["Mixer/encoderblock_0/LayerNorm_2/bias"] = legacy.pop("Mixer/encoderblock_0/LayerNorm_1/bias")
    with pytest.raises(CheckpointError, match=r"missing: Mixer/encoderblock_0/LayerNorm_1/bias\n  unknown: .*LayerNorm_2/bias"):
        Checkpoint.from_arrays(legacy)


# What people wrap weights in


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [("google", "params/"), ("google", "opt/target/"), ("timm", "module."), ("timm", "state_dict/"), ("timm", "model/module.")],
)
def test_wrappers_are_taken_off_and_it_is_said(layout, prefix):
    weights = Checkpoint.from_arrays(random_weights(TINY)).to(layout).as_numpy()
    beside = {"opt/state/step": np.zeros(1), "optimizer/momentum": np.ones(2)}
    read = Checkpoint.from_arrays(prefixed(prefix, weights) | beside)
    assert same(read.arrays, weights)
    assert read.notes == (f"weights taken from under {prefix!r}", "2 other arrays left out: opt, optimizer")


def test_what_is_no_array_in_a_dictionary_is_said(square):
    read = Checkpoint.from_arrays({"params": square.weights, "epoch": 3, "name": "x"})
    assert read.notes == ("weights taken from under 'params/'", "2 entries are no arrays: epoch, name")


def test_an_optimisers_copy_of_the_tree_is_not_mistaken_for_weights():
    weights = random_weights(TINY)
    moments = prefixed("opt/0/mu/", {name: np.ones_like(array) for name, array in weights.items()})
    assert same(Checkpoint.from_arrays(prefixed("params/", weights) | moments).arrays, weights)


def test_an_average_beside_plain_weights_needs_a_key():
    weights, average = random_weights(TINY), random_weights(TINY, seed=9)
    both = prefixed("state_dict/", weights) | prefixed("state_dict_ema/", average)
    with pytest.raises(
        CheckpointError, match="several sets of weights, state_dict, state_dict_ema: say which with --key or key="
    ):
        Checkpoint.from_arrays(both)
    assert same(Checkpoint.from_arrays(both, key="state_dict_ema").arrays, average)
    assert same(Checkpoint.from_arrays(both, key="state_dict").arrays, weights)
    with pytest.raises(CheckpointError, match="no weights under the key 'ema': found state_dict, state_dict_ema"):
        Checkpoint.from_arrays(both, key="ema")


def test_plain_weights_beside_wrapped_ones_need_a_key_too():
    weights = random_weights(TINY)
    with pytest.raises(CheckpointError, match=r"several sets of weights, \(none\), ema"):
        Checkpoint.from_arrays(weights | prefixed("ema/", weights))


@pytest.mark.torch
def test_a_training_checkpoint_of_torch_is_read(tmp_path, square):
    import torch

    state = torch.load(square.weights_file.with_name("reference.pth"), weights_only=True)
    average = OrderedDict((f"module.{name}", tensor + 1) for name, tensor in state.items())
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "one.pth")
    torch.save({"model": state, "model_ema": average}, tmp_path / "two.pth")
    one = convert.read(tmp_path / "one.pth")
    assert same(one.to("google").arrays, square.weights)
    assert one.notes == (
        "weights taken from under 'state_dict/'",
        "1 other arrays left out: optimizer",
        "1 entries are no arrays: epoch",
    )
    with pytest.raises(CheckpointError, match="several sets of weights, model, model_ema/module"):
        convert.read(tmp_path / "two.pth")
    assert not same(convert.read(tmp_path / "two.pth", key="model_ema/module").to("google").arrays, square.weights)


# In memory


def test_linens_nested_dictionary_goes_both_ways(square):
    nested = Checkpoint.from_arrays(square.weights).to("timm").as_linen()
    assert set(nested) == {"params"}
    assert np.array_equal(
        nested["params"]["MixerBlock_1"]["token_mixing"]["Dense_0"]["kernel"],
        square.weights["MixerBlock_1/token_mixing/Dense_0/kernel"],
    )
    assert same(Checkpoint.from_arrays(nested).arrays, square.weights)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_tensors_in_memory_go_both_ways(dtype):
    import torch

    from mixer_jax.torch_model import MlpMixer

    weights = Checkpoint.from_arrays(random_weights(TINY)).astype(dtype)
    state = weights.to("timm").as_torch()
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    model = MlpMixer(TINY, param_dtype=getattr(torch, dtype))
    model.load_state_dict(state)
    for tensors in (model.state_dict(), dict(model.named_parameters())):
        back = Checkpoint.from_arrays(tensors)
        assert back.dtype.name == dtype
        assert same(back.to("google").arrays, weights.arrays)
    state["head.bias"] += 1
    assert same(Checkpoint.from_arrays(model.state_dict()).to("google").arrays, weights.arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_arrays_in_memory_are_taken(dtype):
    import jax.numpy as jnp

    weights = Checkpoint.from_arrays(random_weights(TINY)).astype(dtype)
    arrays = {name: jnp.asarray(array) for name, array in weights.to("flax").as_numpy().items()}
    read = Checkpoint.from_arrays(arrays)
    assert read.layout.name == "flax"
    assert same(read.to("google").arrays, weights.arrays)


# Identity


def test_the_fingerprint_is_of_the_weights_and_nothing_else(tmp_path, square):
    google = convert.read(square.weights_file)
    wanted = digest(google)
    assert {digest(google.to(layout)) for layout in LAYOUTS} == {wanted}
    assert digest(google.with_metadata(gelu="exact")) == wanted
    for ending in (".npz", ".safetensors", ""):
        convert.write(tmp_path / f"w{ending}", google, layout="timm")
        assert digest(convert.read(tmp_path / f"w{ending}")) == wanted


def test_the_fingerprint_sees_every_change():
    config = TINY.replace(hidden_dim=13)  # square channel kernels
    weights = random_weights(config)
    kernel = "MixerBlock_0/channel_mixing/Dense_0/kernel"
    flipped = weights[kernel].copy()
    flipped.view(np.uint32)[3, 4] ^= 1
    swapped = {
        name.replace("Block_0/", "Block_x/").replace("Block_1/", "Block_0/").replace("Block_x/", "Block_1/"): array
        for name, array in weights.items()
    }
    negative = weights | {"head/bias": np.zeros_like(weights["head/bias"])}
    changed = {
        "none": weights,
        "a flipped bit": weights | {kernel: flipped},
        "swapped blocks": swapped,
        "a transposed square kernel": weights | {kernel: weights[kernel].T},
        "zero": negative,
        "minus zero": negative | {"head/bias": -negative["head/bias"]},
        "no head": {name: array for name, array in weights.items() if not name.startswith("head")},
        "float64": {name: array.astype("float64") for name, array in weights.items()},
    }
    prints = {what: digest(Checkpoint.from_arrays(arrays)) for what, arrays in changed.items()}
    assert len(set(prints.values())) == len(prints)


def test_differences_are_named_and_measured():
    weights = random_weights(TINY)
    other = dict(weights) | {"head/bias": weights["head/bias"] + np.float32(0.5)}
    del other["head/kernel"]
    other["stem/bias"] = other["stem/bias"].astype("float16")
    other["pre_head_layer_norm/bias"] = np.zeros(9, "float32")
    found = {d.name: (d.what, d.largest) for d in differences(weights, other)}
    assert found.keys() == {"head/bias", "head/kernel", "stem/bias", "pre_head_layer_norm/bias"}
    assert found["head/bias"] == ("values", pytest.approx(0.5))
    assert found["head/kernel"] == ("only in the first", None)
    assert found["stem/bias"][0] == "float32 against float16"
    assert found["pre_head_layer_norm/bias"] == ("shape (7,) against (9,)", None)


def test_which_published_files_a_file_can_be():
    assert can_be(MixerConfig.named("B/16")) == ["imagenet1k/Mixer-B_16", "sam/Mixer-B_16", "gsam/Mixer-B_16"]
    assert can_be(MixerConfig.named("L/16", num_classes=21_843)) == ["imagenet21k/Mixer-L_16"]
    assert can_be(TINY) == []


# Head surgery


def test_selected_classes_keep_their_logits_and_labels(square):
    weights = convert.read(square.weights_file).with_metadata(labels=tuple("abcdefg"))
    chosen = [4, 0, 6]
    fewer = weights.with_selected_classes(chosen)
    assert fewer.metadata.labels == ("e", "a", "g")
    assert fewer.config.num_classes == 3
    logits = of_referee(weights.arrays, square.images, weights.config)
    assert np.array_equal(of_referee(fewer.arrays, square.images, fewer.config), logits[:, chosen])
    assert same(fewer.to("timm").to("google").arrays, fewer.arrays)


@pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])
def test_selected_classes_keep_their_logits_in_the_models(side):
    from sides import flax_model, twin_model

    config = TINY.replace(hidden_dim=64, num_classes=50)
    weights, images, chosen = Checkpoint.from_arrays(random_weights(config)), random_images(config), [31, 2, 49, 7]
    fewer = weights.with_selected_classes(chosen).as_numpy()
    logits = []
    for arrays, some in ((weights.arrays, config), (fewer, config.replace(num_classes=4))):
        if side == "flax":
            logits.append(np.asarray(flax_model(arrays, some, param_dtype="float32")(images)))
        else:
            import torch

            model = twin_model(arrays, some, param_dtype=torch.float32)
            logits.append(model(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy())
    # The columns are the same bits; a product with fewer columns may add in another order. Measured: 1.2e-7.
    assert np.abs(logits[0][:, chosen] - logits[1]).max() <= 2**-22


@pytest.mark.parametrize("classes", [[], [7], [-1], [1, 1]])
def test_classes_that_are_not_there_are_refused(square, classes):
    with pytest.raises(CheckpointError, match="classes must be different numbers from 0 to 6"):
        convert.read(square.weights_file).with_selected_classes(classes)


def test_labels_stay_only_with_their_head(square):
    weights = Checkpoint.from_arrays(square.weights).with_metadata(labels=tuple("abcdefg"))
    assert weights.without_head().metadata.labels is None
    assert weights.with_classes(3).metadata.labels is None
    assert weights.with_classes(7).metadata.labels == tuple("abcdefg")


def test_resizing_through_the_checkpoint_is_the_papers_rule(square):
    weights = Checkpoint.from_arrays(square.weights)
    large = weights.to("timm").resized(40)
    assert (large.config.grid, large.config.image_size, large.layout.name) == ((8, 8), (40, 40), "timm")
    images = np.random.default_rng(0).normal(size=(2, 40, 40, 3))
    crops = [images[:, r : r + 20, c : c + 20] for r in (0, 20) for c in (0, 20)]
    mean = np.mean([of_referee(square.weights, crop, square.config) for crop in crops], axis=0)
    found = of_referee(large.to("google").as_numpy(), images, large.config)
    assert np.abs(found - mean).max() < 1e-13 * np.abs(mean).max()
    with pytest.raises(CheckpointError, match="20x30 is no whole multiple of 20x20, .*say --resample or resample=True"):
        weights.resized((20, 30))
    with pytest.raises(CheckpointError, match="22x20 pixels are no whole number of patches"):
        weights.resized((22, 20), resample=True)
    assert weights.resized((20, 30), resample=True).config.grid == (4, 6)
