"""The official fine-tuning recipe (paper, section 3; google-research/vision_transformer, `vit_jax/train.py`) in optax.

`step` makes a training step of it, and `torch_optimizer` is the same for PyTorch.
"""

__all__ = ["Recipe", "optimizer", "schedule", "transformation"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.dtypes import WEIGHTS

from .freezing import in_each_block, map_named, masked, rate_factor

if TYPE_CHECKING:
    import jax
    import optax
    from flax import nnx

    from ..model import MlpMixer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """By default the official one: SGD with momentum and no weight decay, on gradients clipped to a global norm.

    The learning rate rises linearly from 0 to `base_rate` in `warmup_steps`, and then falls to 0 at `total_steps` as half a
    cosine; with `total_steps=None` it stays at `base_rate`. Momentum is stored in `momentum_dtype`: None is the dtype of the
    weights; the official code uses "bfloat16".

    `optimizer` is "sgd" or "adamw", whose b1 is `momentum`; it decays kernels alone, by the learning rate x `weight_decay` a
    step. `layer_decay` lowers the learning rate from the head down to the stem, by this factor a block. `train` says which
    weights are trained (see `freezing.trainable`); the others stay as they are, bit for bit, and do not count in the norm.

    `loss` is "softmax", or "sigmoid" as in pre-training: the sum over the classes. `label_smoothing` mixes that much of the
    uniform distribution into the labels. A step splits its batch into `accumulation` microbatches and takes the mean of
    their gradients. `ema_decay` is that of a moving average of the weights, which starts as the weights.
    """

    base_rate: float = 0.03
    warmup_steps: int = 500
    total_steps: int | None = 10_000
    momentum: float = 0.9
    clip_norm: float = 1.0
    momentum_dtype: str | None = None
    optimizer: str = "sgd"
    b2: float = 0.999
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    train: str = "*"
    loss: str = "softmax"
    label_smoothing: float = 0.0
    accumulation: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        total = self.total_steps
        rules = {
            "base_rate must be positive": 0 < self.base_rate < math.inf,
            "warmup_steps must be a whole number of at least 0": _is_count(self.warmup_steps),
            "total_steps must be None or more than warmup_steps": total is None
            or (_is_count(total) and total > self.warmup_steps),
            "momentum must be at least 0 and below 1": 0 <= self.momentum < 1,
            "clip_norm must be positive": self.clip_norm > 0,
            f"momentum_dtype must be None or one of {', '.join(WEIGHTS)}": self.momentum_dtype in (None, *WEIGHTS),
            "optimizer must be sgd or adamw": self.optimizer in ("sgd", "adamw"),
            "b2 must be at least 0 and below 1": 0 <= self.b2 < 1,
            "weight_decay must be at least 0, and 0 for sgd": 0 <= self.weight_decay < math.inf
            and not (self.weight_decay and self.optimizer == "sgd"),
            "layer_decay must be above 0 and at most 1": 0 < self.layer_decay <= 1,
            "train must be patterns of names, with commas": isinstance(self.train, str) and all(self.train.split(",")),
            "loss must be softmax or sigmoid": self.loss in ("softmax", "sigmoid"),
            "label_smoothing must be at least 0 and below 1": 0 <= self.label_smoothing < 1,
            "accumulation must be a whole number of at least 1": _is_count(self.accumulation) and self.accumulation > 0,
            "ema_decay must be None, or at least 0 and below 1": self.ema_decay is None or 0 <= self.ema_decay < 1,
        }
        faults = [f"{rule}, not {getattr(self, rule.split()[0])!r}" for rule, holds in rules.items() if not holds]
        if faults:
            raise ValueError("Recipe: " + "; ".join(faults))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(step / self.warmup_steps, 1) if self.warmup_steps else 1
        if self.total_steps is None:
            return self.base_rate * rising
        progress = min(max((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0), 1)
        return self.base_rate * rising * (1 + math.cos(math.pi * progress)) / 2


def schedule(recipe: Recipe) -> "optax.Schedule":
    """`recipe.rate` for optax. Under x64 it is computed in float64; optax's own schedules always use float32."""
    import jax.numpy as jnp

    def rate(count: "jax.typing.ArrayLike") -> "jax.Array":
        step = jnp.asarray(count, float)
        rising = jnp.minimum(step / recipe.warmup_steps, 1) if recipe.warmup_steps else jnp.ones_like(step)
        if recipe.total_steps is None:
            return recipe.base_rate * rising
        progress = jnp.clip((step - recipe.warmup_steps) / (recipe.total_steps - recipe.warmup_steps), 0, 1)
        # In the order of the official code, so that in float32 each rate is the official one to the last bit.
        return recipe.base_rate * 0.5 * (1 + jnp.cos(math.pi * progress)) * rising

    return rate


def transformation(recipe: Recipe, num_blocks: int | None = None) -> "optax.GradientTransformation":
    """The recipe in optax, for a tree of weights that has the Flax model's names; `layer_decay` needs `num_blocks`.

    What concerns the loss, the microbatches and the moving average is not in it: see `step`.
    """
    import optax

    rate, dtype = schedule(recipe), recipe.momentum_dtype
    parts = [optax.clip_by_global_norm(recipe.clip_norm)]
    if recipe.optimizer == "sgd":
        parts += [optax.sgd(rate, momentum=recipe.momentum, accumulator_dtype=dtype)]
    else:
        options = {"b1": recipe.momentum, "b2": recipe.b2, "mu_dtype": dtype, "weight_decay": recipe.weight_decay}
        parts += [optax.adamw(rate, mask=lambda tree: map_named(lambda name, _: is_kernel(name), tree), **options)]
    if recipe.layer_decay != 1:
        if num_blocks is None:
            raise ValueError("layer_decay needs num_blocks, as in transformation(recipe, model.config.num_blocks)")
        parts += [optax.stateless(lambda updates, _: _layer_rates(updates, num_blocks, recipe.layer_decay))]
    if recipe.train != "*":
        frozen = [optax.stateless(lambda tree, _, fill=fill: masked(recipe.train, tree, fill)) for fill in (0.0, -0.0)]
        parts = [frozen[0], *parts, frozen[1]]  # -0.0 is the one number that no sum with it changes
    return optax.chain(*parts)


def optimizer(model: "MlpMixer", recipe: Recipe) -> "nnx.Optimizer":
    """`transformation` for a Flax model's weights: call `update(model, gradients)`."""
    from flax import nnx

    return nnx.Optimizer(model, transformation(recipe, model.config.num_blocks), wrt=nnx.Param)


def is_kernel(name: str) -> bool:
    """Whether weight decay acts on the weight: neither on biases nor on scales of norms."""
    return name.endswith("/kernel")


def _layer_rates(updates: Any, num_blocks: int, decay: float) -> Any:
    def lowered(name: str, update: "jax.Array") -> "jax.Array":
        factors = in_each_block(lambda full: rate_factor(full, num_blocks, decay), name, update)
        return update * factors.astype(update.dtype)

    return map_named(lowered, updates)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
