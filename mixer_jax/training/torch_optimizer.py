"""The optimizer of `recipe` in PyTorch. The loss, the microbatches and the moving average are the training loop's."""

__all__ = ["AdamW", "Sgd", "flax_names"]

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("fine-tuning the PyTorch model needs PyTorch: pip install 'mixer-jax[torch]'") from None

from convert.layouts import LAYOUTS
from convert.mapping import plan

from ..torch_model import MlpMixer
from .freezing import rate_factor, trainable
from .recipe import Recipe, is_kernel


class Sgd(torch.optim.Optimizer):
    """For a PyTorch model what `recipe.optimizer` is for a Flax model.

    Its state is that of torch.optim.SGD, a `momentum_buffer` for each weight, and `steps` in the parameter group. Weights
    that `recipe.train` does not name are left alone; `requires_grad_(False)` saves their gradients as well.
    """

    kind = "sgd"

    def __init__(self, model: MlpMixer, recipe: Recipe):
        if recipe.optimizer != self.kind:
            raise ValueError(f"{type(self).__name__} is for optimizer={self.kind!r}, not {recipe.optimizer!r}")
        names = flax_names(model)
        masks = trainable({names[name]: weight for name, weight in model.named_parameters()}, recipe.train)
        named = [(name, weight) for name, weight in model.named_parameters() if masks[names[name]].all()]
        super().__init__(named, {"steps": 0, "lr": recipe.rate(0)})
        self.recipe = recipe
        self.factors = {w: rate_factor(names[n], model.config.num_blocks, recipe.layer_decay) for n, w in named}
        self.decays = {w: recipe.weight_decay if is_kernel(names[n]) else 0.0 for n, w in named}

    @torch.no_grad()
    def step(self, closure=None):
        """Update the weights that have a gradient. Raises ValueError, before anything changes, if none has one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        if not parameters:
            raise ValueError("no weight has a gradient: call backward() before step()")
        group["lr"] = self.recipe.rate(group["steps"])
        # Not clip_grad_norm_, which divides by the norm + 1e-6.
        divisor = (torch.nn.utils.get_total_norm(gradients) / self.recipe.clip_norm).clamp(min=1)
        group["steps"] += 1
        for parameter, gradient in zip(parameters, gradients):
            direction = self._direction(parameter, gradient / divisor, group["steps"])
            if self.decays[parameter]:
                direction = direction + self.decays[parameter] * parameter
            parameter -= group["lr"] * self.factors[parameter] * direction
        return loss

    def _direction(self, parameter: torch.Tensor, gradient: torch.Tensor, steps: int) -> torch.Tensor:
        return self._momentum(parameter, "momentum_buffer", gradient)

    def _momentum(self, parameter: torch.Tensor, key: str, increment: torch.Tensor) -> torch.Tensor:
        """The old momentum times its factor, plus an increment."""
        state = self.state[parameter]
        dtype = parameter.dtype if self.recipe.momentum_dtype is None else getattr(torch, self.recipe.momentum_dtype)
        if key in state:
            # As in JAX, the factor is rounded to the dtype of the momentum: 0.9 is 0.8984 in bfloat16.
            factor = torch.tensor(self.recipe.momentum, dtype=dtype).item()
            increment = increment + factor * state[key].to(increment.dtype)
        state[key] = increment.to(dtype)
        return increment


class AdamW(Sgd):
    """The same for a recipe with "adamw". Its state is that of torch.optim.AdamW: `exp_avg` and `exp_avg_sq`."""

    kind = "adamw"

    def _direction(self, parameter: torch.Tensor, gradient: torch.Tensor, steps: int) -> torch.Tensor:
        b1, b2, state = self.recipe.momentum, self.recipe.b2, self.state[parameter]
        mean = self._momentum(parameter, "exp_avg", (1 - b1) * gradient)
        square = (1 - b2) * gradient**2 + b2 * state.get("exp_avg_sq", 0)
        state["exp_avg_sq"] = square
        return mean / (1 - b1**steps) / (torch.sqrt(square / (1 - b2**steps)) + 1e-8)


def flax_names(model: MlpMixer) -> dict[str, str]:
    """{name of a weight in the PyTorch model: its name in the Flax model, with the index of its block}."""
    names = {}
    weights: dict = dict(model.named_parameters())
    for name, flax_name, _ in plan(weights, LAYOUTS["timm"], LAYOUTS["flax"]):
        index = name.split(".")[1]
        names[name] = flax_name.replace("blocks/", f"blocks/{index}/") if name.startswith("blocks.") else flax_name
    return names
