"""What other devices would be given to run, read from programs lowered or compiled for them on a machine that has none."""

import re

import jax
import numpy as np
import programs
import pytest
from ahead_of_time import UNOPTIMIZED, Job, compile_for, versions
from implementations import flax_model
from jax.sharding import NamedSharding, PartitionSpec

from convert import MixerConfig

S32 = MixerConfig.named("S/32")
PARITY = {"model": "mixer_jax", "batch": 2, "variant": "S/32", "dtype": None, "precision": "highest"}
TRAINING = {"model": "mixer_jax", "batch": 2, "variant": "S/32", "blocks": 3, "remat": True, "data_parallel": True}
STEM = {"cpu": "dot_general", "cuda": "convolution", "tpu": "convolution"}
platforms = pytest.mark.parametrize("platform", STEM)
v5e = pytest.mark.device("libtpu", "v5e")


# The parity program, as it is lowered for a platform.


def matmuls(platform: str, **options) -> tuple[list[str], list[str]]:
    """The sorted names and precisions of all matmuls and convolutions, as lowered for "cpu", "cuda" or "tpu"."""
    jitted, arguments = programs.forward(jax.devices(), **(PARITY | options))
    text = jitted.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot|conv)", line)]
    names = [re.search(r"stablehlo\.(\w+)", line)[1] for line in lines]
    return sorted(names), sorted(",".join(re.findall(r"HIGHEST|HIGH|DEFAULT", line)) for line in lines)


@platforms
@pytest.mark.parametrize(("precision", "lowered"), [("highest", "HIGHEST,HIGHEST"), (None, "DEFAULT,DEFAULT")])
def test_every_matmul_has_the_precision_of_the_model_and_the_stem_is_the_platforms(platform, precision, lowered):
    names, precisions = matmuls(platform, precision=precision)
    assert names == sorted([STEM[platform], *5 * ["dot_general"]])  # stem, two in each MLP of the block loop, head
    assert precisions == 6 * [lowered]


@platforms
def test_one_matmul_at_default_precision_is_found(platform, monkeypatch):
    from mixer_jax.model import MlpBlock

    complete = MlpBlock.__init__

    def forgetful(self, features, *arguments, **options):
        complete(self, features, *arguments, **options)
        if features == S32.num_tokens:
            self.dense_1.precision = None

    monkeypatch.setattr(MlpBlock, "__init__", forgetful)
    assert matmuls(platform)[1] == ["DEFAULT,DEFAULT", *5 * ["HIGHEST,HIGHEST"]]


def test_a_stem_chosen_by_the_host_is_found(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cpu, default: cpu(*arguments))
    assert matmuls("tpu")[0] == 6 * ["dot_general"]


# Compiled programs.

HIGHEST = ("highest", "highest")
CHIPS = [pytest.param("v5e:2x2", UNOPTIMIZED, marks=v5e), pytest.param("h100", None, marks=pytest.mark.h100)]


@pytest.mark.parametrize(("target", "options"), CHIPS)
def test_full_precision_is_still_there_after_compilation(target, options):
    large = PARITY | {"variant": "B/16", "batch": 8}
    jobs = [Job("programs:forward", large | {"precision": precision}, options) for precision in ("highest", None)]
    full, default = compile_for(target, jobs)
    assert [precision[:2] for precision in full.matmul_precisions()] == 6 * [HIGHEST]  # a third operand is a bias
    assert not [precision for precision in default.matmul_precisions() if precision[:2] == HIGHEST]
    assert len(default.matmul_precisions()) == 6
    assert full.temporaries > 0


def replicated_step(devices, **options):
    """Training in which every device gets the whole batch: nothing is left to exchange. Imported by programs.py."""
    jitted, (parameters, state, *batch) = programs.train_step(devices, **options)
    replicated = NamedSharding(batch[0].sharding.mesh, PartitionSpec())
    return jitted, (parameters, state, *(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated) for a in batch))


def test_data_parallel_training_on_8_devices_exchanges_each_gradient_once_and_nothing_else():
    jobs = [Job("programs:train_step", TRAINING), Job("test_ahead_of_time:replicated_step", TRAINING)]
    split, replicated = (program.collectives() for program in compile_for("cpu:8", jobs))
    assert split.keys() == {"all-reduce"}
    # The loop over blocks is in the text once: the gradients of one block, those outside the loop, and the loss.
    assert sum(split["all-reduce"]) == S32.replace(num_blocks=1).num_parameters + 1
    assert replicated == {}


SMALL = {"num_blocks": 3, "hidden_dim": 128, "tokens_mlp_dim": 64, "channels_mlp_dim": 256, "image_size": 32}
SMALL |= {"patch_size": 8, "num_classes": 8}
SPLIT_STEM, SPLIT_HEAD = 8 * 8 * 3 * 128, 128 * 8
TOKENS = 16 * 128  # of an image


@pytest.fixture(scope="module")
def on_4x4():
    """The collectives of a forward pass and of a training step on 16 chips, by mesh and whether weights are split."""
    keys = [(mesh, split) for mesh in ("data=16", "data=4,model=4") for split in (False, True)]
    jobs = [
        Job(f"programs:{work}", {"sizes": SMALL, "batch": 32, "mesh": mesh, "split_weights": split}, UNOPTIMIZED)
        for mesh, split in keys
        for work in ("placed_forward", "placed_step")
    ]
    programs = [program.collectives() for program in compile_for("v5e:4x4", jobs)]
    return {key: programs[2 * i : 2 * i + 2] for i, key in enumerate(keys)}


def numbers(sizes: dict) -> int:
    """The gradients that are in the text of a step once: those of one block, since the blocks are a loop, and all others."""
    return MixerConfig.named("S/32").replace(**sizes | {"num_blocks": 1}).num_parameters


@v5e
def test_on_16_chips_data_parallel_training_sums_each_gradient_once(on_4x4):
    forward, step = on_4x4["data=16", False]
    assert forward == {}
    assert step.keys() == {"all-reduce"}
    assert sum(step["all-reduce"]) == numbers(SMALL) + 1  # the loss


@v5e
def test_on_16_chips_a_split_kernel_is_gathered_for_each_pass_and_its_gradient_summed_once(on_4x4):
    """XLA without optimisation sums whole gradients and keeps a part of each; see the test of L/16."""
    blocks = 2 * [16 * 64, 128 * 256]
    forward, step = on_4x4["data=16", True]
    assert {kind: sorted(sizes) for kind, sizes in forward.items()} == {"all-gather": sorted([*blocks, SPLIT_STEM, SPLIT_HEAD])}
    assert step.keys() == {"all-gather", "all-reduce"}
    assert sorted(step["all-gather"]) == sorted([*blocks, *blocks, SPLIT_STEM, SPLIT_HEAD])
    assert sum(step["all-reduce"]) == numbers(SMALL) + 1 + 6  # and the squares of 6 kernels' parts, for the norm


@v5e
def test_on_16_chips_a_block_sums_twice_over_model_in_each_pass(on_4x4):
    sums = 2 * [8 * TOKENS]  # of the 8 images that are on a chip
    forward, step = on_4x4["data=4,model=4", False]
    assert forward == {"all-reduce": sums}
    assert step.keys() == {"all-reduce"}
    widths = {"tokens_mlp_dim": SMALL["tokens_mlp_dim"] // 4, "channels_mlp_dim": SMALL["channels_mlp_dim"] // 4}
    assert step["all-reduce"].count(8 * TOKENS) == 4
    assert sum(step["all-reduce"]) == 2 * sum(sums) + numbers(SMALL | widths) + 1 + 5  # squares of widths' parts


@v5e
def test_on_16_chips_split_kernels_are_gathered_over_data_alone_beside_the_sums_over_model(on_4x4):
    blocks = 2 * [16 * 64 // 4, 128 * 256 // 4]
    forward, step = on_4x4["data=4,model=4", True]
    assert forward.keys() == {"all-gather", "all-reduce"}
    assert sorted(forward["all-gather"]) == sorted([*blocks, SPLIT_STEM, SPLIT_HEAD])
    assert forward["all-reduce"] == 2 * [8 * TOKENS]
    assert sorted(step.pop("all-gather")) == sorted([*blocks, *blocks, SPLIT_STEM, SPLIT_HEAD])
    assert step.pop("all-reduce").count(8 * TOKENS) == 4
    # XLA computes a fourth of the stem's and the head's gradient on each part of model, and then moves it to its part of
    # data: a permutation sends a fourth and receives one (and two numbers of its own).
    assert sorted(step.pop("collective-permute")) == [2 * SPLIT_HEAD // 4 + 2, 2 * SPLIT_STEM // 4 + 2]
    assert step == {}


@v5e
@pytest.mark.heavy
def test_an_optimised_step_of_l16_scatters_the_gradients_of_split_kernels():
    """Over data=16 each in a ring of permutations beside its matmul; over data=4 in all-reduces that keep a part."""
    options = {"variant": "L/16", "sizes": {"num_blocks": 3}, "batch": 512, "split_weights": True}
    rings, fused = (
        compile_for("v5e:4x4", [Job("programs:placed_step", options | {"mesh": mesh})])[0]
        for mesh in ("data=16", "data=4,model=4")
    )
    assert len(rings.collectives()["all-gather"]) == len(fused.collectives()["all-gather"]) == 10
    assert len(re.findall(r"^%\S*windowed_dot_general_body_rs\S* \(", rings.text, re.M)) == 5  # and the stem's
    assert not {196 * 512, 1024 * 4096} & set(rings.collectives()["all-reduce"])
    assert len(re.findall(r"^%all-reduce-scatter\S* \(", fused.text, re.M)) == 4


def test_a_program_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="compiling for cpu:1 failed(.|\n)*has no attribute 'nothing'"):
        compile_for("cpu:1", [Job("programs:nothing", {})])


@v5e
def test_the_versions_in_the_results_include_libtpu():
    assert versions().keys() == {"jax", "flax", "libtpu"}


# One program for all platforms.


def test_an_export_for_cpu_cuda_and_tpu_gives_the_same_logits_on_the_cpu(square):
    model = flax_model(square.weights, square.config, param_dtype="float32", precision="highest")
    jitted, images = jax.jit(model), square.images.astype("float32")
    exported = jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(images)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    assert "stablehlo.convolution" in again.mlir_module()  # the accelerators' stem
    expected = np.asarray(jitted(images))
    assert np.ptp(expected) > 0.1
    assert np.array_equal(np.asarray(again.call(images)), expected)
    assert not np.array_equal(np.asarray(again.call(images[::-1])), expected)
    with pytest.raises(ValueError, match="was exported for platforms"):
        jax.export.export(jitted, platforms=("cuda", "tpu"))(images).call(images)
