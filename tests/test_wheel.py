"""The wheel: built, installed into an empty environment without the checkout, and run there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import GOLDENS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".venv*", ".git", "build", "*.egg-info", "tests", "demo-output", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source, python=sys.executable)
    (built,) = target.iterdir()
    return built


def pip(*arguments, python):
    done = subprocess.run([python, "-m", "pip", "-q", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_both_packages_and_their_types_are_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("convert/py.typed", "mixer_jax/py.typed", "convert/formats/npz.py", "mixer_jax/model.py"):
        assert name in names
    assert {f"mixer_jax/data/{name}" for name in ("README.md", "imagenet1k.tsv", "imagenet21k.tsv")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.heavy
def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    bin = tmp_path / "empty" / "bin"
    # The same versions as here, so that this row tests one set of them.
    frozen = subprocess.run([sys.executable, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True)
    pins = [line for line in frozen.stdout.splitlines() if "==" in line and not line.startswith(("mixer", "pip=="))]
    (tmp_path / "constraints.txt").write_text("\n".join(pins))
    pip("install", "--constraint", tmp_path / "constraints.txt", wheel, python=bin / "python")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    square = tmp_path / "google.npz"
    square.write_bytes(GOLDENS["square"].weights_file.read_bytes())
    assert str(tmp_path) in run(bin / "python", "-c", "import mixer_jax, convert; print(mixer_jax.__file__, convert.__file__)")
    assert "timm layout" in run(bin / "python", "-m", "convert", "npz2timm", square, tmp_path / "w.safetensors")
    assert "google layout" in run(bin / "mixer-convert", "timm2npz", tmp_path / "w.safetensors", tmp_path / "back.npz")
    assert (tmp_path / "back.npz").read_bytes() == square.read_bytes()
    assert "59,880,472" in run(bin / "mixer-jax", "summary", "B/16")
    load = "import mixer_jax, numpy as np; print(mixer_jax.load('google.npz')(np.ones((1, 20, 20, 3), 'float32')).shape)"
    assert run(bin / "python", "-c", load).strip() == "(1, 7)"
    refused = subprocess.run(
        [bin / "mixer-convert", "npz2torch", square, tmp_path / "w.pt"], env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr == "error: reading and writing .pt needs PyTorch: pip install 'mixer-jax[torch]'\n"
