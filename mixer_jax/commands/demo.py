"""The main job on real data: train a small Mixer on handwritten digits, convert it, compare both frameworks."""

__all__ = ["demo"]

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

from convert import CheckpointError, MixerConfig, read

from ..model import MlpMixer
from ..parity.comparison import agreement, noise

# Chosen on a fifth of the training digits; the held-out fifth chose nothing.
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


def digits() -> tuple[Digits, Digits]:
    """scikit-learn's 1797 handwritten digits: the training part, and a stratified fifth that is held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise ImportError("the demo needs scikit-learn: pip install 'mixer-jax[demo]'") from None
    images, labels = load_digits(return_X_y=True)
    images = rearrange(images.astype(np.float32) / 8 - 1, "b (h w) -> b h w 1", h=8)
    x, x_held_out, y, y_held_out = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return (x, y), (x_held_out, y_held_out)


def train(data: Digits, *, seed: int = 0, steps: int = STEPS) -> MlpMixer:
    """A Mixer trained on the digits, half of them shifted and all with noise, by AdamW with a cosine schedule."""
    images, labels = (jnp.asarray(part) for part in data)
    model = MlpMixer(CONFIG, rngs=nnx.Rngs(seed), stochastic_depth_rate=0.1)
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps)
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
    keys = jax.random.split(jax.random.key(seed), steps)
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
    shift_key, noise_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    offsets = jax.random.randint(shift_key, (b, 2), 0, 3).at[::2].set(1)
    cut = jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (h, w, c)))
    return cut(padded, offsets) + 0.3 * jax.random.normal(noise_key, images.shape)


def demo(
    weights: Path | None = None, folder: Path = Path("demo-output"), *, steps: int = STEPS
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Convert a file for PyTorch, by default that of a Mixer trained on digits, and print how both models agree.

    Returns the logits of the Flax and the PyTorch model by dtype. Files are written into `folder`.
    """
    from .. import pretrained

    folder.mkdir(exist_ok=True)
    images, labels = None, None
    if weights is None:
        training, (images, labels) = digits()
        weights = folder / "digits.npz"
        pretrained.save(train(training, steps=steps), weights, force=True)
        print(f"saved {weights} in Google's layout")
    target = folder / f"{weights.stem}.pt"
    print(f"$ python -m convert npz2torch {weights} {target} --force", flush=True)
    done = subprocess.run([sys.executable, "-m", "convert", "npz2torch", weights, target, "--force"], check=False)
    if done.returncode:
        raise CheckpointError(f"{weights}: could not be converted, for the reason above")
    if images is None:
        images = noise(read(weights).config, 4, 0)
    logits = {dtype: both_logits(weights, target, images, dtype) for dtype in ("float32", "float64")}
    if labels is not None:
        print(f"\naccuracy on {len(labels)} held-out digits")
        for name, values in zip(("Flax", "PyTorch"), logits["float32"]):
            print(f"  {name:<8} {100 * (values.argmax(axis=1) == labels).mean():8.2f} %")
    print(f"\nparity on {len(images)} {'images of seeded noise' if labels is None else 'digits'}, Flax against PyTorch, CPU")
    print(f"  {'':<8} {'max abs difference':>19} {'relative to max abs':>20} {'same class':>11}")
    for dtype, pair in logits.items():
        a = agreement(*pair)
        print(f"  {dtype:<8} {a.max_abs:19.2e} {a.max_abs / a.scale:20.2e} {100 * a.same_class:9.2f} %")
    return logits


def both_logits(weights: Path, converted: Path, images: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the Flax model of one file and of the PyTorch model of the other, in a dtype at full precision."""
    import torch

    from .. import pretrained, torch_pretrained

    with jax.enable_x64(dtype == "float64"):
        model = pretrained.load(weights, param_dtype=dtype, precision="highest")
        flax = np.asarray(nnx.jit(lambda model, images: model(images))(model, images.astype(dtype)))
    torch_model = torch_pretrained.load(converted, param_dtype=getattr(torch, dtype), precision="highest")
    with torch.inference_mode():
        return flax, torch_model(torch.from_numpy(rearrange(images.astype(dtype), "b h w c -> b c h w").copy())).numpy()
