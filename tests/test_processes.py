"""Two and four real processes over loopback: the results of one, whatever their number, and a clear end when one dies.

As a script it trains in float64 as one of the processes: RUN MESH SPLIT [COORDINATOR PROCESSES PROCESS].
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import random_weights
from PIL import Image

from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, read, write
from mixer_jax.sharding import joining, processes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
CONFIG = MixerConfig(
    image_size=(8, 8),
    patch_size=(4, 4),
    in_channels=1,
    num_blocks=2,
    hidden_dim=16,
    tokens_mlp_dim=8,
    channels_mlp_dim=24,
    num_classes=10,
)
STEPS = 12
FLOAT64 = ReadOptions(dtype="float64")
SETTINGS = {
    "image_size": None,
    "total_steps": STEPS,
    "warmup_steps": 2,
    "evaluate_every": 3,
    "batch_size": 8,
    "accumulation": 2,
}
SETTINGS |= {"dropout_rate": 0.1, "stochastic_depth_rate": 0.2, "ema_decay": 0.9, "mixup": 0.2, "base_rate": 0.05}


def train(run, mesh, split, *joined):
    """A float64 run on digits, in this process or as one of several."""
    from mixer_jax.commands.finetune import finetune
    from mixer_jax.training.config import FinetuneConfig

    weights = random_weights(CONFIG, dtype="float64")
    start = Checkpoint.from_arrays(weights).with_metadata(num_blocks=2, labels=tuple("0123456789"), preprocessing="squash")
    how = {"config": FinetuneConfig.of("small", **SETTINGS), "save_seconds": 0, "threads": 1}
    how |= {"mesh": None if mesh == "none" else mesh, "split_weights": split == "split"}

    def command():
        finetune(start, "digits", run, **how)

    if not joined:
        return command()
    coordinator, number, process = joined
    return joining.Processes(coordinator, int(number), int(process)).run(command)


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"localhost:{probe.getsockname()[1]}"


def started(lines, **environment):
    """A process for each command line."""
    every = os.environ | ENVIRONMENT | environment
    return [
        subprocess.Popen([sys.executable, *map(str, line)], env=every, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in lines
    ]


def ended(children, code=0):
    """Standard output and standard error of each, all with this exit code."""
    texts = [tuple(stream.decode() for stream in child.communicate(timeout=200)) for child in children]
    assert [child.returncode for child in children] == [code] * len(children), texts
    return texts


def training(run, number, mesh="none", split="whole"):
    address = free_address()
    return started([[__file__, run, mesh, split, address, number, i] for i in range(number)], JAX_ENABLE_X64="1")


def verb(number, *arguments):
    """The processes of a command."""
    address = free_address()
    joined = [["--coordinator", address, "--processes", number, "--process", i] for i in range(number)]
    return started([["-m", "mixer_jax", *arguments, *each] for each in joined])


def rows(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_same_run(run, other):
    """Metrics and weights to 1e-12, relative to the largest of an array."""
    assert len(rows(run)) == len(rows(other)) > STEPS
    for row, expected in zip(rows(run), rows(other)):
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-12)
    for name in ("best", "last"):
        arrays, expected = (read(folder / name, FLOAT64).as_numpy() for folder in (run, other))
        for key, array in arrays.items():
            assert np.abs(array - expected[key]).max() <= 1e-12 * max(np.abs(expected[key]).max(), 1e-30), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process on one device."""
    run = tmp_path_factory.mktemp("alone") / "run"
    ended(started([[__file__, run, "none", "whole"]], JAX_ENABLE_X64="1"))
    return run


def test_a_process_that_dies_ends_the_others_which_name_it_and_one_process_goes_on(alone, tmp_path):
    run = tmp_path / "run"
    survivor, victim = training(run, 2, "data=2", "split")
    while len(rows(run)) < 6 and survivor.poll() is None:
        time.sleep(0.05)
    victim.kill()
    killed_at = time.monotonic()
    ((_, err),) = ended([survivor], code=1)
    assert time.monotonic() - killed_at < 60
    assert "error: process 1 ended, so this one does: what was saved is still there" in err
    assert "Traceback" not in err
    assert b"process 1 of 2 was killed" in victim.communicate()[1]
    assert 0 < max(int(name) for name in os.listdir(run / "states") if name.isdecimal()) < STEPS
    ended(started([[__file__, run, "none", "whole"]], JAX_ENABLE_X64="1"))
    assert_same_run(run, alone)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("number", "mesh", "split"),
    [(2, "none", "whole"), (2, "data=1,model=2", "whole"), (4, "data=4", "split"), (4, "data=2,model=2", "split")],
)
def test_training_is_that_of_one_process(number, mesh, split, alone, tmp_path):
    ended(training(tmp_path / "run", number, mesh, split))
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.heavy
def test_a_state_of_four_processes_is_read_by_one_and_by_two(alone, tmp_path):
    """Each verifies that it has the bits that were written; SIGTERM to one stops all at the same step."""
    children = training(tmp_path / "run", 4, "data=4", "split")
    while not rows(tmp_path / "run"):  # the first evaluation; the step is not compiled yet
        time.sleep(0.05)
    children[2].send_signal(signal.SIGTERM)
    for child in children:
        child.communicate()
    assert max(int(name) for name in os.listdir(tmp_path / "run" / "states") if name.isdecimal()) < STEPS
    for number, mesh in ((1, "none"), (2, "data=1,model=2")):
        shutil.copytree(tmp_path / "run", tmp_path / f"run{number}")
        ended(training(tmp_path / f"run{number}", number, mesh))
        assert_same_run(tmp_path / f"run{number}", alone)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A checkpoint, and 100 images in two folders, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("predict")
    start = Checkpoint.from_arrays(random_weights(CONFIG))
    labels = ("cat", "dog", *"23456789")
    write(folder / "start.npz", start.with_metadata(num_blocks=2, labels=labels, preprocessing="squash"))
    for i in range(100):
        path = folder / "images" / labels[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(9, 9), dtype=np.uint8)).save(path)
    (folder / "images" / "dog" / "051.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_predict_gives_the_bytes_of_one_process(number, photographs, tmp_path):
    line = ["predict", photographs / "start.npz", photographs / "images", "--json", "--features"]
    ((out, err),) = ended(started([["-m", "mixer_jax", *line, tmp_path / "one.npy"]]), code=1)
    texts = ended(verb(number, *line, tmp_path / "several.npy"), code=1)
    assert texts[0] == (out, err)
    assert len(out.splitlines()) == 100
    assert [text for text, _ in texts[1:]] == [""] * (number - 1)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "several.npy").read_bytes()


@pytest.mark.heavy
@pytest.mark.parametrize("options", [[], ["--mesh", "data=1,model=2"]])
def test_evaluate_and_parity_in_two_processes(options, photographs):
    line = ["evaluate", photographs / "start.npz", photographs / "images", "--json"]
    ((out, _),) = ended(started([["-m", "mixer_jax", *line]]), code=1)
    (first, _), (second, _) = ended(verb(2, *line, *options), code=1)
    assert json.loads(first) == json.loads(out)
    assert second == ""
    line = ["parity", photographs / "start.npz", "--b", "numpy", "--count", 2, "--json", "--mesh"]
    (first, _), (second, _) = ended(verb(2, *line, "data=2"))
    assert json.loads(first)["passed"]
    assert second == ""


@pytest.mark.heavy
def test_what_differs_between_processes_is_named_in_all(photographs, tmp_path):
    line = ["-m", "mixer_jax", "finetune", photographs / "start.npz", "digits", "--run", tmp_path / "run", "--preset", "small"]
    address = free_address()
    joined = [["--coordinator", address, "--processes", 2, "--process", i, "--base-rate", 0.01 + i] for i in range(2)]
    for _, err in ended(started([[*line, *each] for each in joined]), code=1):
        assert err.endswith(
            "process 1 has another config than process 0: base_rate is 1.01 and not 0.01: give all processes the same\n"
        )
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
def test_another_list_of_images_is_named_in_all(photographs):
    address = free_address()
    joined = [["--coordinator", address, "--processes", 2, "--process", i] for i in range(2)]
    images = [photographs / "images", photographs / "images" / "cat"]
    lines = [["-m", "mixer_jax", "predict", photographs / "start.npz", each, *to] for each, to in zip(images, joined)]
    for _, err in ended(started(lines), code=1):
        assert "process 1 has another list of images than process 0: number of images is 50 and not 100" in err


def test_a_coordinator_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(joining, "PATIENCE", 1)
    with pytest.raises(CheckpointError, match=r"no coordinator at localhost:\d+: .*: start process 0 there, within 1 s"):
        joining._require_coordinator(free_address())
    with pytest.raises(CheckpointError, match="no coordinator at nowhere: "):
        joining._require_coordinator("nowhere")


def slurm(port, process):
    return {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost"} | {
        f"SLURM_{name}": str(value) for name, value in (("NTASKS", 2), ("PROCID", process), ("LOCALID", process))
    }


def open_mpi(port, process):
    return {"OMPI_MCA_orte_hnp_uri": f"{port << 12}.0;tcp://127.0.0.1:{port}"} | {
        f"OMPI_COMM_WORLD_{name}": str(value) for name, value in (("SIZE", 2), ("RANK", process), ("LOCAL_RANK", process))
    }


@pytest.mark.heavy
@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_the_variables_of_a_cluster_bring_processes_together(cluster, photographs):
    port = int(free_address().rpartition(":")[2])
    line = ["-m", "mixer_jax", "predict", photographs / "start.npz", photographs / "images" / "cat", "--json", "--cluster"]
    children = [child for i in range(2) for child in started([line], **cluster(port, i))]
    (first, _), (second, _) = ended(children)
    assert len(first.splitlines()) == 50
    assert second == ""


@pytest.mark.heavy
def test_without_the_first_process_the_others_end_with_a_line(tmp_path):
    victim, survivor = training(tmp_path / "run", 2)
    while len(rows(tmp_path / "run")) < 3:
        time.sleep(0.05)
    victim.kill()
    killed_at = time.monotonic()
    _, err = survivor.communicate(timeout=100)
    assert time.monotonic() - killed_at < 60
    victim.communicate()
    assert survivor.returncode != 0
    assert "process 1 of 2 was killed, or ended by JAX since another one was lost" in err.decode().splitlines()[-1]


@pytest.mark.heavy
def test_unreadable_images_of_all_processes_are_named_by_the_first(photographs, tmp_path):
    line = ["finetune", photographs / "start.npz", photographs / "images", "--run", tmp_path / "run", "--preset", "small"]
    line += ["--total-steps", 20, "--warmup-steps", 2, "--evaluate-every", 20, "--batch-size", 20]
    (out, _), (other, _) = ended(verb(2, *line))
    assert "not used: dog/051.png: no image in a format that Pillow knows\n1 image could not be used" in out
    assert other == ""


@pytest.mark.heavy
def test_processes_that_do_not_come_are_said(photographs):
    patient = (
        "import sys; from mixer_jax.sharding import joining; joining.PATIENCE = 3; from mixer_jax.__main__ import main; main()"
    )
    line = ["-c", patient, "predict", photographs / "start.npz", photographs / "images"]
    (child,) = started([[*line, "--coordinator", free_address(), "--processes", 2, "--process", 0]])
    _, err = child.communicate(timeout=100)
    assert child.returncode != 0
    assert err.decode().splitlines()[-1].startswith("error: process 0 of 2 was killed, or ended by JAX since another one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "localhost:1"], "needs --coordinator HOST:PORT, --processes N and --process I"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"], "--process 2 is not one of 2 processes"),
        (["--cluster", "--process", "0"], "--cluster finds the other processes by itself"),
        (["--mesh", "data=2", "--implementation", "torch"], "--mesh: is for --implementation flax"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(options, message, photographs, capsys):
    from command_line import run

    assert message in run(capsys, "predict", photographs / "start.npz", photographs / "images", *options, code=2).err


def test_a_mesh_that_does_not_fit_is_one_line(photographs, capsys):
    from command_line import run

    line = ["predict", photographs / "start.npz", photographs / "images", "--mesh"]
    assert "error: mesh data=2,model=1 is not of 1 device" in run(capsys, *line, "data=2", code=1).err
    assert "error: mesh 'rows=1': 'rows' is not data=N or model=N" in run(capsys, *line, "rows=1", code=1).err


def test_one_process_alone_agrees_with_itself():
    assert processes.exchanged({"a": 1}) == [{"a": 1}]
    assert processes.is_first()
    processes.require_equal_everywhere("config", {"a": 1})
    with pytest.raises(CheckpointError, match="as it is"), processes.all_or_none():
        raise CheckpointError("as it is")


if __name__ == "__main__":
    sys.exit(train(*sys.argv[1:]))
