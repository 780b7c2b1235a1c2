"""The README does what it says: its commands and its Python are run, its tables are those that a run wrote."""

import functools
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import random_weights
from PIL import Image
from sides import checkpoint

import convert
from convert import MixerConfig
from convert.published import PUBLISHED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What a released file is to the commands, in small: patches and classes of Mixer-B/16.
SMALL = MixerConfig(
    patch_size=(16, 16),
    image_size=(224, 224),
    num_blocks=2,
    hidden_dim=24,
    tokens_mlp_dim=20,
    channels_mlp_dim=28,
    num_classes=1000,
)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would be: a weight file, photographs, and two classes of ImageNet's validation images."""
    folder = tmp_path_factory.mktemp("readme")
    convert.write(folder / "Mixer-B_16.npz", checkpoint(random_weights(SMALL), SMALL), layout="google")
    random = np.random.default_rng(0)
    photographs = ["cat.jpg", "holiday/1.jpg", "holiday/2.png", "imagenet/val/n01440764/1.jpg", "imagenet/val/n01443537/2.jpg"]
    for name in photographs:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (300, 400, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A server on loopback with a file of the published size, filled with nothing."""
    folder = tmp_path_factory.mktemp("mirror")
    config = MixerConfig.named("B/16")
    arrays = {name: np.zeros_like(array) for name, array in random_weights(config).items()}
    path = folder / PUBLISHED["imagenet1k/Mixer-B_16"].file
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.torch
def test_every_command_runs(folder, mirror, tmp_path):
    """In order, as one reads: later ones need what earlier ones wrote."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MIXER_JAX_BASE_URL": mirror,
        "MIXER_JAX_CACHE": str(tmp_path / "cache"),
        "no_proxy": "*",
        "PYTHONPATH": str(ROOT),
    }
    assert len(COMMANDS) >= 15
    for line in COMMANDS:
        python, *arguments = shlex.split(line, comments=True)
        assert python == "python", line
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout, line
    written = {"mixer_b16.pt", "mixer", "big.safetensors", "parity.html", "confusion.png", "tokens.png", "stem.png"}
    assert written <= {path.name for path in folder.iterdir()}
    assert (tmp_path / "cache" / "imagenet1k" / "Mixer-B_16.npz").stat().st_size == 239_567_448


@pytest.mark.torch
def test_the_python_runs_and_says_true_shapes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["images"].shape == (1, 224, 224, 3)
    assert scope["logits"].shape == (1, 1000)
    assert scope["state"]["head.weight"].shape == (2, 24)
    assert scope["params"]["params"]["stem"]["kernel"].shape == (16, 16, 3, 24)
    assert (folder / "mixer.safetensors").exists()


def test_a_command_that_fails_is_noticed(folder):
    """What the test of the commands rests on."""
    command = [sys.executable, "-m", "convert", "inspect", "no-such-file.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1


def test_the_parity_tables_are_those_that_a_run_wrote():
    from parity import tables

    results = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
    assert tables(results) in README
    assert all(row["passed"] for row in results["measured"])


def test_the_tables_of_speed_are_those_that_runs_wrote():
    from chart import table, table_of_work
    from compiled import tables

    results = ROOT / "benchmarks" / "results"
    assert table(results) in README
    assert table_of_work(results) in README
    assert tables(json.loads((results / "compiled.json").read_text())) in README


def test_every_published_file_is_listed():
    assert all(f"`{name}`" in README for name in PUBLISHED)


def test_what_the_readme_shows_is_there():
    for name in re.findall(r'src="([^"]+)"|\]\((docs/[^)]+)\)', README):
        assert (ROOT / (name[0] or name[1])).is_file(), name
    for target in re.findall(r"make ([a-z0-9-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
