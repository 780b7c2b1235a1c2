"""Every layout in every direction, whatever wraps it, and which weights they are."""

import argparse
import itertools
import sys
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TINY, random_weights
from implementations import of_numpy
from test_convert import DTYPES, equal

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions
from convert.identity import differences, fingerprint, same_sizes
from convert.layouts import LAYOUTS


def of(checkpoint) -> str:
    return fingerprint(checkpoint.arrays, checkpoint.layout)


@pytest.mark.torch
def test_all_golden_files_of_a_folder_are_the_same_weights(golden):
    google = convert.read(golden.weights_file)
    files = [path for path in golden.weights_file.parent.iterdir() if path.suffix in (".npz", ".pth", ".safetensors")]
    files = [path for path in files if "outputs" not in path.name]
    layouts = set()
    for path in files:
        other = convert.read(path)
        layouts.add(other.layout.name)
        assert equal(other.to("google").arrays, google.arrays), path
        assert of(other) == of(google), path
    assert layouts >= {"google", "legacy"}
    assert golden.name != "square" or layouts == LAYOUTS.keys() - {
        "flax",
        "mmpretrain",
        "mlx",
    }


def random_case(seed: int) -> Checkpoint:
    random = np.random.default_rng(seed)
    patch, grid = random.integers(1, 4, 2).tolist(), random.integers(1, 6, 2).tolist()
    hidden, tokens, channels, in_channels = random.integers(1, 12, 4).tolist()
    config = MixerConfig(
        patch_size=tuple(patch),
        image_size=(patch[0] * grid[0], patch[1] * grid[1]),
        num_blocks=int(random.integers(1, 31)),
        hidden_dim=hidden,
        tokens_mlp_dim=tokens,
        channels_mlp_dim=channels,
        num_classes=int(random.integers(0, 5)),
        in_channels=in_channels,
    )
    return Checkpoint.from_arrays(random_weights(config, seed)).astype(random.choice(DTYPES))


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 200), marks=pytest.mark.heavy)], ids=["10", "190"])
def test_every_ordered_pair_is_bit_exact_on_random_sizes_and_dtypes(seeds):
    for seed in seeds:
        start = random_case(seed)
        columns = {name: start.to(name) for name in LAYOUTS}
        for a, b in itertools.permutations(LAYOUTS, 2):
            assert equal(columns[a].to(b).arrays, columns[b].arrays), (seed, a, b)
        assert all(Checkpoint.from_arrays(column.as_numpy()).layout.name == name for name, column in columns.items())
        assert equal(columns["flax"].to("google").arrays, start.arrays)


@pytest.mark.torch
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "google"])
def test_what_a_conversion_wrote_gives_googles_logits_with_no_options(tmp_path, square, layout):
    """Also where the target's own code would compute another GELU or epsilon: the file carries Google's numerics."""
    import jax
    import torch

    import mixer_jax
    from mixer_jax import torch_pretrained

    path = tmp_path / {"flax": "w"}.get(layout, "w.pt")
    convert.write(path, convert.read(square.weights_file), layout=layout)
    with jax.enable_x64(True):
        flax = np.asarray(mixer_jax.load(path, param_dtype="float64")(square.images.astype("float64")))
    images = torch.from_numpy(square.images).double().permute(0, 3, 1, 2)
    pytorch = torch_pretrained.load(path, param_dtype=torch.float64)(images).detach().numpy()
    for logits in (flax, pytorch):
        assert np.abs(logits - square.result).max() < 1e-10 * np.abs(square.result).max()


# Legacy files


@pytest.mark.parametrize("form", ["squeezed", "another axis", "pre-Linen"])
def test_legacy_files_are_read_in_every_form_and_written_in_one(square, form):
    legacy = square.load("legacy.npz" if form != "pre-Linen" else "legacy_prelinen.npz")
    if form == "squeezed":
        legacy = {name: np.squeeze(array) for name, array in legacy.items()}
    elif form == "another axis":
        legacy = {name: array[None] if "phase" in name else array for name, array in legacy.items()}
    checkpoint = Checkpoint.from_arrays(legacy)
    assert checkpoint.layout.name == "legacy"
    assert equal(checkpoint.to("google").arrays, square.weights)
    assert equal(checkpoint.to("legacy").arrays, square.load("legacy.npz"))


def test_a_wrong_shape_and_mixed_numberings_are_refused(square):
    block = "Mixer/encoderblock_0"
    for old, new, change, message in (
        ("token_mixing_phase_0/kernel1",) * 2 + (lambda a: a.swapaxes(1, 2), r"found \(1, 6, 16\), wanted \(1, 16, 6\)"),
        (
            "LayerNorm_1/bias",
            "LayerNorm_2/bias",
            np.array,
            rf"missing: {block}/LayerNorm_1/bias\n  unknown: .*LayerNorm_2/bias",
        ),
    ):
        legacy = square.load("legacy.npz")
        legacy[f"{block}/{new}"] = change(legacy.pop(f"{block}/{old}"))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.from_arrays(legacy)


# What people wrap weights in


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [("google", "params/"), ("google", "opt/target/"), ("timm", "module."), ("timm", "state_dict/"), ("timm", "model/module.")],
)
def test_prefixes_are_taken_off_and_noted(layout, prefix):
    weights = Checkpoint.from_arrays(random_weights(TINY)).to(layout).as_numpy()
    beside = {"opt/state/step": np.zeros(1), "optimizer/momentum": np.ones(2)}
    checkpoint = Checkpoint.from_arrays(prefixed(prefix, weights) | beside)
    assert equal(checkpoint.arrays, weights)
    assert checkpoint.notes == (f"weights taken from under {prefix!r}",)
    assert checkpoint.beside == ("opt/state (1 array)" if "opt" in prefix else "opt (1 array)", "optimizer (1 array)")


def test_entries_that_are_not_arrays_are_noted(square):
    checkpoint = Checkpoint.from_arrays({"params": square.weights, "epoch": 3, "name": "x"})
    assert checkpoint.notes == ("weights taken from under 'params/'",)
    assert checkpoint.beside == ("epoch", "name")


def test_an_optimisers_copy_of_the_tree_is_not_mistaken_for_weights():
    weights = random_weights(TINY)
    moments = prefixed("opt/0/mu/", {name: np.ones_like(array) for name, array in weights.items()})
    assert equal(Checkpoint.from_arrays(prefixed("params/", weights) | moments).arrays, weights)


@pytest.mark.parametrize("name", ["grad_acc", "previous_gradient", "z", "mu", "diff_params_memory"])
def test_a_state_of_optax_alone_is_no_checkpoint(name):
    state = prefixed(f"0/{name}/", random_weights(TINY))
    with pytest.raises(CheckpointError, match=f"only an optimiser's arrays, under 0/{name}: --key takes one of them"):
        Checkpoint.from_arrays(state)
    assert equal(Checkpoint.from_arrays(state, key=f"0/{name}").arrays, random_weights(TINY))


def test_of_several_sets_of_weights_one_needs_a_key():
    weights, average = random_weights(TINY), random_weights(TINY, seed=9)
    both = prefixed("state_dict/", weights) | prefixed("state_dict_ema/", average)
    for arrays, options, message in (
        (both, {}, "several sets of weights, state_dict, state_dict_ema: say which with --key or key="),
        (both, {"key": "ema"}, "no weights under the key 'ema': found state_dict, state_dict_ema"),
        (weights | prefixed("ema/", weights), {}, 'several sets of weights, "", ema'),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.from_arrays(arrays, **options)
    assert equal(Checkpoint.from_arrays(both, key="state_dict_ema").arrays, average)
    assert equal(Checkpoint.from_arrays(both, key="state_dict").arrays, weights)


def test_a_set_of_weights_beside_or_inside_another_is_told_from_it():
    weights, average = random_weights(TINY), random_weights(TINY, seed=9)
    beside = weights | prefixed("ema/", average)
    assert equal(Checkpoint.from_arrays(beside, key="").arrays, weights)
    inside = prefixed("model/", weights) | prefixed("model/ema/", average)
    assert equal(Checkpoint.from_arrays(inside, key="model").arrays, weights)
    assert equal(Checkpoint.from_arrays(inside, key="model/ema").arrays, average)
    for first, second in (("module.", "module/"), ("module/", "module.")):
        with pytest.raises(CheckpointError, match="several sets of weights, module, module"):
            Checkpoint.from_arrays(prefixed(first, weights) | prefixed(second, average))


@pytest.mark.torch
def test_of_several_state_dicts_each_has_its_own_metadata(tmp_path):
    """Numerics, labels and preprocessing are of the weights that `key` selects, in memory and in a file."""
    import torch

    from mixer_jax import torch_pretrained

    weights = Checkpoint.from_arrays(random_weights(TINY)).with_image_size(TINY.image_size)
    models = [torch_pretrained.load(weights.with_metadata(gelu=gelu)).state_dict() for gelu in ("tanh", "exact")]
    states = {"model": models[0], "other": models[1], "plain": dict(models[1])}
    torch.save(states, tmp_path / "two.pt")
    for key, gelu in (("model", "tanh"), ("other", "exact")):
        assert Checkpoint.from_arrays(states, key=key).metadata.gelu == gelu
        assert convert.read(tmp_path / "two.pt", ReadOptions(key=key)).metadata.gelu == gelu
    with pytest.raises(CheckpointError, match="are not a square grid"):  # the image size that the others state is not its own
        _ = convert.read(tmp_path / "two.pt", ReadOptions(key="plain")).config


@pytest.mark.torch
def test_a_class_of_another_library_is_named(tmp_path, monkeypatch):
    import torch

    library = types.ModuleType("another")
    library.Options = type("Options", (dict,), {"__module__": "another"})
    monkeypatch.setitem(sys.modules, "another", library)
    weights = Checkpoint.from_arrays(random_weights(TINY)).to("timm").as_torch()
    torch.save({"state_dict": weights, "options": library.Options(lr=0.1)}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="refuses it.*; it holds a another.Options: save the state_dict alone"):
        convert.read(tmp_path / "w.ckpt")


@pytest.mark.torch
def test_threads_read_a_file_with_arguments_beside_the_weights(tmp_path):
    """torch has one list of allowed names for all threads."""
    import torch

    weights = Checkpoint.from_arrays(random_weights(TINY)).to("timm").as_torch()
    torch.save({"state_dict": weights, "args": argparse.Namespace(values=list(range(20_000)))}, tmp_path / "w.pth")
    with ThreadPoolExecutor(4) as threads:
        assert {c.beside for c in threads.map(lambda _: convert.read(tmp_path / "w.pth"), range(40))} == {("args",)}


@pytest.mark.torch
def test_a_training_checkpoint_of_torch_is_read(tmp_path, square):
    import torch

    path, state = tmp_path / "w.pth", torch.load(square.weights_file.with_name("reference.pth"), weights_only=True)
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)
    checkpoint = convert.read(path)
    assert equal(checkpoint.to("google").arrays, square.weights)
    assert (checkpoint.notes, checkpoint.beside) == (
        ("weights taken from under 'state_dict/'",),
        ("epoch", "optimizer (1 array)"),
    )
    average = OrderedDict((f"module.{name}", tensor + 1) for name, tensor in state.items())
    torch.save({"model": state, "model_ema": average}, path)
    with pytest.raises(CheckpointError, match="several sets of weights, model, model_ema/module"):
        convert.read(path)
    for key in ("model_ema/module", "model_ema"):
        kernel = convert.read(path, ReadOptions(key=key)).to("google").arrays["stem/kernel"]
        assert np.array_equal(kernel, square.weights["stem/kernel"] + 1)


# In memory


def test_linens_nested_dictionary_goes_both_ways(square):
    nested = Checkpoint.from_arrays(square.weights).to("timm").as_linen()
    assert set(nested) == {"params"}
    assert np.array_equal(
        nested["params"]["MixerBlock_1"]["token_mixing"]["Dense_0"]["kernel"],
        square.weights["MixerBlock_1/token_mixing/Dense_0/kernel"],
    )
    assert equal(Checkpoint.from_arrays(nested).arrays, square.weights)


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
        assert equal(back.to("google").arrays, weights.arrays)
    state["head.bias"] += 1
    assert equal(Checkpoint.from_arrays(model.state_dict()).to("google").arrays, weights.arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_arrays_in_memory_are_taken(dtype):
    import jax.numpy as jnp

    weights = Checkpoint.from_arrays(random_weights(TINY)).astype(dtype)
    arrays = {name: jnp.asarray(array) for name, array in weights.to("flax").as_numpy().items()}
    checkpoint = Checkpoint.from_arrays(arrays)
    assert checkpoint.layout.name == "flax"
    assert equal(checkpoint.to("google").arrays, weights.arrays)


# Identity


def test_the_fingerprint_is_of_the_weights_and_nothing_else(tmp_path, square):
    google = convert.read(square.weights_file)
    wanted = of(google)
    assert {of(google.to(layout)) for layout in LAYOUTS} == {wanted}
    assert of(google.with_metadata(gelu="exact")) == wanted
    for ending in (".npz", ".safetensors", ""):
        convert.write(tmp_path / f"w{ending}", google, layout="timm")
        assert of(convert.read(tmp_path / f"w{ending}")) == wanted


def test_the_fingerprint_sees_every_change():
    weights = random_weights(TINY.replace(hidden_dim=13))  # square channel kernels
    kernel, swap = "MixerBlock_0/channel_mixing/Dense_0/kernel", str.maketrans("01", "10")
    flipped, zero = weights[kernel].copy(), np.zeros_like(weights["head/bias"])
    flipped.view(np.uint32)[3, 4] ^= 1
    changed = {
        "none": weights,
        "a flipped bit": weights | {kernel: flipped},
        "swapped blocks": {name[:12].translate(swap) + name[12:]: array for name, array in weights.items()},
        "a transposed square kernel": weights | {kernel: weights[kernel].T},
        "zero": weights | {"head/bias": zero},
        "minus zero": weights | {"head/bias": -zero},
        "no head": {name: array for name, array in weights.items() if not name.startswith("head")},
        "float64": {name: array.astype("float64") for name, array in weights.items()},
    }
    prints = {of(Checkpoint.from_arrays(arrays)) for arrays in changed.values()}
    assert len(prints) == len(changed)


def test_differences_are_named_and_measured():
    weights = random_weights(TINY)
    other = dict(weights) | {"head/bias": weights["head/bias"] + np.float32(0.5)}
    del other["head/kernel"]
    other["stem/bias"] = other["stem/bias"].astype("float16")
    other["pre_head_layer_norm/bias"] = np.zeros(9, "float32")
    rounding = float(np.abs(weights["stem/bias"] - other["stem/bias"].astype("float32")).max())
    assert {d.name: (d.what, d.max_abs) for d in differences(weights, other)} == {
        "head/bias": ("values", pytest.approx(0.5)),
        "head/kernel": ("only in the first", None),
        "stem/bias": ("float32 against float16", pytest.approx(rounding)),
        "pre_head_layer_norm/bias": ("shape (7,) against (9,)", None),
    }


def test_which_published_files_have_the_sizes_of_a_file():
    assert same_sizes(MixerConfig.named("B/16")) == [
        "imagenet1k/Mixer-B_16",
        "sam/Mixer-B_16",
        "gsam/Mixer-B_16",
        "timm/mixer_b16_224_miil-9229a591",
    ]
    assert same_sizes(MixerConfig.named("L/16", num_classes=21_843)) == ["imagenet21k/Mixer-L_16"]
    assert same_sizes(TINY) == []


# Head surgery


def test_selected_classes_keep_their_logits_and_labels(square):
    weights = convert.read(square.weights_file).with_metadata(labels=tuple("abcdefg"))
    chosen = [4, 0, 6]
    fewer = weights.with_selected_classes(chosen)
    assert fewer.metadata.labels == ("e", "a", "g")
    assert fewer.config.num_classes == 3
    logits = of_numpy(weights.arrays, square.images, weights.config)
    assert np.array_equal(of_numpy(fewer.arrays, square.images, fewer.config), logits[:, chosen])
    assert equal(fewer.to("timm").to("google").arrays, fewer.arrays)


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
    mean = np.mean([of_numpy(square.weights, crop, square.config) for crop in crops], axis=0)
    logits = of_numpy(large.to("google").as_numpy(), images, large.config)
    assert np.abs(logits - mean).max() < 1e-13 * np.abs(mean).max()
    with pytest.raises(CheckpointError, match="20x30 is not a whole multiple of 20x20, .*--resample or resample=True"):
        weights.resized((20, 30))
    with pytest.raises(CheckpointError, match="22x20 pixels are not a whole number of patches"):
        weights.resized((22, 20), resample=True)
    assert weights.resized((20, 30), resample=True).config.grid == (4, 6)
