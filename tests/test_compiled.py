"""What a TPU and a GPU would be given to run, read from programs compiled for them on a machine that has neither.

The child process that compiles finds the builders of faulty programs here.
"""

import re

import numpy as np
import pytest
from aot import AotError, Job, Program, compile_for
from conftest import random_images, random_weights
from sides import flax_model

from convert import MixerConfig

B16 = MixerConfig.named("B/16")
PARITY = {"model": "ours", "batch": 8, "dtype": None, "precision": "highest"}
QUICK = {"optimization_level": 9}  # O0: 3 s of CPU in place of 70; precision and formulation are no choice of the optimiser
LOOP = {"trips": 7, "rows": 256, "width": 512}
JOBS = {
    "parity": Job("compiled:forward", PARITY, QUICK),
    "default precision": Job("compiled:forward", PARITY | {"precision": None}, QUICK),
    "one product at default precision": Job("test_compiled:one_product_at_default", {}, QUICK),
    "the stem of the host": Job("test_compiled:stem_of_the_host", {}, QUICK),
    "one block too few": Job("compiled:forward", PARITY | {"blocks": 11}, QUICK),
}
COUNTED = {
    "products in a loop": Job("test_compiled:loop_of_products", LOOP),
    "products one by one": Job("test_compiled:products_one_by_one", LOOP),
    "large arrays in a loop": Job("test_compiled:loop_over_memory", {"trips": 5, "megabytes": 256}),
}


# Programs with a fault, or of a known cost: built in the child.


def one_product_at_default(devices):
    """The parity program after somebody forgot one `precision=`."""
    import compiled

    import mixer_jax.model

    make = mixer_jax.model.MlpBlock.__init__

    def forgetful(self, features, hidden, **options):
        make(self, features, hidden, **options)
        if features == B16.num_tokens:
            self.dense_1.precision = None

    mixer_jax.model.MlpBlock.__init__ = forgetful  # type: ignore[method-assign]
    try:
        jitted, arguments = compiled.forward(devices, **PARITY)
        jitted.trace(*arguments)  # while the fault is in
        return jitted, arguments
    finally:
        mixer_jax.model.MlpBlock.__init__ = make  # type: ignore[method-assign]


def stem_of_the_host(devices):
    """The parity program of a model that asks what it is compiled on and not what for."""
    import compiled
    import jax

    choose = jax.lax.platform_dependent
    jax.lax.platform_dependent = lambda *arguments, cpu, default=None, **others: cpu(*arguments)
    try:
        jitted, arguments = compiled.forward(devices, **PARITY)
        jitted.trace(*arguments)
        return jitted, arguments
    finally:
        jax.lax.platform_dependent = choose


def loop_of_products(devices, *, trips, rows, width):
    import jax
    import jax.numpy as jnp

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    return jax.jit(run), _on_first(devices, (rows, width), (trips, width, width))


def products_one_by_one(devices, *, trips, rows, width):
    import jax
    import jax.numpy as jnp

    def run(x, weights):
        for i in range(trips):
            x = jnp.tanh(x @ weights[i])
        return x

    return jax.jit(run), _on_first(devices, (rows, width), (trips, width, width))


def loop_over_memory(devices, *, trips, megabytes):
    """An array too large for a core's own memory, read and written once a trip."""
    import jax

    def run(x):
        return jax.lax.fori_loop(0, trips, lambda i, x: x * 1.5 + 1, x)

    return jax.jit(run, donate_argnums=0), _on_first(devices, (megabytes * 256, 1024))


def replicated_step(devices, **options):
    """Training in which every device gets the whole batch: nothing is left to exchange."""
    import compiled
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    jitted, (parameters, state, *batch) = compiled.train_step(devices, **options)
    whole = NamedSharding(batch[0].sharding.mesh, PartitionSpec())
    return jitted, (parameters, state, *(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in batch))


def _on_first(devices, *shapes):
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(devices[0])
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes)


# The parity program.


def faults(program: Program, config: MixerConfig, batch: int) -> list[str]:
    """What is wrong with a forward pass at full precision in an accelerator's formulation."""
    products, found = program.products(), []
    h, w = config.patch_size
    stem = f"{{size={h}x{w} stride={h}x{w}}}"
    stems = [p for p in products if p.window == stem and "conv" in p.opcode]
    if [p.runs for p in stems] != [1]:
        found.append(f"stem: {len(stems)} convolutions over patches")
    rest = [p for p in products if p not in stems]
    wanted = sorted([1, *4 * [config.num_blocks]] if len(stems) == 1 else [1, 1, *4 * [config.num_blocks]])
    if sorted(p.runs for p in rest) != wanted:
        found.append(f"products: run {sorted(p.runs for p in rest)} times, not {wanted}")
    flops = sum(p.runs * p.flops for p in products)
    if flops != batch * config.forward_flops:
        found.append(f"products: {flops} FLOPs, not {batch * config.forward_flops}")
    # A third operand, where there is one, is the bias.
    found += [f"precision: {p.precision}" for p in products if p.precision[:2] != ("highest", "highest")]
    return found


v5e = pytest.mark.device("libtpu", "v5e")


@pytest.fixture(scope="module")
def tpu() -> dict[str, Program]:
    return dict(zip(JOBS, compile_for("v5e:2x2", list(JOBS.values()))))


@pytest.fixture(scope="module")
def h100() -> dict[str, Program]:
    jobs = {name: Job(job.builder, job.options) for name, job in JOBS.items()}
    return dict(zip(jobs, compile_for("h100", list(jobs.values()))))


CHIPS = [pytest.param("tpu", marks=v5e), pytest.param("h100", marks=pytest.mark.h100)]
chips = pytest.mark.parametrize("chip", CHIPS)


@chips
def test_every_product_of_the_parity_program_has_full_precision_and_the_stem_is_a_convolution(chip, request):
    program = request.getfixturevalue(chip)["parity"]
    assert faults(program, B16, 8) == []
    assert program.text.count("operand_precision") == 6  # two in a block's each MLP, stem, head: blocks are a loop
    assert all(p.operand_dtypes == ("f32", "f32") for p in program.products())


@chips
def test_no_product_of_the_default_program_has_full_precision(chip, request):
    assert faults(request.getfixturevalue(chip)["default precision"], B16, 8) == 6 * ["precision: ()"]


@chips
def test_one_product_at_default_precision_is_found(chip, request):
    assert faults(request.getfixturevalue(chip)["one product at default precision"], B16, 8) == ["precision: ()"]


@chips
def test_a_stem_chosen_by_the_host_is_found(chip, request):
    assert faults(request.getfixturevalue(chip)["the stem of the host"], B16, 8) == ["stem: 0 convolutions over patches"]


@chips
def test_a_missing_block_is_found(chip, request):
    found = faults(request.getfixturevalue(chip)["one block too few"], B16, 8)
    assert [text.split(":")[0] for text in found] == ["products", "products"]


# What is counted.


@pytest.fixture(scope="module")
def counted() -> dict[str, Program]:
    return dict(zip(COUNTED, compile_for("v5e:2x2", list(COUNTED.values()))))


@v5e
def test_flops_of_a_loop_are_those_of_the_same_products_one_by_one(counted):
    wanted = LOOP["trips"] * 2 * LOOP["rows"] * LOOP["width"] ** 2
    for name, runs in {"products in a loop": [7], "products one by one": 7 * [1]}.items():
        products = counted[name].products()
        assert [p.runs for p in products] == runs
        assert sum(p.runs * p.flops for p in products) == wanted
    once = counted["products in a loop"].cost["flops"]
    assert once < 0.2 * wanted  # what XLA says, which counts the body once


@v5e
def test_memory_traffic_of_a_loop_is_that_of_its_trips(counted):
    program, array = counted["large arrays in a loop"], 256 * 2**20
    counter = 10_000  # bytes: the loop's counter and its padding
    assert 0 <= program.memory_traffic() - 5 * 2 * array < counter
    assert 0 <= program.memory_traffic(multiply=False) - 2 * array < counter


def test_memory_traffic_counted_once_is_what_xla_counts():
    """On a CPU, where XLA counts by the same rules; a TPU's compiler has others, which are nowhere written down."""
    options = {"model": "ours", "batch": 4, "variant": "S/32", "remat": True}
    (program,) = compile_for("cpu:1", [Job("compiled:train_step", options)])
    ours, xla = program.memory_traffic(multiply=False), program.cost["bytes accessed"]
    print(f"bytes accessed: {ours / xla - 1:.1e} more than XLA says")
    assert abs(ours / xla - 1) < 1e-4  # measured: 1e-6
    assert program.memory_traffic() > 2 * ours


HLO = """HloModule known

%body (state: (s32[], f32[4,3])) -> (s32[], f32[4,3]) {
  %state = (s32[], f32[4,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %three = s32[] constant(3)
  %next = s32[] add(%i, %three)
  %x = f32[4,3]{1,0} get-tuple-element(%state), index=1
  %y = f32[4,3]{1,0} negate(%x)
  ROOT %out = (s32[], f32[4,3]{1,0}) tuple(%next, %y)
}

%condition (state.1: (s32[], f32[4,3])) -> pred[] {
  %state.1 = (s32[], f32[4,3]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[4,3]) -> (s32[], f32[4,3]) {
  %x.1 = f32[4,3]{1,0} parameter(0)
  %two = s32[] constant(2)
  %start = (s32[], f32[4,3]{1,0}) tuple(%two, %x.1)
  ROOT %loop = (s32[], f32[4,3]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def program_of(text: str) -> Program:
    return Program(text, {}, {}, 0.0, "")


def test_a_loop_from_2_to_12_by_3_runs_4_times():
    runs = {instruction.name: runs for runs, _, instruction in program_of(HLO).steps()}
    assert runs["y"] == 4
    assert runs["x.1"] == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("direction=LT", "direction=NE", "loop: its condition is not counter < constant"),
        ("%next = s32[] add", "%next = s32[] multiply", r"loop: its counter is not counter \+ constant"),
        ("%two = s32[] constant(2)", "%two = s32[] parameter(1)", "two is not a constant"),
        ("%y = f32[4,3]{1,0} negate(%x)", "%y = f32[4,3]{1,0} conditional(%i, %x)", "y: which branch of a conditional runs"),
        ("ENTRY ", "", "there is no entry"),
        ("add(%i, %three)", "add(%i, %three", "a bracket stays open"),
    ],
)
def test_a_text_that_cannot_be_counted_is_refused(old, new, message):
    with pytest.raises(AotError, match=message):
        list(program_of(HLO.replace(old, new)).steps())


def test_padding_of_a_tile_counts_as_memory_and_not_as_elements():
    from aot import arrays_of

    padded, scalar, plain = arrays_of("(f32[8,196]{1,0:T(8,128)S(1)}, s32[]{:T(128)}, bf16[2,3,5]{2,1,0})")
    assert (padded.bytes, padded.stored_bytes, padded.space) == (8 * 196 * 4, 8 * 256 * 4, 1)
    assert (scalar.bytes, scalar.stored_bytes) == (4, 512)
    assert plain.bytes == plain.stored_bytes == 60


def test_a_program_that_does_not_compile_says_why():
    with pytest.raises(AotError, match="compiling for cpu:1 failed(.|\n)*has no attribute 'nothing'"):
        compile_for("cpu:1", [Job("compiled:nothing", {})])


# Data parallel.


def test_data_parallel_training_exchanges_each_gradient_once_and_nothing_else():
    config = B16.replace(num_blocks=3)
    options = {"model": "ours", "batch": 2, "blocks": 3, "remat": True, "data_parallel": True}
    jobs = [Job("compiled:train_step", options), Job("test_compiled:replicated_step", options)]
    split, replicated = compile_for("cpu:2", jobs)
    assert split.collectives().keys() == {"all-reduce"}
    exchanged = split.collectives()["all-reduce"]
    assert exchanged.elements == config.num_parameters + 1  # the loss, too
    assert exchanged.bytes == 4 * exchanged.elements
    assert replicated.collectives() == {}


# One program for all.


def test_an_export_for_cpu_cuda_and_tpu_round_trips_and_gives_the_same_logits_on_the_cpu():
    import jax
    from flax import nnx

    config = MixerConfig.named("B/16").replace(num_blocks=3, hidden_dim=384, channels_mlp_dim=1536, tokens_mlp_dim=192)
    graph, state = nnx.split(flax_model(random_weights(config), config, param_dtype="float32", precision="highest"))
    weights, images = nnx.to_pure_dict(state), random_images(config)

    def forward(weights, images):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, weights)
        return nnx.merge(graph, filled)(images)

    jitted = jax.jit(forward)
    exported = jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(weights, images)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    text = again.mlir_module()
    assert re.search(r"stablehlo.convolution.*stride = \[16, 16\]", text)  # the accelerators' stem is there, too
    wanted = np.asarray(jitted(weights, images))
    assert np.ptp(wanted) > 0.1
    assert np.array_equal(np.asarray(again.call(weights, images)), wanted)
    weights["head"]["bias"] = weights["head"]["bias"] + 1e-3
    assert not np.array_equal(np.asarray(again.call(weights, images)), wanted)


def test_an_export_without_the_cpu_does_not_run_on_it():
    import jax

    exported = jax.export.export(jax.jit(lambda x: x + 1), platforms=("cuda", "tpu"))(np.float32(1))
    with pytest.raises(ValueError, match="was exported for platforms"):
        jax.export.deserialize(exported.serialize()).call(np.float32(1))


@v5e
def test_what_compiled_is_told_with_its_version():
    from compiled import versions

    assert versions().keys() == {"jax", "flax", "libtpu"}
