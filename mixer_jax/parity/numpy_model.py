"""The paper's equations (section 2) in plain NumPy float64: what both models are compared with.

Written for reading; shares nothing with the models but MixerConfig.
"""

__all__ = ["forward"]

from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange

from convert import MixerConfig

Hook = Callable[[str, np.ndarray], np.ndarray]


def gelu(x: np.ndarray, form: str) -> np.ndarray:
    """Gaussian error linear unit (Hendrycks and Gimpel 2016): "exact" by erf, "tanh" by their approximation."""
    if form == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


class Arithmetic:
    """What a forward pass is made of, in float64; `rounding.Rounded` is one that rounds as a device does."""

    def matmul(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, exact: np.ndarray | None = None) -> np.ndarray:
        """`exact` is x @ kernel where that is known; it may be written to."""
        return (x @ kernel if exact is None else exact) + bias

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + epsilon) * scale + bias

    def gelu(self, x: np.ndarray, form: str) -> np.ndarray:
        return gelu(x, form)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def mean(self, x: np.ndarray) -> np.ndarray:
        return x.mean(axis=1)

    def head(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return x @ kernel + bias


def forward(
    config: MixerConfig,
    weights: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    hook: Hook = lambda name, array: array,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008 - has no state
) -> np.ndarray:
    """Logits (b, classes), or features (b, channels) without a head, in float64.

    `weights` have google's names and axes, `images` are (b, h, w, channels). `hook(name, array)` sees the result of every
    operation and returns what the forward pass goes on with.
    """
    a = arithmetic

    def w(name: str) -> np.ndarray:  # one at a time: all of them in float64 are twice the model
        return np.asarray(weights[name], np.float64)

    def dense(name: str) -> tuple[np.ndarray, np.ndarray]:
        return w(f"{name}/kernel"), w(f"{name}/bias")

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        return a.layer_norm(x, w(f"{name}/scale"), w(f"{name}/bias"), config.layer_norm_epsilon)

    def mlp(x: np.ndarray, google: str, ours: str) -> np.ndarray:
        x = hook(f"{ours}/dense_0", a.matmul(x, *dense(f"{google}/Dense_0")))
        x = hook(f"{ours}/gelu", a.gelu(x, config.gelu))
        return hook(f"{ours}/dense_1", a.matmul(x, *dense(f"{google}/Dense_1")))

    height, width = config.patch_size
    x = rearrange(np.asarray(images, np.float64), "b (gh h) (gw w) c -> b (gh gw) (h w c)", h=height, w=width)
    kernel, bias = dense("stem")
    x = hook("stem", a.matmul(x, rearrange(kernel, "h w i o -> (h w i) o"), bias))

    for i in range(config.num_blocks):
        google, ours = f"MixerBlock_{i}", f"blocks/{i}"
        y = hook(f"{ours}/token_norm", layer_norm(x, f"{google}/LayerNorm_0"))
        y = mlp(rearrange(y, "b n c -> b c n"), f"{google}/token_mixing", f"{ours}/token_mixing")
        x = hook(f"{ours}/token_mixing/sum", a.add(x, rearrange(y, "b c n -> b n c")))
        y = hook(f"{ours}/channel_norm", layer_norm(x, f"{google}/LayerNorm_1"))
        y = mlp(y, f"{google}/channel_mixing", f"{ours}/channel_mixing")
        x = hook(f"{ours}/channel_mixing/sum", a.add(x, y))

    x = hook("pre_head_norm", layer_norm(x, "pre_head_layer_norm"))
    x = hook("mean", a.mean(x))
    return hook("head", a.head(x, *dense("head"))) if config.num_classes else x
