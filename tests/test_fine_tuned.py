"""Google's fine-tuning, of two steps: what it saves is read as it is and gives the logits of the network that was trained."""

import jax
import numpy as np
import optax
import pytest
from conftest import GOLDENS
from implementations import distance
from linen_mixer import MlpMixer
from PIL import Image
from written_by_jax import save_checkpoint, save_old_checkpoint

import convert
import mixer_jax
from convert import Checkpoint
from convert.commands import inspect_file

SQUARE = GOLDENS["square"]
RATE = 0.03
OPTIMISER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.sgd(RATE, momentum=0.9, nesterov=False, accumulator_dtype="bfloat16")
)


@pytest.fixture(scope="module")
def trained():
    """Parameters in Linen's tree, the optimiser's state, and the number of steps."""
    network = MlpMixer(SQUARE.config)
    params = jax.tree.map(np.asarray, Checkpoint.from_arrays(SQUARE.weights).as_linen()["params"])
    targets = jax.nn.one_hot(SQUARE.outputs["labels"], SQUARE.config.num_classes)

    def loss(params):
        return optax.softmax_cross_entropy(network.apply({"params": params}, SQUARE.images), targets).mean()

    @jax.jit
    def step(params, state):
        updates, state = OPTIMISER.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = OPTIMISER.init(params)
    for _ in range(2):
        params, state = step(params, state)
    return params, state, 2


def logits(model, dtype="float32") -> np.ndarray:
    return np.asarray(model(SQUARE.images.astype(dtype)))


@pytest.mark.parametrize("save", [save_old_checkpoint, save_checkpoint], ids=["msgpack", "Orbax"])
def test_logits_of_what_fine_tuning_saved_are_the_trained_networks(tmp_path, trained, save):
    params = trained[0]
    path = save(tmp_path, trained, step=2)
    assert path == tmp_path / "checkpoint_2"
    wanted = logits(mixer_jax.load(Checkpoint.from_arrays(params)))
    assert distance(wanted, logits(mixer_jax.load(SQUARE.weights_file))) > 1e-3  # it was trained
    for source in (path, tmp_path):  # the file or folder, and the folder above it
        assert np.array_equal(logits(mixer_jax.load(source)), wanted)
    with jax.enable_x64(True):
        variables = {"params": jax.tree.map(lambda array: np.asarray(array, "float64"), params)}
        network = jax.jit(MlpMixer(SQUARE.config).apply)(variables, SQUARE.images.astype("float64"))
        error = distance(logits(mixer_jax.load(path, param_dtype="float64"), "float64"), np.asarray(network))
    print(f"{error:.1e} relative to max abs")
    assert error < 1e-10


def test_predictions_are_the_trained_networks(tmp_path, trained):
    image = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    model = mixer_jax.load(save_checkpoint(tmp_path / "run", trained, step=2))
    (prediction,) = mixer_jax.predict(model, tmp_path / "image.png", top=SQUARE.config.num_classes)
    pixels = mixer_jax.prepare(tmp_path / "image.png", model)
    wanted = np.asarray(jax.jit(MlpMixer(SQUARE.config).apply)({"params": trained[0]}, pixels[None]))[0]
    assert [best.index for best in prediction.top] == np.argsort(-wanted).tolist()
    error = np.abs([best.logit for best in prediction.top] - np.sort(wanted)[::-1]).max()
    print(f"{error:.1e}")  # measured: 4e-7, as predictions are rounded to six digits
    assert error < 2e-6


def test_the_optimisers_momentum_is_listed_and_not_read(tmp_path, trained):
    facts = inspect_file(save_checkpoint(tmp_path, trained, step=2))
    assert sorted(facts["also in the file"]) == [f"1 ({len(SQUARE.weights)} arrays)", "2"]
    assert convert.read(tmp_path).dtype == "float32"  # the momentum is bfloat16
