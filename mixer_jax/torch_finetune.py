"""The PyTorch half of `mixer_jax.finetune`: the same recipe, and the same state of a run."""

__all__ = ["Sgd", "resume", "state_of"]

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("fine-tuning the PyTorch twin needs PyTorch: pip install 'mixer-jax[torch]'") from None

from convert import Checkpoint
from convert.containers.pt import from_torch, to_torch

from .finetune import Recipe, State
from .pretrained import require_same
from .torch_model import MlpMixer


class Sgd(torch.optim.Optimizer):
    """The recipe for a PyTorch model: what `mixer_jax.finetune.optimizer` makes for a Flax one.

    Its state is that of torch.optim.SGD, a `momentum_buffer` for each weight, and `steps` in the parameter group.
    """

    def __init__(self, model: MlpMixer, recipe: Recipe):
        super().__init__(model.named_parameters(), {"steps": 0, "lr": recipe.rate(0)})
        self.recipe = recipe

    @torch.no_grad()
    def step(self, closure=None):
        """One step for the weights that have a gradient. Raises ValueError, before anything changes, if none has one."""
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
        # Written out, since clip_grad_norm_ divides by the norm + 1e-6.
        divisor = (torch.nn.utils.get_total_norm(gradients) / self.recipe.clip_norm).clamp(min=1)
        for parameter, gradient in zip(parameters, gradients):
            state, dtype = self.state[parameter], _momentum_dtype(self.recipe, parameter)
            momentum = gradient / divisor
            if "momentum_buffer" in state:
                # A factor has the dtype of what it multiplies in JAX: 0.9 is 0.8984 beside bfloat16.
                factor = torch.tensor(self.recipe.momentum, dtype=dtype).item()
                momentum += factor * state["momentum_buffer"].to(momentum.dtype)
            parameter -= group["lr"] * momentum
            state["momentum_buffer"] = momentum.to(dtype)
        group["steps"] += 1
        return loss


def state_of(optimizer: Sgd) -> State:
    """A copy of where a PyTorch run stands. Raises CheckpointError where only some weights have momentum."""
    named = _named(optimizer)
    buffers = {name: optimizer.state[weight]["momentum_buffer"] for name, weight in named.items() if weight in optimizer.state}
    if not buffers and not optimizer.param_groups[0]["steps"]:
        buffers = {name: torch.zeros_like(weight) for name, weight in named.items()}
    copies = {
        name: buffer.detach().to(_momentum_dtype(optimizer.recipe, named[name]), copy=True) for name, buffer in buffers.items()
    }
    arrays = {name: from_torch(copy) for name, copy in copies.items()}
    return State(optimizer.param_groups[0]["steps"], Checkpoint.of_momentum(arrays, "timm"))


def resume(optimizer: Sgd, state: State) -> None:
    """Let a PyTorch run go on from where another stands.

    Raises CheckpointError, naming every array, for momentum of other names, shapes or another dtype than the optimiser's.
    """
    momentum, named = state.momentum.to("timm"), _named(optimizer)
    dtypes = {name: str(_momentum_dtype(optimizer.recipe, weight)).removeprefix("torch.") for name, weight in named.items()}
    require_same(momentum.arrays, {name: (tuple(named[name].shape), dtypes[name]) for name in named}, momentum.source)
    for name, weight in named.items():
        optimizer.state[weight]["momentum_buffer"] = to_torch(momentum.arrays[name]).to(weight.device, copy=True)
    optimizer.param_groups[0]["steps"] = state.steps


def _named(optimizer: Sgd) -> dict[str, torch.Tensor]:
    (group,) = optimizer.param_groups
    return dict(zip(group["param_names"], group["params"]))


def _momentum_dtype(recipe: Recipe, weight: torch.Tensor) -> torch.dtype:
    return weight.dtype if recipe.momentum_dtype is None else getattr(torch, recipe.momentum_dtype)
