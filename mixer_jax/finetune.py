"""The official fine-tuning (paper, section 3; google-research/vision_transformer, `vit_jax/train.py`), and moving a run.

The recipe, its optax half, and the state of a run that either framework goes on from; the PyTorch half is in
`torch_finetune`. Half way from Flax to PyTorch:

    twin = torch_model.load(pretrained.to_checkpoint(model), dropout_rate=0.1)
    other = torch_finetune.Sgd(twin.train(), recipe)
    torch_finetune.resume(other, finetune.state_of(optimizer))
"""

__all__ = ["Recipe", "optimizer", "resume", "schedule", "state_of", "transformation"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert import Checkpoint
from convert.dtypes import WEIGHTS

from .pretrained import require_same

if TYPE_CHECKING:
    import jax
    import optax
    from flax import nnx

    from .model import MlpMixer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with momentum and no weight decay, on gradients clipped to a global norm.

    The learning rate rises linearly from 0 in the first step to `base_rate` after `warmup_steps`, and falls as half a
    cosine to 0 after `total_steps` (None: it stays). `momentum_dtype` is what momentum is stored in: None for the weights'
    own dtype, "bfloat16" for what the official code does.
    """

    base_rate: float = 0.03
    warmup_steps: int = 500
    total_steps: int | None = 10_000
    momentum: float = 0.9
    clip_norm: float = 1.0
    momentum_dtype: str | None = None

    def __post_init__(self) -> None:
        least = self.warmup_steps + 1
        faults = {
            "base_rate must be positive": not 0 < self.base_rate < math.inf,
            "warmup_steps must be a whole number of at least 0": not _is_count(self.warmup_steps),
            "total_steps must be None or more than warmup_steps": self.total_steps is not None
            and not (_is_count(self.total_steps) and self.total_steps >= least),
            "momentum must be at least 0 and below 1": not 0 <= self.momentum < 1,
            "clip_norm must be positive": not self.clip_norm > 0,
            f"momentum_dtype must be None or one of {', '.join(WEIGHTS)}": self.momentum_dtype not in (None, *WEIGHTS),
        }
        wrong = [f"{fault}, not {getattr(self, fault.split()[0])!r}" for fault, found in faults.items() if found]
        if wrong:
            raise ValueError("Recipe: " + "; ".join(wrong))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(step / self.warmup_steps, 1) if self.warmup_steps else 1
        if self.total_steps is None:
            return self.base_rate * rising
        progress = min(max((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0), 1)
        return self.base_rate * rising * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class State:
    """Where a run stands, in no framework: the steps taken, and the momentum under the names of the weights, in any layout.

    As a Checkpoint the momentum has its names and shapes checked and is mapped as weights are; `convert.write` stores it.
    """

    steps: int
    momentum: Checkpoint

    def __post_init__(self) -> None:
        if not _is_count(self.steps):
            raise ValueError(f"steps must be a whole number of at least 0, not {self.steps!r}")


def schedule(recipe: Recipe) -> "optax.Schedule":
    """`recipe.rate` for optax, in float64 under x64; optax's own schedules stay in float32 there."""
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


def state_of(optimizer: "nnx.Optimizer") -> State:
    """A copy of where an optax run with momentum stands. Raises ValueError for an optimiser without."""
    import numpy as np

    trace = {name: np.array(variable[...]) for name, (_, variable) in _trace(optimizer).items()}
    return State(int(optimizer.step[...]), Checkpoint.of_momentum(trace, "flax"))


def resume(optimizer: "nnx.Optimizer", state: State) -> None:
    """Let an optax run go on from where another stands.

    Raises CheckpointError, naming every array, for momentum of other names, shapes or another dtype than the optimiser's.
    """
    import jax
    import numpy as np
    from flax import nnx

    from .model import require_x64

    momentum, trace = state.momentum.to("flax"), _trace(optimizer)
    wanted = {name: (variable.shape, variable.dtype.name) for name, (_, variable) in trace.items()}
    require_same(momentum.arrays, wanted, momentum.source)
    require_x64(momentum.dtype, "this momentum is float64, which")
    new = [
        (path, variable.replace(jax.device_put(np.array(momentum.arrays[name], order="C"), variable.sharding)))
        for name, (path, variable) in trace.items()
    ]
    counts = [(path, variable) for path, variable in nnx.to_flat_state(nnx.state(optimizer)) if path[-1] in ("step", "count")]
    new += [(path, count.replace(jax.numpy.asarray(state.steps, count.dtype))) for path, count in counts]
    nnx.update(optimizer, nnx.from_flat_state(new))


def _trace(optimizer: "nnx.Optimizer") -> dict[str, tuple[tuple, Any]]:
    """Path and variable of what optax calls the trace, by name of the weight."""
    from flax import nnx

    found = [(path, path.index("trace"), leaf) for path, leaf in nnx.to_flat_state(nnx.state(optimizer)) if "trace" in path]
    if len({path[:start] for path, start, _ in found}) != 1:
        raise ValueError("the optimiser must keep one momentum (optax.trace), as that of mixer_jax.finetune.optimizer does")
    return {"/".join(path[start + 1 :]): (path, leaf) for path, start, leaf in found}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
