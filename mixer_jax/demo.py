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

from convert import CheckpointError, MixerConfig

from .model import MlpMixer
from .parity import agreement

# Chosen by `python -m mixer_jax demo --validate`, which never sees the held-out fifth.
CONFIG = MixerConfig(
    patch_size=(4, 4),
    image_size=(8, 8),
    num_blocks=2,
    hidden_dim=128,
    tokens_mlp_dim=32,
    channels_mlp_dim=256,
    num_classes=10,
    in_channels=1,
)
STEPS, BATCH, RATE, WEIGHT_DECAY = 800, 64, 2e-3, 0.05

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
    """A Mixer trained on the digits, half of them moved and all a little noisy; AdamW with a cosine schedule."""
    images, labels = (jnp.asarray(part) for part in data)
    model = MlpMixer(CONFIG, rngs=nnx.Rngs(seed), stochastic_depth_rate=0.1)
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, STEPS // 10, STEPS)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)

    def loss(model: MlpMixer, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    @nnx.jit
    def step(model: MlpMixer, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        choose, vary = jax.random.split(key)
        chosen = jax.random.randint(choose, (BATCH,), 0, len(labels))
        value, gradients = nnx.value_and_grad(loss)(model, varied(images[chosen], vary), labels[chosen])
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


def varied(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images (b, h, w, c) with noise, every other one shifted by -1, 0 or 1 pixel either way over background."""
    b, h, w, c = images.shape
    shift, noise = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    offsets = jax.random.randint(shift, (b, 2), 0, 3).at[::2].set(1)
    cut = jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (h, w, c)))
    return cut(padded, offsets) + 0.3 * jax.random.normal(noise, images.shape)


def convert_and_compare(weights: Path, folder: Path, held_out: Digits | None) -> None:
    """`python -m convert npz2torch` as a person runs it, then both models from their files, side by side."""
    from . import pretrained

    target = folder / f"{weights.stem}.pt"
    print(f"$ python -m convert npz2torch {weights} {target} --force", flush=True)
    done = subprocess.run([sys.executable, "-m", "convert", "npz2torch", weights, target, "--force"], check=False)
    if done.returncode:
        raise CheckpointError(f"{weights}: could not be converted, for the reason above")
    config = pretrained.load(weights).config
    images, labels = held_out if held_out else (noise(config), None)
    logits = {dtype: both(weights, target, images, dtype) for dtype in ("float32", "float64")}

    if labels is not None:
        print(f"\naccuracy on {len(labels)} held-out digits")
        for side, name in enumerate(("Flax", "PyTorch")):
            print(f"  {name:<8} {(logits['float32'][side].argmax(axis=1) == labels).mean():8.2%}")
    print(f"\nparity on {len(images)} {'digits' if held_out else 'images of seeded noise'}, Flax against PyTorch, CPU")
    print(f"  {'':<8} {'largest difference':>19} {'of largest logit':>17} {'same class':>11}")
    for dtype, (flax, torch) in logits.items():
        a = agreement(flax, torch)
        print(f"  {dtype:<8} {a.largest:19.2e} {a.largest / a.scale:17.2e} {a.same_class:11.2%}")


def both(weights: Path, converted: Path, images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the Flax model of one file and the PyTorch model of the other, computed in a dtype at full precision."""
    import torch

    from . import pretrained, torch_model

    with jax.enable_x64(dtype == "float64"):
        model = pretrained.load(weights, param_dtype=dtype, precision="highest")
        flax = np.asarray(nnx.jit(lambda model, images: model(images))(model, images.astype(dtype)))
    twin = torch_model.load(converted, param_dtype=getattr(torch, dtype), precision="highest")
    with torch.inference_mode():
        other = twin(torch.from_numpy(rearrange(images.astype(dtype), "b h w c -> b c h w").copy())).numpy()
    return flax, other


def noise(config: MixerConfig) -> np.ndarray:
    """Four images of seeded noise in [-1, 1]."""
    shape = (4, *config.image_size, config.in_channels)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def run(weights: Path | None, folder: Path, *, validate: bool) -> None:
    """The demo, from a released file or from training; writes into `folder`."""
    from . import pretrained

    held_out = None
    if weights is None or validate:
        training, held_out = digits(validate=validate)
        model = train(training)
        if validate:
            print(f"accuracy on the validation part: {(np.asarray(model(held_out[0])).argmax(1) == held_out[1]).mean():.2%}")
            return
        folder.mkdir(exist_ok=True)
        weights = folder / "digits.npz"
        pretrained.save(model, weights, force=True)
        print(f"saved {weights} in Google's layout")
    folder.mkdir(exist_ok=True)
    convert_and_compare(weights, folder, held_out)
