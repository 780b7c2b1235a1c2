"""Training parity: the official fine-tuning in optax and in PyTorch, with the same masks, and a run that changes frameworks."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from sides import flax_model, twin_model

import convert
from convert import Checkpoint, CheckpointError
from mixer_jax import finetune
from mixer_jax.finetune import Recipe, State

CLOSE = 1e-10  # of the largest magnitude of each tensor; measured: 3e-14 on gradients, 2e-14 on ten steps
STEPS, BATCH = 10, 6
RECIPE = Recipe(warmup_steps=3, total_steps=STEPS)  # ten steps go through both parts of the schedule
CONSTANT = Recipe(warmup_steps=0, total_steps=None)  # what the golden data were made with
RATES = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6}
WEIGHTS = random_weights(TINY)
runs = pytest.mark.parametrize("side", ["flax", pytest.param("twin", marks=pytest.mark.torch)])
trained = pytest.mark.parametrize("name", [name for name, golden in GOLDENS.items() if golden.config.num_classes])


def batch(step):
    labels = np.random.default_rng(step).integers(TINY.num_classes, size=BATCH)
    return random_images(TINY, count=BATCH, seed=100 + step, dtype="float64"), labels


def masks_of(step):
    """The masks of a step: any framework that asks for the same name gets the same booleans."""
    return lambda name, shape, keep: np.random.default_rng([step, *name.encode()]).random(shape) < keep


@functools.cache
def loss_and_gradients():
    """Compiled once for all runs; masks by name."""
    import optax
    from flax import nnx

    def loss(model, images, labels, masks):
        logits = model(images, masks=lambda name, shape, keep: masks[name])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return nnx.jit(nnx.value_and_grad(loss))


class Flax:
    """A run in either framework, in float64, behind the same verbs. `step` returns the loss."""

    def __init__(self, weights, recipe=RECIPE, *, config=TINY, dtype="float64", **options):
        import jax
        from flax import nnx

        with jax.enable_x64(dtype == "float64"):
            self.model = flax_model(weights, config, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
            self.model.train()
            self.optimizer = self.optimizer_of(recipe)
        self.dtype, self.asked, self.gradients = dtype, None, {}
        self.update = nnx.jit(lambda model, optimizer, gradients: optimizer.update(model, gradients))

    def optimizer_of(self, recipe):
        return finetune.optimizer(self.model, recipe)

    def step(self, images, labels, masks):
        import jax
        from flax import nnx

        with jax.enable_x64(self.dtype == "float64"):
            images = jax.numpy.asarray(images, self.dtype)
            if self.asked is None:
                self.asked = []
                ask = lambda name, shape, keep: self.asked.append((name, shape, keep)) or np.ones(shape, bool)  # noqa: E731
                nnx.eval_shape(lambda: self.model(images, masks=ask))
            given = {name: masks(name, shape, keep) for name, shape, keep in self.asked}
            value, gradients = loss_and_gradients()(self.model, images, labels, given)
            self.update(self.model, self.optimizer, gradients)
            flat = nnx.to_flat_state(nnx.state(gradients, nnx.Param))
            self.gradients = canonical({"/".join(path): np.asarray(leaf[...]) for path, leaf in flat})
            return float(value)

    def checkpoint(self):
        from mixer_jax.pretrained import to_checkpoint

        return to_checkpoint(self.model)

    def state(self):
        return finetune.state_of(self.optimizer)

    def resume(self, state):
        import jax

        with jax.enable_x64(self.dtype == "float64"):
            finetune.resume(self.optimizer, state)
        return self


class Twin(Flax):
    def __init__(self, weights, recipe=RECIPE, *, config=TINY, dtype="float64", **options):
        import torch
        from sides import twin_model

        from mixer_jax import torch_finetune

        self.model = twin_model(weights, config, param_dtype=getattr(torch, dtype), **options).train()
        self.optimizer = torch_finetune.Sgd(self.model, recipe)
        self.dtype, self.asked, self.gradients = dtype, [], {}

    def step(self, images, labels, masks):
        import torch

        def recorded(name, shape, keep):
            self.asked.append((name, shape, keep))
            return masks(name, shape, keep)

        images = torch.from_numpy(images).to(getattr(torch, self.dtype)).permute(0, 3, 1, 2)
        self.optimizer.zero_grad()
        self.asked.clear()
        loss = torch.nn.functional.cross_entropy(self.model(images, masks=recorded), torch.from_numpy(labels))
        loss.backward()
        self.gradients = canonical({name: weight.grad.numpy().copy() for name, weight in self.model.named_parameters()})
        self.optimizer.step()
        return loss.item()

    def checkpoint(self):
        from mixer_jax import torch_model

        return torch_model.to_checkpoint(self.model)

    def state(self):
        from mixer_jax import torch_finetune

        return torch_finetune.state_of(self.optimizer)

    def resume(self, state):
        from mixer_jax import torch_finetune

        torch_finetune.resume(self.optimizer, state)
        return self


RUNS = {"flax": Flax, "twin": Twin}


def canonical(arrays):
    """Arrays of any layout in Google's names and axes, as copies."""
    return {name: np.array(array) for name, array in Checkpoint.from_arrays(arrays).to("google").arrays.items()}


def weights_of(run):
    return {name: np.array(array) for name, array in run.checkpoint().to("google").arrays.items()}


def apart(found, wanted, *, zero=()):
    """Largest difference of any tensor relative to its largest magnitude; for those in `zero` to the largest of all."""
    assert found.keys() == wanted.keys()
    largest = max(np.abs(array).max() for array in wanted.values())

    def one(name):
        scale = largest if name.endswith(zero or "no such name") else np.abs(wanted[name]).max()
        return float(np.abs(found[name] - wanted[name]).max() / scale)

    return max(one(name) for name in wanted)


def moved(run, start):
    """How far each weight has moved, so that nothing hides behind the weights' own size."""
    return {name: array - start[name].astype(np.float64) for name, array in weights_of(run).items()}


def train(run, steps, masks=masks_of):
    for step in steps:
        run.step(*batch(step), masks(step))
    return run


@pytest.fixture(scope="module")
def ten_flax():
    return train(Flax(WEIGHTS, **RATES), range(STEPS))


# The recipe


def test_the_recipe_is_the_official_one():
    assert Recipe() == Recipe(
        base_rate=0.03, warmup_steps=500, total_steps=10_000, momentum=0.9, clip_norm=1.0, momentum_dtype=None
    )
    rates = {0: 0, 1: 6e-5, 250: 0.015, 499: 0.02994, 500: 0.03, 5250: 0.015, 10_000: 0, 12_000: 0}
    for step, rate in rates.items():
        assert Recipe().rate(step) == pytest.approx(rate, rel=1e-12, abs=1e-18), step


SOME_STEPS = [*range(12), 250, 499, 500, 501, 5250, 9999, 10_000, 10_001]


@pytest.mark.parametrize("recipe", [Recipe(), RECIPE, CONSTANT, Recipe(warmup_steps=4, total_steps=None)])
def test_the_schedule_in_optax_is_the_recipes(recipe):
    import jax

    for x64, close in ((True, 1e-12), (False, 1e-6)):
        with jax.enable_x64(x64):
            schedule = jax.jit(finetune.schedule(recipe))
            for step in SOME_STEPS:
                found = float(schedule(jax.numpy.asarray(step, "int32")))
                assert abs(found - recipe.rate(step)) <= close * recipe.base_rate, step


@pytest.mark.parametrize("recipe", [Recipe(), RECIPE])
def test_the_schedule_is_optaxs_to_its_float32(recipe):
    import optax

    theirs = optax.warmup_cosine_decay_schedule(0, recipe.base_rate, recipe.warmup_steps, recipe.total_steps)
    distances = [abs(float(theirs(step)) - recipe.rate(step)) for step in SOME_STEPS]
    print(f"optax's schedule: within {max(distances) / recipe.base_rate:.1e} of the base rate")
    assert max(distances) < 1e-6 * recipe.base_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_rate": 0}, "base_rate must be positive, not 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, not -1"),
        ({"total_steps": 500}, "total_steps must be None or more than warmup_steps, not 500"),
        ({"momentum": 1}, "momentum must be at least 0 and below 1, not 1"),
        ({"clip_norm": 0}, "clip_norm must be positive, not 0"),
        (
            {"momentum_dtype": "int8"},
            "momentum_dtype must be None or one of float16, bfloat16, float32, float64, not 'int8'",
        ),
        (
            {"base_rate": -1, "momentum": 2},
            "base_rate must be positive, not -1; momentum must be at least 0 and below 1, not 2",
        ),
    ],
)
def test_an_impossible_recipe_is_refused(options, message):
    with pytest.raises(ValueError, match="^Recipe: ") as error:
        Recipe(**options)
    assert str(error.value) == f"Recipe: {message}"


# Against Google's code


@trained
@runs
def test_two_steps_are_googles(side, name):
    golden = GOLDENS[name]
    run = RUNS[side](golden.weights, CONSTANT, config=golden.config)
    for _ in range(2):
        run.step(golden.images.astype(np.float64), golden.outputs["labels"].astype(np.int64), None)
    prefix = "f64/after_two_steps/"
    after = {k.removeprefix(prefix): v for k, v in golden.outputs.items() if k.startswith(prefix)}
    wanted = {name: array - golden.weights[name] for name, array in after.items()}
    # That bias moves by rounding alone: test_golden.py, test_loss_and_every_gradient_are_googles.
    found = apart(moved(run, golden.weights), wanted, zero=("token_mixing/Dense_1/bias",))
    print(f"{name}, {side}: two steps within {found:.1e} of the largest movement")
    assert found < CLOSE


# Flax against PyTorch


@pytest.mark.torch
def test_loss_gradients_and_ten_steps_with_masks_agree():
    flax, twin = Flax(WEIGHTS, **RATES), Twin(WEIGHTS, **RATES)
    losses, gradients, norms = [], [], []
    for step in range(STEPS):
        a, b = (run.step(*batch(step), masks_of(step)) for run in (flax, twin))
        assert flax.asked == twin.asked
        assert len(flax.asked) == 3 * 4 + 2 * 2  # the first block always stays
        losses.append(abs(a - b) / abs(a))
        gradients.append(apart(twin.gradients, flax.gradients))
        norms.append(math.sqrt(sum((array**2).sum() for array in flax.gradients.values())))
    steps = apart(moved(twin, WEIGHTS), moved(flax, WEIGHTS))
    momentum = apart(canonical(twin.state().momentum.arrays), canonical(flax.state().momentum.arrays))
    print(f"ten steps with masks, gradients' norms {min(norms):.2f} to {max(norms):.2f}: losses within {max(losses):.1e}, ")
    print(f"gradients {max(gradients):.1e}, movement {steps:.1e}, momentum {momentum:.1e}")
    assert max(norms) > RECIPE.clip_norm  # the clip acts
    assert max([*losses, *gradients, steps, momentum]) < CLOSE


@pytest.mark.torch
@pytest.mark.parametrize("remat", [False, True])
def test_the_bits_of_a_plain_flax_forward_replayed_in_the_twin_give_its_gradients(remat):
    """The forward pass that people run, with nnx.scan and no masks given, against the twin."""
    import jax
    import optax
    from flax import nnx

    from mixer_jax.model import drawn

    images, labels = batch(0)
    with jax.enable_x64(True):
        model = flax_model(WEIGHTS, TINY, rngs=nnx.Rngs(5), remat=remat, **RATES)
        model.train()

        @nnx.value_and_grad
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        value, gradients = loss(model)
        flat = nnx.to_flat_state(nnx.state(gradients, nnx.Param))
        wanted = canonical({"/".join(path): np.asarray(leaf[...]) for path, leaf in flat})
        model.seed(nnx.Rngs(5))
        sources = [drawn(key) for key in jax.random.split(model.stream(), TINY.num_blocks)]

        def masks(name, shape, keep):
            _, block, name = name.split("/", 2)
            return sources[int(block)](name, shape, keep)

        twin = Twin(WEIGHTS, **RATES)
        found = twin.step(images, labels, masks)
    distances = abs(found - float(value)) / found, apart(twin.gradients, wanted)
    print(f"plain forward, remat={remat}: loss within {distances[0]:.1e}, gradients {distances[1]:.1e}")
    assert max(distances) < CLOSE


# A run that moves


@pytest.mark.torch
@pytest.mark.parametrize(("first", "second"), [("flax", "twin"), ("twin", "flax")])
def test_a_run_that_changes_frameworks_half_way_ends_where_one_that_stays_does(ten_flax, first, second):
    half = train(RUNS[first](WEIGHTS, **RATES), range(5))
    other = RUNS[second](half.checkpoint().arrays, **RATES).resume(half.state())
    train(other, range(5, STEPS))
    found = apart(moved(other, WEIGHTS), moved(ten_flax, WEIGHTS))
    print(f"{first} to {second} half way: within {found:.1e} of the movement")
    assert found < CLOSE
    assert other.state().steps == STEPS

    lost = State(5, Checkpoint.from_arrays({k: 0 * np.asarray(v) for k, v in half.state().momentum.arrays.items()}))
    late = dataclasses.replace(half.state(), steps=4)
    for sabotage in (lost, late):  # momentum or count left behind
        other = RUNS[second](half.checkpoint().arrays, **RATES).resume(sabotage)
        train(other, range(5, STEPS))
        assert apart(moved(other, WEIGHTS), moved(ten_flax, WEIGHTS)) > 1e6 * CLOSE


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("first", "second"), [("flax", "twin"), ("twin", "flax")])
def test_state_goes_there_and_back_bit_for_bit(first, second, dtype):
    recipe = dataclasses.replace(RECIPE, momentum_dtype=dtype)
    weights = "float64" if dtype == "float64" else "float32"
    one, other, third = (RUNS[side](WEIGHTS, recipe, dtype=weights, **RATES) for side in (first, second, first))
    train(one, range(2))
    start = one.state()
    back = third.resume(other.resume(start).state()).state()
    assert start.steps == back.steps == other.state().steps == 2
    assert start.momentum.dtype.name == dtype
    assert start.momentum.layout == back.momentum.layout != other.state().momentum.layout
    assert convert.arrays.unequal(start.momentum.arrays, back.momentum.arrays) == []
    assert all(np.asarray(array).any() for array in start.momentum.arrays.values())


@pytest.mark.torch
def test_state_before_the_first_step_goes_both_ways():
    flax, twin = Flax(WEIGHTS, **RATES), Twin(WEIGHTS, **RATES)
    zeros = flax.state()
    assert (zeros.steps, twin.state().steps) == (0, 0)
    assert convert.arrays.unequal(zeros.momentum.arrays, twin.state().momentum.to("flax").arrays) == []
    train(Twin(WEIGHTS, **RATES).resume(zeros), [0])


@runs
def test_a_state_is_a_copy(side):
    run = train(RUNS[side](WEIGHTS, **RATES), [0])
    before, state = canonical(run.state().momentum.arrays), run.state()
    train(run, [1])
    after = canonical(state.momentum.arrays)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert apart(canonical(run.state().momentum.arrays), before) > 0.01


@runs
def test_momentum_is_written_and_read_as_weights_are(side, tmp_path):
    run = train(RUNS[side](WEIGHTS, dtype="float32", **RATES), [0])
    state = run.state()
    convert.write(tmp_path / "momentum.safetensors", state.momentum, layout="google")
    read = State(state.steps, convert.read(tmp_path / "momentum.safetensors"))
    run.resume(read)
    assert convert.arrays.unequal(state.momentum.arrays, run.state().momentum.arrays) == []


@pytest.mark.torch
def test_the_twins_optimiser_is_torchs_sgd():
    """Bit for bit, with the clip done before and the rate set by hand."""
    import torch

    ours = Twin(WEIGHTS, dataclasses.replace(RECIPE, clip_norm=math.inf), **RATES)
    theirs = Twin(WEIGHTS, RECIPE, **RATES)
    theirs.optimizer = torch.optim.SGD(theirs.model.named_parameters(), lr=1.0, momentum=0.9)
    for step in range(STEPS):
        theirs.optimizer.param_groups[0]["lr"] = RECIPE.rate(step)
        for run in (ours, theirs):
            run.step(*batch(step), masks_of(step))
    found = apart(moved(theirs, WEIGHTS), moved(ours, WEIGHTS))
    print(f"torch.optim.SGD: within {found:.1e} of the movement")
    assert found < CLOSE
    state = ours.optimizer.state_dict()
    assert state["state"][0].keys() == theirs.optimizer.state_dict()["state"][0].keys() == {"momentum_buffer"}
    assert state["param_groups"][0]["steps"] == STEPS


@pytest.mark.torch
def test_bfloat16_momentum_is_optaxs():
    """With float32 weights. JAX multiplies by 0.9 as bfloat16 has it, 0.8984."""
    recipe = dataclasses.replace(RECIPE, momentum_dtype="bfloat16")
    flax, twin = (train(run(WEIGHTS, recipe, dtype="float32", **RATES), range(STEPS)) for run in (Flax, Twin))
    found = apart(moved(twin, WEIGHTS), moved(flax, WEIGHTS))
    plain = apart(moved(train(Twin(WEIGHTS, dtype="float32", **RATES), range(STEPS)), WEIGHTS), moved(flax, WEIGHTS))
    print(f"bfloat16 momentum: within {found:.1e} of the movement; float32 momentum {plain:.1e}")
    assert found < 1e-3 < plain


# Sabotage: what makes one side another training must show in the comparison above.


def nesterov(monkeypatch):
    import optax

    sgd = optax.sgd
    monkeypatch.setattr(optax, "sgd", lambda schedule, **options: sgd(schedule, nesterov=True, **options))
    return Flax(WEIGHTS, **RATES)


def torchs_epsilon(monkeypatch):
    import torch

    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: norm(gradients) + 1e-6)
    return Twin(WEIGHTS, **RATES)


def without_clip(monkeypatch):
    return Twin(WEIGHTS, dataclasses.replace(RECIPE, clip_norm=math.inf), **RATES)


def unscaled_branch(monkeypatch):
    return Twin(WEIGHTS, rescale=False, **RATES)


def unscaled_dropout(monkeypatch):
    import torch

    from mixer_jax import torch_model

    def forward(self, x, name, masks):
        return torch.where(masks(name, tuple(x.shape), 1 - self.rate), x, 0)

    monkeypatch.setattr(torch_model.Dropout, "forward", forward)
    return Twin(WEIGHTS, **RATES)


def rate_a_step_ahead(monkeypatch):
    run = Twin(WEIGHTS, **RATES)
    run.optimizer.param_groups[0]["steps"] = 1
    return run


def another_mask(monkeypatch):
    return Twin(WEIGHTS, **RATES)


SABOTAGE = [nesterov, torchs_epsilon, without_clip, unscaled_branch, unscaled_dropout, rate_a_step_ahead, another_mask]


@pytest.mark.torch
@pytest.mark.parametrize("fault", SABOTAGE)
def test_another_training_shows(monkeypatch, ten_flax, fault):
    def masks(step):
        """One bit of one mask of the fifth step is another."""

        def flipped(name, shape, keep):
            mask = masks_of(step)(name, shape, keep)
            if fault is another_mask and step == 4 and name == "blocks/0/channel_mixing/dropout_1":
                mask.flat[0] ^= True
            return mask

        return flipped

    run = train(fault(monkeypatch), range(STEPS), masks)
    found = apart(moved(run, WEIGHTS), moved(ten_flax, WEIGHTS))
    print(f"{fault.__name__}: {found:.1e}")
    assert found > 100 * CLOSE  # torch's 1e-6 is the smallest


# What does not fit


@runs
def test_the_state_of_another_model_is_refused(side):
    state = train(RUNS[side](WEIGHTS, **RATES), [0]).state()
    deeper = TINY.replace(num_blocks=4, num_classes=6)
    run = RUNS[side](random_weights(deeper), config=deeper)
    with pytest.raises(CheckpointError) as error:
        run.resume(state)
    lines = str(error.value).splitlines()
    assert lines[0] == "the momentum: the weights do not fit the model"
    if side == "flax":
        assert "  head/bias: found ((5,), 'float64'), wanted ((6,), 'float64')" in lines
        assert "  blocks/token_norm/scale: found ((3, 7), 'float64'), wanted ((4, 7), 'float64')" in lines
        assert len(lines) == 1 + 2 * 6 + 2
    else:
        assert "  head.bias: found ((5,), 'float64'), wanted ((6,), 'float64')" in lines
        assert "  blocks.3.norm1.weight: found nothing, wanted ((7,), 'float64')" in lines
        assert len(lines) == 1 + 2 * 6 + 2
    after = run.state()
    assert after.steps == 0
    assert not any(np.asarray(array).any() for array in after.momentum.arrays.values())


@runs
def test_momentum_of_another_dtype_is_refused(side):
    state = RUNS[side](WEIGHTS, dtype="float32").state()
    with pytest.raises(CheckpointError, match=r"found \(\(5,\), 'float32'\), wanted \(\(5,\), 'float64'\)"):
        RUNS[side](WEIGHTS).resume(state)


@runs
def test_momentum_with_a_missing_an_unknown_or_a_misshapen_array_is_refused(side):
    """When the state is made, so that none reaches an optimiser."""
    arrays = RUNS[side](WEIGHTS).state().momentum.as_numpy()
    norm, head = {"flax": ("pre_head_norm/scale", "head/bias"), "twin": ("norm.weight", "head.bias")}[side]
    with pytest.raises(CheckpointError, match=f"missing: {norm}"):
        Checkpoint.from_arrays({name: array for name, array in arrays.items() if name != norm})
    with pytest.raises(CheckpointError, match="unknown: another"):
        Checkpoint.from_arrays(arrays | {"another": np.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"{head}: found \(4,\), wanted \(5,\)"):
        Checkpoint.from_arrays(arrays | {head: arrays[head][:4]})
    with pytest.raises(ValueError, match="steps must be a whole number of at least 0, not -1"):
        State(-1, Checkpoint.from_arrays(arrays))


@pytest.mark.torch
def test_a_twin_with_momentum_for_some_weights_only_has_no_state():
    run = train(Twin(WEIGHTS, **RATES), [0])
    del run.optimizer.state[run.model.norm.weight]
    with pytest.raises(CheckpointError, match="missing: norm.weight"):
        run.state()
    run.optimizer.state.clear()
    with pytest.raises(CheckpointError, match="not a Mixer checkpoint"):
        run.state()


@pytest.mark.torch
def test_a_step_without_any_gradient_is_refused():
    run = Twin(WEIGHTS)
    before = weights_of(run)
    with pytest.raises(ValueError, match=r"no weight has a gradient: call backward\(\) before step\(\)"):
        run.optimizer.step()
    assert run.state().steps == 0
    assert all(np.array_equal(array, before[name]) for name, array in weights_of(run).items())


@pytest.mark.torch
def test_frozen_weights_are_left_alone_and_the_others_step_as_torchs_own_optimiser_would():
    """A constant rate and no clipping, in which the recipe is torch.optim.SGD."""
    import torch

    from mixer_jax import torch_finetune

    recipe = finetune.Recipe(base_rate=0.1, warmup_steps=0, total_steps=None, clip_norm=1e9)
    models = [twin_model(WEIGHTS, TINY) for _ in range(2)]
    for model in models:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    frozen = {name: tensor.clone() for name, tensor in models[0].state_dict().items() if not name.startswith("head.")}
    ours = torch_finetune.Sgd(models[0], recipe)
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)
    for seed in (0, 1, 2):
        images, labels = (torch.from_numpy(array) for array in batch(seed))
        for model, optimizer in zip(models, (ours, theirs)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.permute(0, 3, 1, 2)), labels).backward()
            optimizer.step()
    assert all(torch.equal(models[0].state_dict()[name], tensor) for name, tensor in frozen.items())
    assert torch.allclose(models[0].head.weight, models[1].head.weight, rtol=1e-12, atol=1e-14)
    assert not np.allclose(models[0].head.weight.detach().numpy(), WEIGHTS["head/kernel"].T, atol=1e-3)


@pytest.mark.torch
def test_the_twins_optimiser_takes_a_closure():
    import torch

    run, other = Twin(WEIGHTS), Twin(WEIGHTS)
    images, labels = batch(0)
    wanted = run.step(images, labels, None)

    def closure():
        logits = other.model(torch.from_numpy(images).permute(0, 3, 1, 2))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        return loss

    assert other.optimizer.step(closure).item() == wanted
    assert convert.arrays.unequal(run.state().momentum.arrays, other.state().momentum.arrays) == []


def test_an_optimiser_without_momentum_has_no_state():
    import optax
    from flax import nnx

    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    with pytest.raises(ValueError, match=r"must keep one momentum \(optax.trace\), as that of mixer_jax.finetune.optimizer"):
        finetune.state_of(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))


def test_float64_momentum_without_x64_is_refused():
    run = Flax(WEIGHTS)
    with pytest.raises(ValueError, match=r"this momentum is float64, which needs 64-bit JAX"):
        finetune.resume(run.optimizer, run.state())
