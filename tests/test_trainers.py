"""The golden checkpoints that trainers wrote: the same weights, and the logits of the code whose names they have."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import GOLDENS, HERE
from implementations import distance

import convert
import mixer_jax
from convert import CheckpointError, ReadOptions
from convert.commands import inspect_file
from convert.identity import fingerprint

TRAINERS = HERE / "golden" / "trainers"
SQUARE = GOLDENS["square"]
CLOSE = 1e-10  # relative to max abs

# What is given, whose logits these are, and what else is in it.
MOMENTUM, META = ["1 (30 arrays)", "2"], ["meta"]
PLAIN_TIMM = ["amp_scaler", "args", "arch", "epoch", "metric", "optimizer", "state_dict_ema (30 arrays)", "version"]
ENTRIES: dict[str, tuple[str, list[str]]] = {
    "vit_jax_msgpack": ("google", MOMENTUM),
    "vit_jax_msgpack/checkpoint_3": ("google", MOMENTUM),
    "vit_jax_orbax": ("google", MOMENTUM),
    "vit_jax_orbax/checkpoint_3": ("google", MOMENTUM),
    "linen_params.msgpack": ("google", []),
    "big_vision": ("google", ["opt (30 arrays)"]),
    "big_vision/checkpoint.bv-LAST": ("google", ["opt (30 arrays)"]),
    "big_vision/checkpoint.bv-000000100": ("google", ["opt (30 arrays)"]),
    "orbax_linen": ("google", []),
    "orbax_nnx_state": ("google", []),
    "orbax_manager": ("google", META),
    "orbax_manager/7": ("google", META),
    "orbax_manager/7/state": ("google", []),
    "orbax_v1": ("google", []),
    "orbax_v1/state": ("google", []),
    "timm_last.pth.tar": ("timm", PLAIN_TIMM),
    "ddp.pth": ("timm", ["epoch"]),
    "hf_trainer.safetensors": ("timm", []),
    "mmpretrain.pth": ("mmpretrain", META),
}
OPTIONS = {"timm_last.pth.tar": ReadOptions(key="state_dict")}
LAYOUTS = {"orbax_nnx_state": "flax"} | {name: code for name, (code, _) in ENTRIES.items() if code != "google"}


def parametrized(*names: str):
    """A .pth file needs PyTorch to be read at all."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.torch) if ".pth" in n else n for n in names])


entries = parametrized(*ENTRIES)


def options(name: str, **more) -> ReadOptions:
    return dataclasses.replace(OPTIONS.get(name, ReadOptions()), **more)


def logits_of(code: str) -> np.ndarray:
    """What the code computed from these weights, in float64."""
    if code == "mmpretrain":
        with np.load(TRAINERS / "outputs.npz", allow_pickle=False) as outputs:
            return outputs["mmpretrain/f64/logits"]
    return SQUARE.result if code == "google" else SQUARE.load("torch_outputs.npz")[f"{code}/f64/logits"]


def logits_by(framework: str, source) -> np.ndarray:
    if framework == "flax":
        import jax

        with jax.enable_x64(True):
            return np.asarray(mixer_jax.load(source, param_dtype="float64")(SQUARE.images.astype("float64")))
    import torch

    from mixer_jax import torch_pretrained

    with torch.inference_mode():
        images = torch.from_numpy(SQUARE.images).double().permute(0, 3, 1, 2)
        return torch_pretrained.load(source, param_dtype=torch.float64)(images).numpy()


def test_every_golden_entry_is_listed_here():
    files = {path.name for path in TRAINERS.iterdir()} - {"README.md", "outputs.npz"}
    assert {name.partition("/")[0] for name in ENTRIES} == files


@entries
def test_the_weights_are_googles_and_what_else_is_there_is_listed(name):
    facts = inspect_file(TRAINERS / name, reading=options(name))
    google = convert.read(SQUARE.weights_file)
    assert facts["fingerprint"] == fingerprint(google.arrays, google.layout)
    assert facts["layout"] == LAYOUTS.get(name, "google")
    listed, wanted = facts["also in the file"], ENTRIES[name][1]
    assert sorted(listed) == sorted(wanted) if wanted else listed == "nothing"


@entries
def test_logits_are_those_of_the_code_whose_names_they_are(name):
    source, wanted = TRAINERS / name, logits_of(ENTRIES[name][0])
    source = convert.read(source, OPTIONS[name]) if name in OPTIONS else source
    error = distance(logits_by("flax", source), wanted)
    print(f"{name}: {error:.1e} relative to max abs")
    assert error < CLOSE


@pytest.mark.torch
@pytest.mark.parametrize("name", ENTRIES)
def test_logits_of_the_pytorch_model_are_too(name):
    source, wanted = TRAINERS / name, logits_of(ENTRIES[name][0])
    source = convert.read(source, OPTIONS[name]) if name in OPTIONS else source
    assert distance(logits_by("torch", source), wanted) < CLOSE


@pytest.mark.parametrize("framework", ["flax", pytest.param("torch", marks=pytest.mark.torch)])
@parametrized("orbax_manager", "hf_trainer.safetensors", "timm_last.pth.tar", "ddp.pth", "mmpretrain.pth")
def test_with_googles_numerics_logits_are_googles(framework, name):
    checkpoint = convert.read(TRAINERS / name, options(name, gelu="tanh", layer_norm_epsilon=1e-6))
    assert distance(logits_by(framework, checkpoint), SQUARE.result) < CLOSE


@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(["google", "timm", "mmpretrain"], 2)])
def test_a_wrong_default_of_the_numerics_would_be_caught(a, b):
    assert distance(logits_of(a), logits_of(b)) > 1e4 * CLOSE


# Several sets of weights, several steps


@pytest.mark.torch
def test_an_average_beside_the_weights_needs_a_key():
    with pytest.raises(CheckpointError) as error:
        convert.read(TRAINERS / "timm_last.pth.tar")
    assert "several sets of weights, state_dict, state_dict_ema: say which with --key or key=" in str(error.value)
    average = convert.read(TRAINERS / "timm_last.pth.tar", ReadOptions(key="state_dict_ema")).to("google")
    assert average.arrays.keys() == SQUARE.weights.keys()
    assert all(np.array_equal(np.asarray(average.arrays[name]), array / 2) for name, array in SQUARE.weights.items())


def test_a_step_selects_one_of_a_run():
    earlier = convert.read(TRAINERS / "orbax_manager", ReadOptions(step=3))
    assert earlier.sizes == convert.read(SQUARE.weights_file).sizes
    assert not any(np.asarray(array).any() for array in earlier.arrays.values())
    for name, step in (("orbax_manager", 7), ("vit_jax_msgpack", 3), ("vit_jax_orbax", 3), ("big_vision", 100)):
        chosen = convert.read(TRAINERS / name, ReadOptions(step=step))
        assert np.array_equal(np.asarray(chosen.to("google").arrays["head/kernel"]), SQUARE.weights["head/kernel"])


@pytest.mark.parametrize(
    ("name", "steps"), [("orbax_manager", "3, 7"), ("vit_jax_msgpack", "3"), ("vit_jax_orbax", "3"), ("big_vision", "100")]
)
def test_a_step_that_is_not_there_is_refused_with_those_that_are(name, steps):
    with pytest.raises(CheckpointError, match=rf"{name}: .*\b5\b.*\b{steps}\b"):
        convert.read(TRAINERS / name, ReadOptions(step=5))


def test_which_step_was_taken_is_noted():
    assert any("7" in note and "3" in note for note in convert.read(TRAINERS / "orbax_manager").notes)
