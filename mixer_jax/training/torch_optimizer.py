"""The fine-tuning recipe of `recipe` as a PyTorch optimizer."""

__all__ = ["Sgd"]

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("fine-tuning the PyTorch model needs PyTorch: pip install 'mixer-jax[torch]'") from None

from ..torch_model import MlpMixer
from .recipe import Recipe


class Sgd(torch.optim.Optimizer):
    """For a PyTorch model what `recipe.optimizer` is for a Flax model.

    Its state is that of torch.optim.SGD, a `momentum_buffer` for each weight, and `steps` in the parameter group.
    """

    def __init__(self, model: MlpMixer, recipe: Recipe):
        super().__init__(model.named_parameters(), {"steps": 0, "lr": recipe.rate(0)})
        self.recipe = recipe

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
        for parameter, gradient in zip(parameters, gradients):
            state, dtype = self.state[parameter], _momentum_dtype(self.recipe, parameter)
            momentum = gradient / divisor
            if "momentum_buffer" in state:
                # As in JAX, the factor is rounded to the dtype of the momentum: 0.9 is 0.8984 in bfloat16.
                factor = torch.tensor(self.recipe.momentum, dtype=dtype).item()
                momentum += factor * state["momentum_buffer"].to(momentum.dtype)
            parameter -= group["lr"] * momentum
            state["momentum_buffer"] = momentum.to(dtype)
        group["steps"] += 1
        return loss


def _momentum_dtype(recipe: Recipe, weight: torch.Tensor) -> torch.dtype:
    return weight.dtype if recipe.momentum_dtype is None else getattr(torch, recipe.momentum_dtype)
