"""Training runs of either framework behind the same methods, with the same batches and masks."""

import functools

import numpy as np
from conftest import TINY, random_images, random_weights
from implementations import flax_model, torch_model

from convert import Checkpoint
from mixer_jax import pretrained
from mixer_jax.training import recipe as optax_recipe
from mixer_jax.training.recipe import Recipe

STEPS, BATCH = 10, 6
RECIPE = Recipe(warmup_steps=3, total_steps=STEPS)  # ten steps go through both parts of the schedule
CONSTANT = Recipe(warmup_steps=0, total_steps=None)  # what the golden data were made with
RATES = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.6}
WEIGHTS = random_weights(TINY)


def batch(step):
    labels = np.random.default_rng(step).integers(TINY.num_classes, size=BATCH)
    return random_images(TINY, count=BATCH, seed=100 + step, dtype="float64"), labels


def masks_of(step):
    """The masks of a step, the same booleans for the same name in both frameworks."""
    return lambda name, shape, keep_rate: np.random.default_rng([step, *name.encode()]).random(shape) < keep_rate


@functools.cache
def loss_and_gradients():
    """Compiled once for all runs; masks by name."""
    import optax
    from flax import nnx

    def loss(model, images, labels, masks):
        logits = model(images, masks=lambda name, shape, keep_rate: masks[name])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return nnx.jit(nnx.value_and_grad(loss))


class FlaxRun:
    """A training run in either framework behind the same methods. `step` returns the loss."""

    def __init__(self, weights=WEIGHTS, recipe=RECIPE, *, config=TINY, dtype="float64", **options):
        import jax
        from flax import nnx

        self.dtype, self.requested = dtype, []  # the masks that the model requests: name, shape, keep rate
        with jax.enable_x64(dtype == "float64"):
            self.model = flax_model(weights, config, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
            self.model.train()
            self.optimizer = optax_recipe.optimizer(self.model, recipe)
            ones = self.requesting(lambda name, shape, keep_rate: np.ones(shape, bool))
            images = jax.ShapeDtypeStruct((BATCH, *config.image_size, config.in_channels), dtype)
            nnx.eval_shape(lambda images: self.model(images, masks=ones), images)
        self.update = nnx.jit(lambda model, optimizer, gradients: optimizer.update(model, gradients))

    def requesting(self, masks):
        return lambda *request: self.requested.append(request) or masks(*request)

    def step(self, images, labels, masks):
        import jax

        with jax.enable_x64(self.dtype == "float64"):
            images = jax.numpy.asarray(images, self.dtype)
            given = {name: masks(name, shape, keep_rate) for name, shape, keep_rate in self.requested}
            loss, self.gradient_state = loss_and_gradients()(self.model, images, labels, given)
            self.update(self.model, self.optimizer, self.gradient_state)
            return float(loss)

    def gradients(self):
        return canonical(by_name(self.gradient_state))

    def weights(self):
        return canonical(pretrained.to_checkpoint(self.model).arrays)

    def momentum(self):
        import optax

        return canonical(by_name(optax.tree.get(self.optimizer.opt_state, "trace")))


class TorchRun(FlaxRun):
    def __init__(self, weights=WEIGHTS, recipe=RECIPE, *, config=TINY, dtype="float64", **options):
        from mixer_jax.training.torch_optimizer import Sgd

        self.dtype, self.requested = dtype, []
        self.model = torch_model(weights, config, param_dtype=dtype, **options).train()
        self.optimizer = Sgd(self.model, recipe)

    def loss(self, images, labels, masks=None):
        import torch

        images = torch.from_numpy(images).to(getattr(torch, self.dtype)).permute(0, 3, 1, 2)
        self.optimizer.zero_grad()
        self.requested.clear()
        logits = self.model(images, masks=None if masks is None else self.requesting(masks))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        return loss

    def step(self, images, labels, masks):
        loss = self.loss(images, labels, masks)
        self.optimizer.step()
        return loss.item()

    def gradients(self):
        return canonical({name: weight.grad.numpy() for name, weight in self.model.named_parameters()})

    def weights(self):
        from mixer_jax.torch_pretrained import to_checkpoint

        return canonical(to_checkpoint(self.model).arrays)

    def momentum(self):
        state = self.optimizer.state
        return canonical({name: state[weight]["momentum_buffer"].numpy() for name, weight in self.model.named_parameters()})


RUNS = {"flax": FlaxRun, "torch": TorchRun}


def by_name(state):
    from flax import nnx

    return {"/".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def canonical(arrays):
    """Arrays of any layout in Google's names and axes, as copies."""
    return {name: np.array(array) for name, array in Checkpoint.from_arrays(arrays).to("google").arrays.items()}


def distance(actual, expected, *, zero=()):
    """Largest difference of any tensor relative to its max abs; for names that end as in `zero`, to that of all tensors."""
    assert actual.keys() == expected.keys()
    largest = max(np.abs(array).max() for array in expected.values())

    def of(name):
        scale = largest if name.endswith(zero or "no such name") else np.abs(expected[name]).max()
        return float(np.abs(actual[name] - expected[name]).max() / scale)

    return max(of(name) for name in expected)


def movement(run, start=WEIGHTS):
    """How far each weight has moved, so that no difference hides behind the size of the weights."""
    return {name: array - start[name].astype(np.float64) for name, array in run.weights().items()}


def train(run, masks=masks_of):
    for step in range(STEPS):
        run.step(*batch(step), masks(step))
    return run
