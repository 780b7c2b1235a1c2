"""The official fine-tuning recipe (paper, section 3; google-research/vision_transformer, `vit_jax/train.py`) in optax.

`torch_optimizer` is the same for PyTorch.
"""

__all__ = ["Recipe", "optimizer", "schedule", "transformation"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.dtypes import WEIGHTS

if TYPE_CHECKING:
    import jax
    import optax
    from flax import nnx

    from ..model import MlpMixer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with momentum and no weight decay, on gradients clipped to a global norm.

    The learning rate rises linearly from 0 to `base_rate` in `warmup_steps`, and then falls to 0 at `total_steps` as half a
    cosine; with `total_steps=None` it stays at `base_rate`. Momentum is stored in `momentum_dtype`: None is the dtype of the
    weights; the official code uses "bfloat16".
    """

    base_rate: float = 0.03
    warmup_steps: int = 500
    total_steps: int | None = 10_000
    momentum: float = 0.9
    clip_norm: float = 1.0
    momentum_dtype: str | None = None

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
        return recipe.base_rate * rising * (1 + jnp.cos(math.pi * progress)) / 2

    return rate


def transformation(recipe: Recipe) -> "optax.GradientTransformation":
    """The recipe in optax."""
    import optax

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.sgd(schedule(recipe), momentum=recipe.momentum, accumulator_dtype=recipe.momentum_dtype),
    )


def optimizer(model: "MlpMixer", recipe: Recipe) -> "nnx.Optimizer":
    """The recipe for a Flax model's weights: call `update(model, gradients)`."""
    from flax import nnx

    return nnx.Optimizer(model, transformation(recipe), wrt=nnx.Param)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
