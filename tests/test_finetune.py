"""A run that is stopped anywhere ends with the bits of one that was not; and no run goes on where it should not."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import process, run
from conftest import random_weights
from filelock import FileLock
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from test_training_data import cifar

import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, read, write
from mixer_jax.commands.finetune import finetune
from mixer_jax.pictures.curves import draw_curves, smoothed
from mixer_jax.training.batches import EvaluationBatches
from mixer_jax.training.config import HELP, PRESETS, FinetuneConfig
from mixer_jax.training.data import open_dataset

ROOT = Path(__file__).parent.parent
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
    files = [(folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")]
    return bits, files


def events(folder):
    """{(tag, step): value} as TensorBoard shows it: where a run began again, what was there from that step on is dropped."""
    values = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                values = {key: value for key, value in values.items() if key[1] < event.step}
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return values


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    process("finetune", *LINE, "--run", folder)
    return folder


def started(folder, *options, **streams):
    command = [sys.executable, "-m", "mixer_jax", "finetune", *LINE, "--run", str(folder), *options]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **streams)


def killed(folder, generator, *options):
    """Kill a run at a random moment: while a state is written, or after a random number of steps. Whether it was killed."""
    child = started(folder, *options, stdout=subprocess.DEVNULL)
    rows, in_a_write = len(metrics(folder)) + generator.randrange(-2, 20), generator.random() < 0.5
    while child.poll() is None:
        if half_written(folder) if in_a_write else len(metrics(folder)) >= rows:
            time.sleep(generator.uniform(0, 0.02))
            child.kill()
            break
    assert child.wait() in (0, -signal.SIGKILL)
    return child.returncode != 0


def metrics(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def half_written(folder):
    return [name for name in os.listdir(folder / "states") if "tmp" in name] if (folder / "states").exists() else []


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.heavy)])
def test_killed_anywhere_ends_with_the_same_bits(kills, uninterrupted, tmp_path):
    generator, count, writes, rounds = random.Random(kills), 0, 0, itertools.count()
    while count < kills:
        folder = tmp_path / str(next(rounds))
        while count < kills and killed(folder, generator, "--threads", str(1 + 3 * (count % 2)), "--save-minutes", "0"):
            count += 1
            writes += bool(half_written(folder))
        process("finetune", *LINE, "--run", folder)
        assert outcome(folder) == outcome(uninterrupted)
        assert events(folder) == events(uninterrupted)
    assert writes >= kills // 10  # left a state half written


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.heavy)])
def test_a_signal_saves_before_it_stops(number, uninterrupted, tmp_path):
    child = started(tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline().startswith(b"step 0")
    child.send_signal(number)
    _, err = child.communicate()
    assert (child.returncode, b"stopped by a signal, state saved" in err) == (128 + number, True), err
    assert (tmp_path / "run" / "curves.png").exists()
    steps = [int(name) for name in os.listdir(tmp_path / "run" / "states") if name.isdecimal()]
    assert 0 < max(steps) < 30
    process("finetune", *LINE, "--run", tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_the_result_is_a_checkpoint_like_any_other(uninterrupted, tmp_path, capsys):
    row = json.loads(metrics(uninterrupted)[-1])
    assert {"best_step", "test_correct", "test_loss"} <= row.keys()
    model, test = mixer_jax.load(uninterrupted / "best"), open_dataset("digits").test
    batches = EvaluationBatches(dataset=test, batch_size=64, image_size=(8, 8), preprocessing=model.preprocessing)
    right = sum(float((np.asarray(model(b.images)).argmax(1) == b.labels) @ b.mask) for b in batches)
    assert (right, len(test)) == (row["test_correct"], row["test_images"])
    assert (model.labels, model.preprocessing) == (tuple("0123456789"), "squash")
    write(tmp_path / "best.npz", read(uninterrupted / "best"), layout="google")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "zero.png")
    assert "zero.png" in run(capsys, "predict", tmp_path / "best.npz", tmp_path / "zero.png").out


def test_metrics_are_in_every_form(uninterrupted):
    rows = [json.loads(line) for line in metrics(uninterrupted)]
    wanted = {(name.replace("_", "/", 1), row["step"]): value for row in rows for name, value in row.items() if name != "step"}
    assert events(uninterrupted) == {key: np.float32(value) for key, value in wanted.items()}
    table = list(csv.DictReader((uninterrupted / "metrics.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in table[1:]] == [row["loss"] for row in rows if "loss" in row]
    above, below = draw_curves(rows).axes
    assert above.lines[0].get_ydata().tolist() == [row["loss"] for row in rows if "loss" in row]
    assert len(below.lines[0].get_ydata()) == 7
    assert all((uninterrupted / name).stat().st_size > 5000 for name in ("curves.png", "confusion.png"))
    assert smoothed(np.array([3.0, 3.0, 3.0])) == pytest.approx([3.0] * 3, rel=1e-14)
    assert smoothed(np.array([1.0, 2.0]))[1] == pytest.approx((0.98 * 1 + 2) / 1.98, rel=1e-14)


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


def test_linear_probing_computes_the_features_of_an_image_once(checkpoint, tmp_path, monkeypatch):
    images = image_folder(tmp_path / "images")
    (images / "cat" / "broken.png").write_bytes(b"no image")
    alike = {"train": "head", "min_area": None, "flip": False, "image_size": None, "validation": 0.3}
    finetune(checkpoint, images, tmp_path / "each", config=config(**alike))
    finetune(checkpoint, images, tmp_path / "once", config=config(**alike, cache_features=True, total_steps=6))
    each, once = ([json.loads(line) for line in metrics(tmp_path / name)] for name in ("each", "once"))
    assert [row["step"] for row in each] == [row["step"] for row in once]
    assert each[0] == pytest.approx(once[0], rel=1e-5)
    values = np.load(tmp_path / "once" / "features" / "train.npy")
    assert np.isnan(values).all(axis=1).sum() == np.isnan(values).any(axis=1).sum() == 1
    shutil.rmtree(tmp_path / "once" / "states")
    monkeypatch.setattr("mixer_jax.training.features.compiled", None)  # not called again
    finetune(checkpoint, images, tmp_path / "once", config=config(**alike, cache_features=True))
    assert [json.loads(line) for line in metrics(tmp_path / "once")] == once
    with pytest.raises(ValueError, match="cache_features must be off unless train is 'head' and nothing varies"):
        config(cache_features=True, train="head")


def test_the_official_fine_tuning_is_one_command(checkpoint, tmp_path):
    """Dry: on a small checkpoint and CIFAR's files with noise in them."""
    cifar(tmp_path / "cifar")
    options = f"--run {tmp_path / 'run'} --batch-size 16 --warmup-steps 1 --total-steps 2 --evaluate-every 1 --validation 0.2"
    given = [f"BIN={Path(sys.executable).parent}", f"WEIGHTS={checkpoint}", f"DATA={tmp_path / 'cifar'}", f"OPTIONS={options}"]
    command = ["make", "-C", ROOT, "--assume-old", ".venv/installed", "finetune-cifar10"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, "of 40 images" in done.stdout) == (0, True), done.stderr
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    official = {"base_rate": 0.03, "clip_norm": 1.0, "accumulation": 8, "momentum_dtype": "bfloat16", "min_area": 0.05}
    assert official.items() <= settings.items()
    usage = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "usage: make finetune-cifar10 WEIGHTS=" in usage.stderr


def test_states_are_saved_by_time_as_well(tmp_path):
    finetune(None, "digits", tmp_path / "run", config=config(evaluate_every=100), from_scratch=SCRATCH, save_seconds=0)
    assert sorted(os.listdir(tmp_path / "run" / "states")) == ["5", "6"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"(loss|gradient_norm) is (nan|inf) (in|after) step \d: stopped before"):
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
    assert {*PRESETS} == {"official", "linear-probe", "small"}
    assert FinetuneConfig() == FinetuneConfig.of("official")
    with pytest.raises(ValueError, match="no setting called colour"):
        FinetuneConfig.of(colour="red")
