"""A whole training step: the same recipe, batches and masks in Flax and in a PyTorch loop, in float64 over 50 steps."""

import copy
import functools
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import GOLDENS, TINY
from implementations import flax_model, torch_model
from training_runs import BATCH, RATES, WEIGHTS, FlaxRun, batch, canonical, distance, masks_of

from mixer_jax.training import recipe as optax_recipe
from mixer_jax.training.freezing import trainable
from mixer_jax.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("unoptimised")
CLOSE = 1e-10  # relative to max abs of each tensor's movement
SHORT, LONG = 10, 50  # faults are looked for after the one, agreement after the other as well

TWO_RATES = {"warmup_steps": 5, "total_steps": LONG}
RECIPES = {  # every option is in one of them
    "sgd": Recipe(
        **TWO_RATES, accumulation=3, ema_decay=0.9, layer_decay=0.7, label_smoothing=0.1, train="stem,blocks/1/*,head"
    ),
    "adamw": Recipe(**TWO_RATES, base_rate=0.003, optimizer="adamw", b2=0.99, weight_decay=0.1, loss="sigmoid", ema_decay=0.99),
}
SOFT = {"adamw"}  # trained on mixed labels, the others on classes


def labels_of(name, step):
    mixed = np.random.default_rng(step).dirichlet(np.ones(TINY.num_classes), BATCH)
    return mixed if name in SOFT else batch(step)[1]


@functools.cache
def requested():
    return tuple(FlaxRun(**RATES).requested)


def masks_by_name(step):
    return {name: masks_of(step)(name, shape, keep_rate) for name, shape, keep_rate in requested()}


def moved(weights):
    """Movement since the start in Google's names."""
    arrays = {name: np.asarray(weight) for name, weight in weights.items()}
    return {name: array - WEIGHTS[name].astype(np.float64) for name, array in canonical(arrays).items()}


@pytest.fixture(scope="module")
def flax_runs(unoptimised):
    """{recipe: {steps taken: (losses so far, movement of the weights, of their average)}}, and the last state."""

    @functools.cache
    def run(name):
        import jax

        from mixer_jax.training.step import initial_state, make_train_step

        with jax.enable_x64(True):
            model, recipe = flax_model(WEIGHTS, TINY, rngs=_rngs(), **RATES), RECIPES[name]
            state, step, losses, after = initial_state(model, recipe), jax.jit(make_train_step(model, recipe)), [], {}
            key = jax.random.key(0)
            for i in range(LONG):
                state, metrics = step(state, batch(i)[0], labels_of(name, i), key, masks_by_name(i))
                losses.append(float(metrics["loss"]))
                assert float(metrics["rate"]) == pytest.approx(recipe.rate(i), rel=1e-12)
                if i + 1 in (SHORT, LONG):
                    after[i + 1] = (list(losses), moved(state.params), moved(state.averaged))
        return after, state

    return run


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


def torch_run(name, recipe, steps, fault=None):
    """The recipe as a loop in PyTorch."""
    import torch

    from mixer_jax import torch_pretrained
    from mixer_jax.training.torch_optimizer import AdamW, Sgd

    model, losses, parts = torch_model(WEIGHTS, TINY, **RATES).train(), [], recipe.accumulation
    average = copy.deepcopy(model)
    optimizer = {"sgd": Sgd, "adamw": AdamW}[recipe.optimizer](model, recipe)
    for step in range(steps):
        images, labels = torch.from_numpy(batch(step)[0]).permute(0, 3, 1, 2), torch.from_numpy(labels_of(name, step))
        masks = masks_by_name(step)
        optimizer.zero_grad()
        losses.append(0.0)
        for k in range(parts):
            part = slice(k, None, parts)
            logits = model(images[part], masks=lambda name, *_: masks[name][part])  # noqa: B023
            loss = torch_loss(recipe, logits, labels[part]) / (1 if fault == "sum of microbatches" else parts)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters()):
                old.lerp_(new, 1 - (recipe.ema_decay or 0))
    return losses, *(moved(torch_pretrained.to_checkpoint(each).to("google").arrays) for each in (model, average))


def torch_loss(recipe, logits, labels):
    import torch
    from torch.nn import functional as F

    if recipe.loss == "softmax":
        return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    return F.binary_cross_entropy_with_logits(logits, labels.to(torch.float64), reduction="sum") / len(logits)


def difference(actual, expected):
    """Of two runs: the largest of losses, weights and averages; of what is frozen in the second, it must be zero."""
    (losses, *weights), (wanted, *expected) = actual, expected
    errors = [max(abs(a / b - 1) for a, b in zip(losses, wanted))]
    for values, goal in zip(weights, expected):
        frozen = {name for name, array in goal.items() if not array.any()}
        if any(values[name].any() for name in frozen):
            return float("inf")
        errors.append(distance(*({k: v for k, v in arrays.items() if k not in frozen} for arrays in (values, goal))))
    return max(errors)


# Flax against PyTorch


@pytest.mark.torch
@pytest.mark.parametrize("name", RECIPES)
def test_fifty_steps_agree(flax_runs, name):
    after, _ = flax_runs(name)
    error = difference(torch_run(name, RECIPES[name], LONG), after[LONG])
    print(f"{name}: {LONG} steps within {error:.1e}")
    assert error < CLOSE


@pytest.mark.torch
def test_a_step_in_microbatches_is_the_step_on_the_whole_batch(flax_runs):
    after, _ = flax_runs("sgd")
    error = difference(torch_run("sgd", replace(RECIPES["sgd"], accumulation=1), SHORT), after[SHORT])
    print(f"PyTorch without microbatches: within {error:.1e}")
    assert error < CLOSE


FAULTS = {
    "no average": ("sgd", {"ema_decay": None}),
    "no layer-wise rates": ("sgd", {"layer_decay": 1.0}),
    "no label smoothing": ("sgd", {"label_smoothing": 0.0}),
    "sum of microbatches": ("sgd", {}),
    "sgd": ("adamw", {"optimizer": "sgd", "weight_decay": 0.0}),
    "no weight decay": ("adamw", {"weight_decay": 0.0}),
    "another b2": ("adamw", {"b2": 0.999}),
    "softmax": ("adamw", {"loss": "softmax"}),
    "another block": ("sgd", {"train": "stem,blocks/2/*,head"}),
    "clip over frozen weights too": ("sgd", {}),
}


@pytest.mark.torch
@pytest.mark.parametrize("fault", FAULTS)
def test_an_option_that_one_framework_ignores_shows(monkeypatch, flax_runs, fault):
    name, changes = FAULTS[fault]
    if fault == "clip over frozen weights too":
        import torch

        from mixer_jax.training.torch_optimizer import Sgd

        def over_all(self, model, recipe, init=Sgd.__init__):
            init(self, model, recipe)
            norm = torch.nn.utils.get_total_norm
            every = list(model.parameters())
            monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: norm([weight.grad for weight in every]))

        monkeypatch.setattr(Sgd, "__init__", over_all)
    after, _ = flax_runs(name)
    error = difference(torch_run(name, replace(RECIPES[name], **changes), SHORT, fault), after[SHORT])
    print(f"{fault}: {error:.1e}")
    assert error > 100 * CLOSE


# Freezing


def test_frozen_weights_and_their_momentum_stay_bit_for_bit(flax_runs):
    import optax

    after, state = flax_runs("sgd")
    still = {name for name, array in after[LONG][1].items() if not array.any()}
    assert still == {name for name in WEIGHTS if not name.startswith(("stem", "MixerBlock_1", "head"))}
    assert {name for name, array in after[LONG][2].items() if not array.any()} == still
    momentum = optax.tree.get(state.opt_state, "trace")
    masks = trainable(state.params, RECIPES["sgd"].train)
    assert momentum.keys() == state.ema.keys() == {name for name, mask in masks.items() if mask.any()}
    for name, array in momentum.items():
        zeros = np.asarray(array)[~np.broadcast_to(masks[name], array.shape)]
        assert not zeros.view("uint64").any(), name
        assert np.asarray(array).any(), name


def test_the_bits_of_negative_zeros_and_weight_decay_do_not_reach_frozen_weights():
    import jax.numpy as jnp
    import optax

    recipe = Recipe(optimizer="adamw", weight_decay=0.1, warmup_steps=0, train="blocks/1/*")
    weights = {"blocks/token_mixing/dense_0/kernel": jnp.array([[[-0.0, 1.0]], [[2.0, 3.0]]])}
    gradients = {name: jnp.full_like(array, 1e30) for name, array in weights.items()}  # the norm overflows with them
    gradients = {name: array.at[1].set(0.5) for name, array in gradients.items()}
    tx = optax_recipe.transformation(recipe)
    updates, state = tx.update(gradients, tx.init(weights), weights)
    (before,), (after,) = weights.values(), optax.apply_updates(weights, updates).values()
    assert np.array_equal(before[0].view("uint32"), after[0].view("uint32"))
    assert (before[1] != after[1]).all()
    assert not optax.tree.get(state, "mu")["blocks/token_mixing/dense_0/kernel"][0].any()


def test_masks_follow_the_patterns():
    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    rows = {"head": 0, "head,blocks/1/*": 1, "head, blocks/[02]": 2, "blocks/*": 3, "blocks/token_mixing": 3, "*/kernel": 3}
    for patterns, blocks in rows.items():
        masks = trainable(model, patterns)
        assert masks["blocks/token_mixing/dense_0/kernel"].shape == (3, 1, 1)
        assert masks["blocks/token_mixing/dense_0/kernel"].sum() == blocks, patterns
        assert bool(masks["head/kernel"].all()) == ("head" in patterns or patterns == "*/kernel")
        assert bool(masks["stem/kernel"].all()) == (patterns == "*/kernel")
        assert not masks["stem/bias"].any()
    assert trainable(model, ["head", "blocks/1"]).keys() == trainable(model, "*").keys()
    assert {name for name, mask in trainable(model.unstacked(), "head,blocks/1/*").items() if mask.all()} == {
        "head/kernel",
        "head/bias",
        *(f"blocks/1/{name.removeprefix('blocks/')}" for name in trainable(model, "*") if name.startswith("blocks/")),
    }


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names():
    from mixer_jax.training.step import initial_state, make_train_step

    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    message = "no weight is called 'haed': the nearest names are head, head/bias, head/kernel"
    of_recipe = [lambda model, train, each=each: each(model, Recipe(train=train)) for each in (initial_state, make_train_step)]
    for refuse in (trainable, *of_recipe):
        with pytest.raises(ValueError, match=f"^{message}$"):
            refuse(model, "stem,haed")
    with pytest.raises(ValueError, match="^no weight is called 'blocks/3/.*': .* blocks/2.*; no weight is called 'kernel': "):
        trainable(model, "blocks/3/*,kernel")
    with pytest.raises(ValueError, match="^no pattern of weights to train$"):
        trainable(model, [])


@pytest.mark.torch
def test_the_pytorch_optimizers_refuse_what_is_not_theirs():
    from mixer_jax.training.torch_optimizer import AdamW, Sgd

    model = torch_model(WEIGHTS, TINY)
    with pytest.raises(ValueError, match="^no weight is called 'haed': the nearest names are head, "):
        Sgd(model, Recipe(train="haed"))
    with pytest.raises(ValueError, match="^Sgd is for optimizer='sgd', not 'adamw'$"):
        Sgd(model, Recipe(optimizer="adamw"))
    with pytest.raises(ValueError, match="^AdamW is for optimizer='adamw', not 'sgd'$"):
        AdamW(model, Recipe())


def matmuls(jaxpr):
    """How many matmuls are in a program; those of a loop count once."""
    values = [value for eqn in jaxpr.eqns for value in eqn.params.values()]
    values = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    inner = [getattr(value, "jaxpr", value) for value in values]
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(matmuls(value) for value in inner if hasattr(value, "eqns"))


def test_what_is_frozen_as_a_whole_gets_no_gradient():
    import jax

    from mixer_jax.training.step import initial_state, make_train_step

    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    images, labels = batch(0)[0].astype("float32"), batch(0)[1]

    def of_step(model, train):
        recipe = Recipe(train=train)
        arguments = jax.eval_shape(lambda: initial_state(model, recipe)), images, labels, jax.random.key(0)
        return matmuls(jax.make_jaxpr(make_train_step(model, recipe))(*arguments).jaxpr)

    forward = matmuls(jax.make_jaxpr(model)(images).jaxpr)
    assert of_step(model, "head") == forward + 1  # the gradient of the head's kernel
    separate = model.unstacked()
    forward = matmuls(jax.make_jaxpr(separate)(images).jaxpr)
    counts = [of_step(separate, train) - forward for train in ("head", "head,blocks/2", "head,blocks/1,blocks/2", "*")]
    print(f"matmuls more than in a forward pass: {counts}")
    assert counts[0] == 1
    assert counts[1] - counts[0] == counts[2] - counts[1] + 1  # with a block comes the gradient of the head's input


# The step


@pytest.fixture(scope="module")
def compiled(unoptimised):
    """A float32 model with dropout, and its step in two microbatches."""
    import jax

    from mixer_jax.training.step import make_train_step

    recipe = Recipe(warmup_steps=0, accumulation=2, ema_decay=0.5, momentum_dtype="bfloat16")
    model = flax_model(WEIGHTS, TINY, param_dtype="float32", rngs=_rngs(), **RATES)
    return model, recipe, jax.jit(make_train_step(model, recipe), donate_argnums=0)


def steps(compiled, count, state=None, seed=0):
    import jax

    from mixer_jax.training.step import initial_state

    model, recipe, step = compiled
    state = initial_state(model, recipe) if state is None else state
    for i in range(int(state.step), count):
        images, labels = batch(i)
        state, metrics = step(state, images.astype("float32"), labels, jax.random.key(seed))
    return jax.tree.map(np.array, state), {name: float(value) for name, value in metrics.items()}


def bits(state):
    import jax

    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def test_the_same_state_batch_and_key_give_the_same_bits(compiled):
    """Also where a run goes on from arrays that were saved; a run donates its state and leaves the model's weights alone."""
    import jax

    whole, metrics = steps(compiled, 4)
    resumed, again = steps(compiled, 4, jax.tree.map(jax.numpy.asarray, steps(compiled, 2)[0]))
    assert bits(whole) == bits(resumed)
    assert metrics == again
    assert bits(whole) != bits(steps(compiled, 4, seed=1)[0])
    assert all(np.array_equal(array, WEIGHTS[name]) for name, array in canonical(_arrays(compiled[0])).items())


def test_each_step_and_each_microbatch_has_its_own_random_bits(compiled):
    import jax

    from mixer_jax.training.step import initial_state, loss_of, with_weights

    model, recipe, step = compiled
    images, labels, losses = batch(0)[0].astype("float32"), batch(0)[1], {}
    training = with_weights(model, initial_state(model, recipe).params)
    training.train()
    forward = jax.jit(lambda images, key: training(images, rngs=key))
    for at in (0, 1):
        state = replace(initial_state(model, recipe), step=jax.numpy.int32(at))
        losses[at] = float(step(state, images, labels, jax.random.key(0))[1]["loss"])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), at), 2)
        parts = [loss_of(recipe, forward(images[k::2], keys[k]), labels[k::2]) for k in (0, 1)]
        assert losses[at] == pytest.approx(float(sum(parts)) / 2, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_weights_of_a_state_are_a_model_again(compiled):
    from mixer_jax.training.step import with_weights

    model, _, _ = compiled
    state, _ = steps(compiled, 2)
    model.labels = tuple("abcde")
    for weights in (state.params, state.averaged):
        other = with_weights(model, weights)
        assert canonical(_arrays(other)).keys() == WEIGHTS.keys()
        assert all(np.array_equal(array, weights[name]) for name, array in _arrays(other).items())
        assert (other.labels, other.deterministic, other.blocks.token_mixing.dropout.deterministic) == (
            model.labels,
            True,
            True,
        )
    assert any((state.averaged[name] != array).any() for name, array in state.params.items())


def _arrays(model):
    from mixer_jax.training.freezing import named_weights

    return {name: np.asarray(array) for name, array in named_weights(model).items()}


def test_the_dtypes_of_a_state_do_not_change():
    """In bfloat16 computation, and for bfloat16 weights, whose average is float32."""
    import jax

    from mixer_jax.training.step import initial_state, make_train_step

    images, labels = batch(0)
    for param_dtype in ("float32", "bfloat16"):
        model = flax_model(WEIGHTS, TINY, param_dtype=param_dtype, dtype="bfloat16")
        for recipe in (Recipe(ema_decay=0.9, accumulation=2), Recipe(optimizer="adamw", layer_decay=0.5, ema_decay=0.9)):
            state = jax.eval_shape(lambda: initial_state(model, recipe))  # noqa: B023
            after, metrics = jax.eval_shape(make_train_step(model, recipe), state, images, labels, jax.random.key(0))
            assert after == state
            assert {array.dtype.name for array in state.ema.values()} == {"float32"}
            assert metrics["loss"].dtype == metrics["rate"].dtype == "float32"


def test_flaxs_optimizer_does_what_the_step_does():
    """`optimizer` on a model, and `transformation` on arrays by name."""
    import jax
    import optax
    from flax import nnx

    from mixer_jax.training.freezing import map_named

    options = {"optimizer": "adamw", "weight_decay": 0.1, "layer_decay": 0.7, "train": "head,blocks/1/*,*/bias"}
    recipe = Recipe(warmup_steps=0, **options)
    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    weights, random = _arrays(model), np.random.default_rng(0)
    gradients = {name: random.normal(size=array.shape).astype("float32") for name, array in weights.items()}
    tx = optax_recipe.transformation(recipe, TINY.num_blocks)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(weights), weights)
    tree = map_named(lambda name, _: jax.numpy.asarray(gradients[name]), nnx.state(model, nnx.Param))
    nnx.jit(lambda model, optimizer, tree: optimizer.update(model, tree))(model, optax_recipe.optimizer(model, recipe), tree)
    for name, array in optax.apply_updates(weights, updates).items():
        np.testing.assert_allclose(_arrays(model)[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match=r"^layer_decay needs num_blocks, as in transformation\(recipe, model"):
        optax_recipe.transformation(recipe)


# What is refused


def test_labels_and_batches_that_do_not_fit_are_refused():
    import jax

    from mixer_jax.training.step import initial_state, loss_of, make_train_step

    model = flax_model(WEIGHTS, TINY, param_dtype="float32")
    images, labels = batch(0)
    recipe = Recipe(accumulation=4)
    state = jax.eval_shape(lambda: initial_state(model, recipe))

    def refused(recipe, labels, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(make_train_step(model, recipe), state, images, labels, jax.random.key(0))

    refused(recipe, labels, "^a batch of 6 images cannot be split into 4 microbatches of one size")
    for wrong, found in ((labels[:1], r"int\d+ of shape \(1,\)"), (np.ones((6, 4), "float32"), r"float32 of shape \(6, 4\)")):
        refused(Recipe(), wrong, rf"^labels must be 6 integers or probabilities of shape \(6, 5\), not {found}")
    for label in (-1, 5):
        assert np.isnan(loss_of(Recipe(), np.zeros((1, 5), "float32"), np.array([label])))
    features = GOLDENS["features"]
    with pytest.raises(ValueError, match=r"^a model without a head cannot be trained on labels: load it with num_classes=N$"):
        make_train_step(flax_model(features.weights, features.config, param_dtype="float32"), Recipe())


def test_a_recipe_travels_as_json():
    import json

    for recipe in RECIPES.values():
        assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe
