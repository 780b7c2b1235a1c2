"""Training parity: the official fine-tuning recipe in optax and in PyTorch, with the same masks."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import GOLDENS, TINY, both
from training_runs import CONSTANT, RATES, RECIPE, RUNS, STEPS, FlaxRun, TorchRun, batch, distance, masks_of, movement, train

from mixer_jax.training import recipe as optax_recipe
from mixer_jax.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("unoptimised")
CLOSE = 1e-10  # relative to max abs of each tensor; measured: 3e-14 on gradients, 2e-14 on ten steps


@pytest.fixture(scope="module")
def ten_flax_steps(unoptimised):
    return movement(train(FlaxRun(**RATES)))


# The recipe


def test_the_recipe_is_the_official_one():
    official = {"base_rate": 0.03, "warmup_steps": 500, "total_steps": 10_000, "momentum": 0.9, "clip_norm": 1.0}
    official |= {"optimizer": "sgd", "weight_decay": 0.0, "layer_decay": 1.0, "train": "*", "loss": "softmax"}
    off = {"momentum_dtype": None, "b2": 0.999, "label_smoothing": 0.0, "accumulation": 1, "ema_decay": None}
    assert dataclasses.asdict(Recipe()) == official | off
    rates = {0: 0, 1: 6e-5, 250: 0.015, 499: 0.02994, 500: 0.03, 5250: 0.015, 10_000: 0, 12_000: 0}
    for step, rate in rates.items():
        assert Recipe().rate(step) == pytest.approx(rate, rel=1e-12, abs=1e-18), step


SOME_STEPS = [*range(12), 250, 499, 500, 501, 5250, 9999, 10_000, 10_001]


@pytest.mark.parametrize("recipe", [Recipe(), RECIPE, CONSTANT, Recipe(warmup_steps=4, total_steps=None)])
def test_the_schedule_in_optax_is_the_recipes(recipe):
    import jax
    import optax

    for x64, close in ((True, 1e-12), (False, 1e-6)):
        with jax.enable_x64(x64):
            rates = np.asarray(jax.jit(jax.vmap(optax_recipe.schedule(recipe)))(np.array(SOME_STEPS, "int32")))
        assert np.abs(rates - np.array([recipe.rate(step) for step in SOME_STEPS])).max() <= close * recipe.base_rate
    if recipe.total_steps is not None:
        theirs = optax.warmup_cosine_decay_schedule(0, recipe.base_rate, recipe.warmup_steps, recipe.total_steps)
        assert max(abs(float(theirs(step)) - recipe.rate(step)) for step in SOME_STEPS) < 1e-6 * recipe.base_rate


WRONG = {
    "base_rate": (0, "positive"),
    "warmup_steps": (-1, "a whole number of at least 0"),
    "total_steps": (500, "None or more than warmup_steps"),
    "momentum": (1, "at least 0 and below 1"),
    "clip_norm": (0, "positive"),
    "momentum_dtype": ("int8", "None or one of float16, bfloat16, float32, float64"),
    "optimizer": ("adam", "sgd or adamw"),
    "b2": (1.0, "at least 0 and below 1"),
    "weight_decay": (0.1, "at least 0, and 0 for sgd"),
    "layer_decay": (0, "above 0 and at most 1"),
    "train": ("head,", "patterns of names, with commas"),
    "loss": ("mse", "softmax or sigmoid"),
    "label_smoothing": (1, "at least 0 and below 1"),
    "accumulation": (0, "a whole number of at least 1"),
    "ema_decay": (1.0, "None, or at least 0 and below 1"),
}


def test_an_impossible_recipe_is_refused_with_every_fault():
    faults = {name: f"{name} must be {rule}, not {value!r}" for name, (value, rule) in WRONG.items()}
    for names in (*([name] for name in WRONG), ["base_rate", "momentum"]):
        with pytest.raises(ValueError, match="^Recipe: ") as error:
            Recipe(**{name: WRONG[name][0] for name in names})
        assert str(error.value) == "Recipe: " + "; ".join(faults[name] for name in names)


# Against Google's code


@pytest.mark.parametrize("name", [name for name, golden in GOLDENS.items() if golden.config.num_classes])
@both
def test_two_steps_are_googles(framework, name):
    golden, prefix = GOLDENS[name], "f64/after_two_steps/"
    run = RUNS[framework](golden.weights, CONSTANT, config=golden.config)
    for _ in range(2):
        run.step(golden.images.astype(np.float64), golden.outputs["labels"].astype(np.int64), None)
    after = {k.removeprefix(prefix): v for k, v in golden.outputs.items() if k.startswith(prefix)}
    expected = {name: array - golden.weights[name] for name, array in after.items()}
    # That bias moves by rounding alone: test_golden.py, test_loss_and_every_gradient_are_googles.
    error = distance(movement(run, golden.weights), expected, zero=("token_mixing/Dense_1/bias",))
    print(f"{name}, {framework}: two steps within {error:.1e}, relative to max abs of the movement")
    assert error < CLOSE


# Flax against PyTorch


@pytest.mark.torch
def test_loss_gradients_and_ten_steps_with_masks_agree():
    a, b = FlaxRun(**RATES), TorchRun(**RATES)
    losses, gradients, norms = [], [], []
    for step in range(STEPS):
        one, other = (run.step(*batch(step), masks_of(step)) for run in (a, b))
        assert a.requested == b.requested
        assert len(a.requested) == 3 * 4 + 2 * 2  # the first block is never dropped
        losses.append(abs(one - other) / abs(one))
        gradients.append(distance(b.gradients(), a.gradients()))
        norms.append(math.sqrt(sum((array**2).sum() for array in a.gradients().values())))
    steps, momentum = distance(movement(b), movement(a)), distance(b.momentum(), a.momentum())
    print(f"ten steps with masks, norms of gradients {min(norms):.2f} to {max(norms):.2f}: losses within {max(losses):.1e}, ")
    print(f"gradients {max(gradients):.1e}, movement {steps:.1e}, momentum {momentum:.1e}")
    assert max(norms) > RECIPE.clip_norm  # the clip acts
    assert max([*losses, *gradients, steps, momentum]) < CLOSE


@pytest.mark.torch
def test_the_random_bits_of_a_plain_flax_forward_replayed_in_pytorch_give_its_gradients():
    """The forward pass that people run, in a loop and without masks, against the PyTorch model."""
    import jax
    import optax
    from flax import nnx

    from mixer_jax.blocks import random_masks

    images, labels = batch(0)
    key = jax.random.key(6, impl="unsafe_rbg")  # compiles in a fraction of the time of the default generator
    with jax.enable_x64(True):
        run = FlaxRun(**RATES)

        @nnx.jit
        @nnx.value_and_grad
        def loss_and_gradients(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(images, rngs=key), labels).mean()

        loss, run.gradient_state = loss_and_gradients(run.model)
        masks = [random_masks(key) for key in jax.random.split(key, TINY.num_blocks)]

        def replayed(name, shape, keep_rate):
            _, block, name = name.split("/", 2)
            return masks[int(block)](name, shape, keep_rate)

        other = TorchRun(**RATES)
        error = abs(other.step(images, labels, replayed) / float(loss) - 1)
    error = max(error, distance(other.gradients(), run.gradients()))
    print(f"plain forward: loss and gradients within {error:.1e}")
    assert error < CLOSE


# The PyTorch optimizer


@pytest.mark.torch
@pytest.mark.parametrize("trained", ["", "head"])
def test_the_pytorch_optimizer_without_the_clip_is_torchs_sgd_and_leaves_frozen_weights_alone(trained):
    """To 1e-10 of the movement, with the learning rate of each step set by hand in torch.optim.SGD."""
    import torch

    recipe = dataclasses.replace(RECIPE, clip_norm=math.inf)
    ours, theirs = TorchRun(recipe=recipe, **RATES), TorchRun(recipe=recipe, **RATES)
    theirs.optimizer = torch.optim.SGD(theirs.model.named_parameters(), lr=1.0, momentum=0.9)
    for run in (ours, theirs):
        for name, weight in run.model.named_parameters():
            weight.requires_grad_(name.startswith(trained))
    for step in range(STEPS):
        theirs.optimizer.param_groups[0]["lr"] = recipe.rate(step)
        for run in (ours, theirs):
            run.step(*batch(step), masks_of(step))
    moved, expected = ({k: v for k, v in movement(run).items() if k.startswith(trained)} for run in (ours, theirs))
    error = distance(moved, expected)
    print(f"torch.optim.SGD: within {error:.1e} of the movement")
    assert error < CLOSE
    assert not any(array.any() for name, array in movement(ours).items() if name not in moved)
    states = [run.optimizer.state_dict() for run in (ours, theirs)]
    assert all(state.keys() == {"momentum_buffer"} for optimizer in states for state in optimizer["state"].values())
    assert states[0]["param_groups"][0]["steps"] == STEPS


@pytest.mark.torch
def test_bfloat16_momentum_is_optaxs():
    """With float32 weights. JAX multiplies by 0.9 as bfloat16 has it, 0.8984."""
    options = {"recipe": dataclasses.replace(RECIPE, momentum_dtype="bfloat16"), "dtype": "float32", **RATES}
    wanted = movement(train(FlaxRun(**options)))
    error = distance(movement(train(TorchRun(**options))), wanted)
    float32 = distance(movement(train(TorchRun(**options | {"recipe": RECIPE}))), wanted)
    print(f"bfloat16 momentum: within {error:.1e} of the movement; float32 momentum {float32:.1e}")
    assert error < 1e-3 < float32


@pytest.mark.torch
def test_a_step_without_any_gradient_is_refused():
    run = TorchRun()
    before = run.weights()
    with pytest.raises(ValueError, match=r"no weight has a gradient: call backward\(\) before step\(\)"):
        run.optimizer.step()
    assert run.optimizer.param_groups[0]["steps"] == 0
    assert all(np.array_equal(array, before[name]) for name, array in run.weights().items())


@pytest.mark.torch
def test_the_pytorch_optimizer_takes_a_closure():
    run, other = TorchRun(), TorchRun()
    loss = run.step(*batch(0), None)
    assert other.optimizer.step(lambda: other.loss(*batch(0))).item() == loss
    assert distance(other.momentum(), run.momentum()) == 0


# Sabotage: what makes one implementation train differently must show in the comparison above.


def nesterov(monkeypatch):
    import optax

    sgd = optax.sgd
    monkeypatch.setattr(optax, "sgd", lambda schedule, **options: sgd(schedule, nesterov=True, **options))
    return FlaxRun(**RATES)


def torchs_epsilon(monkeypatch):
    import torch

    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: norm(gradients) + 1e-6)
    return TorchRun(**RATES)


def unscaled_dropout(monkeypatch):
    import torch

    from mixer_jax.torch_model import Dropout

    monkeypatch.setattr(
        Dropout, "forward", lambda self, x, name, masks: torch.where(masks(name, tuple(x.shape), 1 - self.rate), x, 0)
    )
    return TorchRun(**RATES)


def rate_a_step_ahead(monkeypatch):
    run = TorchRun(**RATES)
    run.optimizer.param_groups[0]["steps"] = 1
    return run


FAULTS = {
    "nesterov": nesterov,
    "torch's epsilon": torchs_epsilon,
    "no clip": lambda _: TorchRun(recipe=dataclasses.replace(RECIPE, clip_norm=math.inf), **RATES),
    "no momentum": lambda _: TorchRun(recipe=dataclasses.replace(RECIPE, momentum=0.0), **RATES),
    "unscaled branch": lambda _: TorchRun(rescale=False, **RATES),
    "unscaled dropout": unscaled_dropout,
    "rate a step ahead": rate_a_step_ahead,
    "another mask": lambda _: TorchRun(**RATES),
}


@pytest.mark.torch
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_training_shows(monkeypatch, ten_flax_steps, fault):
    def masks(step):
        def flipped(name, shape, keep_rate):
            mask = masks_of(step)(name, shape, keep_rate)
            if fault == "another mask" and step == 4 and name == "blocks/0/channel_mixing/dropout_1":
                mask.flat[0] ^= True  # one bit of one mask of one step
            return mask

        return flipped

    error = distance(movement(train(FAULTS[fault](monkeypatch), masks)), ten_flax_steps)
    print(f"{fault}: {error:.1e}")
    assert error > 100 * CLOSE  # torch's 1e-6 is the smallest
