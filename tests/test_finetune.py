"""A run that is stopped anywhere ends with the bits of one that was not; and no run goes on where it should not."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from command_line import process, run
from conftest import random_weights
from filelock import FileLock
from PIL import Image

import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, read, write
from mixer_jax.commands.finetune import finetune
from mixer_jax.training.config import HELP, PRESETS, FinetuneConfig
from mixer_jax.training.data import EvaluationBatches, open_dataset

SCRATCH = "S/4,num_blocks=2,hidden_dim=16,tokens_mlp_dim=8,channels_mlp_dim=24"
SHORT = {"total_steps": 6, "warmup_steps": 2, "evaluate_every": 2, "batch_size": 8, "image_size": (8, 8)}
LINE = ["digits", "--from-scratch", SCRATCH, "--image-size", "8", "--total-steps", "30", "--warmup-steps", "3"]
LINE += [
    "--evaluate-every",
    "5",
    "--batch-size",
    "16",
    "--stochastic-depth-rate",
    "0.2",
    "--ema-decay",
    "0.9",
    "--mixup",
    "0.2",
]


def config(**changes):
    return FinetuneConfig.of("small", **(SHORT | changes))


def scratch(folder, **changes):
    return finetune(None, "digits", folder, config=config(**changes), from_scratch=SCRATCH)


def outcome(folder):
    """All of a run that must not depend on interruptions."""
    weights = {name: read(folder / name).as_numpy() for name in ("best", "last")}
    bits = {(name, key): array.tobytes() for name, arrays in weights.items() for key, array in arrays.items()}
    return bits, (folder / "metrics.jsonl").read_bytes(), (folder / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    process("finetune", *LINE, "--run", folder)
    return folder


def killed(folder, generator, *options):
    """Kill the run at a random moment; None if it came to its end before, else how many bytes it had written."""
    command = [sys.executable, "-m", "mixer_jax", "finetune", *LINE, "--run", str(folder), *options]
    child = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    try:
        return child.wait(timeout=generator.uniform(2, 7)) and pytest.fail("the run failed")
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.heavy)])
def test_killed_anywhere_ends_with_the_same_bits(kills, uninterrupted, tmp_path):
    generator, count, rounds = random.Random(kills), 0, itertools.count()
    while count < kills:
        folder = tmp_path / str(next(rounds))
        while count < kills and killed(folder, generator, "--threads", str(1 + 3 * (count % 2))) == -signal.SIGKILL:
            count += 1
        process("finetune", *LINE, "--run", folder)
        assert outcome(folder) == outcome(uninterrupted)


def test_a_signal_saves_before_it_stops(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "mixer_jax", "finetune", *LINE, "--run", str(tmp_path / "run")]
    child = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline().startswith(b"step 0")
    child.terminate()
    _, err = child.communicate()
    assert (child.returncode, b"stopped by a signal, state saved" in err) == (143, True), err
    steps = [int(name) for name in os.listdir(tmp_path / "run" / "states") if name.isdecimal()]
    assert 0 < max(steps) < 30
    process("finetune", *LINE, "--run", tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_the_result_is_a_checkpoint_like_any_other(uninterrupted, tmp_path, capsys):
    row = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"best_step", "test_correct", "test_loss"} <= row.keys()
    model, test = mixer_jax.load(uninterrupted / "best"), open_dataset("digits").test
    batches = EvaluationBatches(dataset=test, batch_size=64, image_size=(8, 8), preprocessing=model.preprocessing)
    right = sum(float((np.asarray(model(b.images)).argmax(1) == b.labels) @ b.weights) for b in batches)
    assert (right, len(test)) == (row["test_correct"], row["test_images"])
    assert (model.labels, model.preprocessing) == (tuple("0123456789"), "squash")
    write(tmp_path / "best.npz", read(uninterrupted / "best"), layout="google")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "zero.png")
    assert "zero.png" in run(capsys, "predict", tmp_path / "best.npz", tmp_path / "zero.png").out


def test_finished_runs_only_report(uninterrupted, capsys):
    before = outcome(uninterrupted)
    assert "test: " in run(capsys, "finetune", *LINE, "--run", uninterrupted).out
    assert outcome(uninterrupted) == before


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    scratch(folder)
    return folder


def test_another_config_is_refused_and_named(short, tmp_path):
    with pytest.raises(CheckpointError, match="holds another run: config: base_rate was 0.01 and is 0.02"):
        scratch(short, base_rate=0.02)
    with pytest.raises(CheckpointError, match="no run to resume"):
        finetune(None, "digits", tmp_path / "new", config=config(), from_scratch=SCRATCH, resume=True)
    (tmp_path / "barely").mkdir()
    (tmp_path / "barely" / ".lock").touch()  # killed before there was a config
    scratch(tmp_path / "barely")
    with FileLock(short / ".lock"), pytest.raises(CheckpointError, match="another process is training in this folder"):
        scratch(short)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not a run of fine-tuning"):
        scratch(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not that of a run of fine-tuning"):
        scratch(tmp_path / "other")


def image_folder(folder, classes=("cat", "dog"), count=6):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(256, size=(9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    sizes = MixerConfig.named("B/16").replace(
        patch_size=(4, 4), image_size=(8, 8), num_blocks=2, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24, num_classes=2
    )
    start = Checkpoint.from_arrays(random_weights(sizes)).with_metadata(labels=("cat", "dog"), num_blocks=2)
    write(tmp_path / "start.npz", start)
    return tmp_path / "start.npz"


def test_a_dataset_that_changed_is_named(checkpoint, tmp_path):
    images, settings = image_folder(tmp_path / "images"), config(image_size=None, validation=0.3)
    finetune(checkpoint, images, tmp_path / "run", config=settings)
    shutil.copy(images / "cat" / "0.png", images / "dog" / "new.png")
    with pytest.raises(CheckpointError, match=r"data: 1 image added \(dog/new.png\)"):
        finetune(checkpoint, images, tmp_path / "run", config=settings)


def test_frozen_weights_head_and_resolution(checkpoint, tmp_path):
    images = image_folder(tmp_path / "images")
    (images / "cat" / "broken.png").write_bytes(b"no image")
    (images / "dog" / "empty.png").touch()
    before = read(checkpoint).to("google").as_numpy()
    finetune(checkpoint, images, tmp_path / "head", config=config(image_size=None, train="head", validation=0.3))
    after = read(tmp_path / "head" / "last").to("google").as_numpy()
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head/kernel", "head/bias"}
    kept = config(image_size=(16, 16), keep_head=True, validation=0.3, dtype="bfloat16", remat=True, accumulation=2)
    finetune(checkpoint, images, tmp_path / "kept", config=kept)
    assert read(tmp_path / "kept" / "last").config.image_size == (16, 16)
    with pytest.raises(CheckpointError, match="not a whole number of patches"):
        finetune(checkpoint, images, tmp_path / "odd", config=config(image_size=(9, 9)))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"(loss|gradient_norm) is (nan|inf) in step \d: stopped before"):
        scratch(tmp_path / "run", base_rate=1e38, evaluate_every=1, warmup_steps=0)
    assert all(np.isfinite(array).all() for array in read(tmp_path / "run" / "last").as_numpy().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "9", "--accumulation", "2"], "batch_size must be a multiple of the 2 microbatches, not 9"),
        (["--total-steps", "3"], "total_steps must be None or more than warmup_steps, not 3"),
        (["--from-scratch", "S/3"], "image_size 8x8 is not a whole number of 3x3 patches"),
        (["--train", "heads"], "no weight is called 'heads'"),
    ],
)
def test_bad_settings_are_one_line(options, message, tmp_path, capsys):
    err = run(capsys, "finetune", *LINE, "--run", tmp_path / "run", *options, code=1).err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_all_settings_are_options_and_go_through_json():
    settings = FinetuneConfig.of("small")
    assert settings.as_dict().keys() == {name for group in HELP.values() for name in group}
    assert FinetuneConfig.of(**json.loads(json.dumps(settings.as_dict()))) == settings
    assert {*PRESETS} == {"official", "small"}
    assert FinetuneConfig() == FinetuneConfig.of("official")
    with pytest.raises(ValueError, match="no setting called colour"):
        FinetuneConfig.of(colour="red")
