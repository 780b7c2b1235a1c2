"""The paper's equations (section 2) in plain NumPy float64: the third opinion that both models answer to.

Written for reading, shares nothing with the models but MixerConfig.
"""

from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange

from convert import MixerConfig

Tap = Callable[[str, np.ndarray], np.ndarray]


def forward(
    config: MixerConfig,
    weights: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    tap: Tap = lambda name, array: array,
) -> np.ndarray:
    """Logits (b, classes), or features (b, channels) without a head, in float64.

    `weights` have google's names and axes, `images` are (b, h, w, channels). `tap(name, array)` sees the result of every
    operation and returns what the forward pass goes on with.
    """
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = rearrange(
        np.asarray(images, np.float64),
        "b (gh ph) (gw pw) c -> b (gh gw) (ph pw c)",
        ph=config.patch_size[0],
        pw=config.patch_size[1],
    )
    x = tap("stem", x @ rearrange(w["stem/kernel"], "h w i o -> (h w i) o") + w["stem/bias"])

    for i in range(config.num_blocks):
        google, ours = f"MixerBlock_{i}", f"blocks/{i}"
        y = tap(f"{ours}/token_norm", _layer_norm(config, w, f"{google}/LayerNorm_0", x))
        y = _mlp(config, w, f"{google}/token_mixing", f"{ours}/token_mixing", rearrange(y, "b n c -> b c n"), tap)
        x = tap(f"{ours}/token_mixing/sum", x + rearrange(y, "b c n -> b n c"))
        y = tap(f"{ours}/channel_norm", _layer_norm(config, w, f"{google}/LayerNorm_1", x))
        y = _mlp(config, w, f"{google}/channel_mixing", f"{ours}/channel_mixing", y, tap)
        x = tap(f"{ours}/channel_mixing/sum", x + y)

    x = tap("pre_head_norm", _layer_norm(config, w, "pre_head_layer_norm", x))
    x = tap("mean", x.mean(axis=1))
    return tap("head", x @ w["head/kernel"] + w["head/bias"]) if config.num_classes else x


def _mlp(config: MixerConfig, w: Mapping[str, np.ndarray], google: str, ours: str, x: np.ndarray, tap: Tap) -> np.ndarray:
    x = tap(f"{ours}/dense_0", x @ w[f"{google}/Dense_0/kernel"] + w[f"{google}/Dense_0/bias"])
    x = tap(f"{ours}/gelu", gelu(x, config.gelu))
    return tap(f"{ours}/dense_1", x @ w[f"{google}/Dense_1/kernel"] + w[f"{google}/Dense_1/bias"])


def _layer_norm(config: MixerConfig, w: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + config.layer_norm_epsilon) * w[f"{name}/scale"] + w[f"{name}/bias"]


def gelu(x: np.ndarray, form: str) -> np.ndarray:
    """Gaussian error linear unit (Hendrycks and Gimpel 2016): "exact" by erf, "tanh" by their approximation."""
    if form == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))
