"""The main job on real data: train a small Mixer on handwritten digits, convert it, and hold both frameworks together."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from tqdm import tqdm

from convert import MixerConfig

from .model import MlpMixer

# Chosen by `python -m mixer_jax demo --validate`, which never sees the held-out fifth.
CONFIG = MixerConfig(
    patch_size=(2, 2),
    image_size=(8, 8),
    num_blocks=4,
    hidden_dim=64,
    tokens_mlp_dim=32,
    channels_mlp_dim=128,
    num_classes=10,
    in_channels=1,
)
STEPS, BATCH, RATE, WEIGHT_DECAY = 600, 64, 4e-3, 0.05

Digits = tuple[np.ndarray, np.ndarray]  # images (b, 8, 8, 1) in [-1, 1], labels (b,)


def digits(*, validate: bool) -> tuple[Digits, Digits]:
    """scikit-learn's 1797 handwritten digits: what to train on and what to judge by, a stratified fifth.

    With `validate` both are parts of what is trained on otherwise.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise ImportError("the demo needs scikit-learn: pip install 'mixer-jax[demo]'") from None
    images, labels = load_digits(return_X_y=True)
    images = rearrange(images.astype(np.float32) / 8 - 1, "b (h w) -> b h w 1", h=8)

    def split(images: np.ndarray, labels: np.ndarray) -> tuple[Digits, Digits]:
        x, x_held_out, y, y_held_out = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        return (x, y), (x_held_out, y_held_out)

    rest, held_out = split(images, labels)
    return split(*rest) if validate else (rest, held_out)


def train(data: Digits, *, seed: int = 0) -> MlpMixer:
    """A Mixer trained on the digits, moved by up to a pixel at random; AdamW with a cosine schedule."""
    images, labels = (jnp.asarray(part) for part in data)
    model = MlpMixer(CONFIG, rngs=nnx.Rngs(seed), stochastic_depth_rate=0.1)
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, STEPS // 10, STEPS)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)

    def loss(model: MlpMixer, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    @nnx.jit
    def step(model: MlpMixer, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        choose, move = jax.random.split(key)
        chosen = jax.random.randint(choose, (BATCH,), 0, len(labels))
        value, gradients = nnx.value_and_grad(loss)(model, moved(images[chosen], move), labels[chosen])
        optimizer.update(model, gradients)
        return value

    model.train()
    keys = jax.random.split(jax.random.key(seed), STEPS)
    with tqdm(keys, desc="training", unit="step", disable=None) as bar:
        for i, key in enumerate(bar):
            value = step(model, optimizer, key)
            if i % 50 == 0:
                bar.set_postfix(loss=f"{float(value):.3f}")
    model.eval()
    return model


def moved(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image (b, h, w, c) shifted by -1, 0 or 1 pixel either way, the border filled with background."""
    b, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    offsets = jax.random.randint(key, (b, 2), 0, 3)
    cut = jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (h, w, c)))
    return cut(padded, offsets)
