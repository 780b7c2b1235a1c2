"""A training step as a pure function, for `jax.jit` and for resuming: the same state, batch and key give the same bits."""

__all__ = ["TrainState", "initial_state", "make_train_step", "with_weights"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike

from ..model import MlpMixer
from .freezing import map_named, masked, named_weights, trainable
from .recipe import Recipe, schedule, transformation

Array = jax.Array
Weights = dict[str, Array]
TrainStep = Callable[..., tuple["TrainState", dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a training step changes: a tree of arrays.

    `step` counts the steps taken. `params` are all weights by name; `opt_state` and `ema`, the moving average, hold only
    arrays of which something is trained, and `ema` is empty without `ema_decay`.
    """

    step: Array
    params: Weights
    opt_state: Any
    ema: Weights

    @property
    def averaged(self) -> Weights:
        """All weights by name, the moving average where there is one."""
        return self.params | self.ema


def initial_state(model: MlpMixer, recipe: Recipe) -> TrainState:
    """The state before the first step. It shares no memory with the model, so that a compiled step may donate it.

    Raises ValueError where `recipe.train` has a pattern that matches no weight.
    """
    params = {name: jnp.copy(weight) for name, weight in named_weights(model).items()}
    trained = {name: params[name] for name in _trained(model, recipe)}
    ema = {name: jnp.array(weight, _wide(weight.dtype), copy=True) for name, weight in trained.items()}
    opt_state = transformation(recipe, model.config.num_blocks).init(trained)
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, {} if recipe.ema_decay is None else ema)
    return state if model.placement is None else jax.device_put(state, model.placement.tree(state))


def make_train_step(model: MlpMixer, recipe: Recipe, *, from_features: bool = False) -> TrainStep:
    """`train_step(state, images, labels, key, masks=None) -> (state, metrics)`; compile it by `jax.jit(..., donate_argnums=0)`.

    Images are (b, h, w, channels), labels (b,) integers or (b, classes) probabilities. Dropout and stochastic depth take
    their random bits from `key` with `state.step` folded in, or from `masks`, {name: booleans of the whole batch}. Microbatch
    k of n takes the images k, k + n, k + 2n, ... of the batch. Metrics are "loss", "gradient_norm" (of what is trained, before
    the clip) and "rate". A label that is no class of the model's makes the loss NaN.

    With `from_features` the images are the head's inputs instead, (b, hidden), as `model.features` gives them; then the head
    alone can be trained.

    The model's weights are not used, its rates, dtypes and `remat` are. Arrays of which nothing is trained get no gradient;
    with `model.unstacked()`, whose blocks have arrays of their own, neither does a frozen block.

    Raises ValueError for a model without a head, for a pattern of `recipe.train` that matches nothing or, with
    `from_features`, more than the head; and, when it is called, for labels of another shape and for a batch that
    `accumulation` does not divide.
    """
    if model.head is None:
        raise ValueError("a model without a head cannot be trained on labels: load it with num_classes=N")
    in_training = nnx.clone(model)
    in_training.train()
    names, tx, rate = _trained(model, recipe), transformation(recipe, model.config.num_blocks), schedule(recipe)
    if from_features and (body := [name for name in names if not name.startswith("head/")]):
        raise ValueError(f"from features the head alone can be trained, not {body[0]}: train='head'")

    def loss(trained: Weights, frozen: Weights, batch: tuple[Array, Array, Weights], key: Array) -> Array:
        images, labels, masks = batch
        by_name = (lambda name, shape, keep_rate: masks[name]) if masks else None
        merged = _merged(in_training, frozen | trained)
        logits = merged.logits(images) if from_features else merged(images, rngs=key, masks=by_name)
        return loss_of(recipe, logits, labels)

    def train_step(
        state: TrainState, images: ArrayLike, labels: ArrayLike, key: Array, masks: dict[str, ArrayLike] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        batch = jax.tree.map(jnp.asarray, (images, labels, masks or {}))
        trained = {name: state.params[name] for name in names}
        frozen = {name: weight for name, weight in state.params.items() if name not in trained}
        key = jax.random.fold_in(key, state.step)
        value, gradients = _mean(jax.value_and_grad(loss), trained, frozen, batch, key, recipe.accumulation)
        gradients = masked(recipe.train, gradients, 0.0)
        updates, opt_state = tx.update(gradients, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        # In this form the average of a weight that does not move is that weight, bit for bit.
        ema = {name: old + (1 - (recipe.ema_decay or 0)) * (trained[name] - old) for name, old in state.ema.items()}
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), "rate": rate(state.step)}
        return TrainState(state.step + 1, state.params | trained, opt_state, ema), metrics

    return train_step


def with_weights(model: MlpMixer, weights: Weights) -> MlpMixer:
    """A copy of the model, in eval mode, with a state's `params` or `averaged`, in the dtypes of the model's weights."""
    other = _merged(model, {name: jnp.asarray(weights[name], old.dtype) for name, old in named_weights(model).items()})
    other.eval()
    other.labels, other.preprocessing, other.placement = model.labels, model.preprocessing, model.placement
    return other


def loss_of(recipe: Recipe, logits: Array, labels: Array) -> Array:
    """The mean over the batch of the recipe's loss, of logits (b, classes)."""
    classes = logits.shape[-1]
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:1]:
        known = ((labels >= 0) & (labels < classes))[:, None]
        labels = jnp.where(known, jax.nn.one_hot(labels, classes, dtype=logits.dtype), jnp.nan)
    elif labels.shape != logits.shape or not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(
            f"labels must be {logits.shape[0]} integers or probabilities of shape {logits.shape}, "
            f"not {labels.dtype} of shape {labels.shape}"
        )
    labels = optax.smooth_labels(labels.astype(logits.dtype), recipe.label_smoothing)
    loss = {"softmax": optax.softmax_cross_entropy, "sigmoid": optax.sigmoid_binary_cross_entropy}[recipe.loss]
    return loss(logits, labels).sum() / logits.shape[0]


def _mean(gradient: Callable, trained: Weights, frozen: Weights, batch: Any, key: Array, parts: int) -> tuple[Array, Weights]:
    """The mean over microbatches of a loss and its gradients, one microbatch in memory at a time."""
    if parts == 1:
        return gradient(trained, frozen, batch, key)
    if batch[0].shape[0] % parts:
        raise ValueError(f"a batch of {batch[0].shape[0]} images cannot be split into {parts} microbatches of one size")
    # Every so many images, not neighbours: where devices share a batch, each then has its part of every microbatch.
    split = jax.tree.map(lambda array: rearrange(array, "(b parts) ... -> parts b ...", parts=parts), batch)

    def add(total: Any, inputs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trained, frozen, *inputs)), None

    shapes = jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda array: array[0], split), key)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, _wide(array.dtype), out_sharding=array.sharding), shapes)
    total, _ = jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))
    return jax.tree.map(lambda array, like: (array / parts).astype(like.dtype), total, shapes)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)  # where many small terms are summed


def _trained(model: MlpMixer, recipe: Recipe) -> list[str]:
    return [name for name, mask in trainable(model, recipe.train).items() if mask.any()]


def _merged(model: MlpMixer, weights: Weights) -> MlpMixer:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, map_named(lambda name, _: weights[name], params), rest)
