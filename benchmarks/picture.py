"""docs/token-mixing.png: a small Mixer trained on two photographs for some minutes, drawn by `python -m mixer_jax draw`.

The photographs come with scikit-learn. The task is to tell from which of 48 cells of them a crop was cut, with shifted colours
and noise, so that token-mixing units have to tell where in the crop something is. Accuracy is on other crops of the same
photographs, which shows that something was learnt, and nothing about generalisation.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_sample_images
from tqdm import tqdm

import mixer_jax
from mixer_jax import MixerConfig, MlpMixer
from mixer_jax.__main__ import main as command

CELLS, SIZE = (4, 6), 48  # rows and columns of cells in each photograph; pixels of a crop
SIZES = {"num_blocks": 2, "hidden_dim": 32, "tokens_mlp_dim": 64, "channels_mlp_dim": 64}
CONFIG = MixerConfig.named("S/4", image_size=SIZE, num_classes=2 * CELLS[0] * CELLS[1]).replace(**SIZES)
STEPS, BATCH, RATE, WEIGHT_DECAY = 1600, 64, 4e-3, 0.8  # the decay leaves little of the random start to be seen


def crops(photographs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random crops (b, h, w, c) in about [-1, 1] and the cells they are from."""
    _, height, width, _ = photographs.shape
    rows, columns = height - SIZE + 1, width - SIZE + 1
    keys = jax.random.split(key, 6)
    which, top, left = (jax.random.randint(k, (BATCH,), 0, n) for k, n in zip(keys, (len(photographs), rows, columns)))

    def cut(which: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(photographs, (which, top, left, 0), (1, SIZE, SIZE, 3))[0]

    gain = jnp.exp(0.2 * jax.random.normal(keys[3], (BATCH, 1, 1, 3)))
    offset = 0.2 * jax.random.normal(keys[4], (BATCH, 1, 1, 3))
    images = jax.vmap(cut)(which, top, left) * gain + offset + 0.1 * jax.random.normal(keys[5], (BATCH, SIZE, SIZE, 3))
    return images, (which * CELLS[0] + top * CELLS[0] // rows) * CELLS[1] + left * CELLS[1] // columns


def train(steps: int) -> tuple[MlpMixer, float]:
    """The model, and its accuracy on 16 batches of other crops."""
    photographs = jnp.asarray(np.stack(load_sample_images().images), jnp.float32) / 127.5 - 1
    model = MlpMixer(CONFIG, rngs=nnx.Rngs(0))
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)

    def loss(model: MlpMixer, images: jax.Array, cells: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), cells).mean()

    @nnx.jit
    def step(model: MlpMixer, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, *crops(photographs, key)))

    @nnx.jit
    def accuracy(model: MlpMixer, key: jax.Array) -> jax.Array:
        images, cells = crops(photographs, key)
        return (model(images).argmax(axis=1) == cells).mean()

    model.train()
    training, judging = jax.random.split(jax.random.key(0))
    for key in tqdm(jax.random.split(training, steps), desc="training", unit="step", disable=None):
        step(model, optimizer, key)
    model.eval()
    return model, float(np.mean([accuracy(model, key) for key in jax.random.split(judging, 16)]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small Mixer on two photographs and draw its first token mixing.")
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/token-mixing.png"), metavar="OUT.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--weights", type=Path, metavar="OUT.npz", help="write the weights here")
    arguments = parser.parse_args()
    model, accuracy = train(arguments.steps)
    print(f"accuracy on other crops of the same photographs: {accuracy:.1%}; by chance {1 / CONFIG.num_classes:.1%}")
    arguments.picture.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "two-photographs" / "mixer.npz"
        weights.parent.mkdir()
        mixer_jax.save(model, weights)
        if arguments.weights:
            mixer_jax.save(model, arguments.weights)
        return command(["draw", str(weights), str(arguments.picture), "--blocks", "0", "--force"])


if __name__ == "__main__":
    raise SystemExit(main())
