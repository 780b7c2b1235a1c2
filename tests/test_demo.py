"""`make demo`: real digits, the converter as a process, both frameworks."""

import re
import subprocess
import sys

import pytest
from conftest import GOLDENS

from mixer_jax.commands import demo

pytestmark = pytest.mark.torch


def run(tmp_path, *arguments):
    command = [sys.executable, "-m", "mixer_jax", "demo", "--folder", tmp_path / "out", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parity_of(out):
    """Relative difference and agreement of classes in per cent, by dtype."""
    rows = re.findall(r"(float\d\d) +\S+ +(\S+) +([\d.]+) %", out)
    return {dtype: (float(relative), float(same)) for dtype, relative, same in rows}


def test_the_demo_trains_converts_and_compares(tmp_path, capfd):
    """With a training that is too short to be good at it."""
    logits = demo.demo(folder=tmp_path / "out", steps=30)
    out = capfd.readouterr().out
    assert logits["float64"][0].shape == (360, 10)
    accuracies = re.findall(r"(Flax|PyTorch) +([\d.]+) %", out)
    assert [name for name, _ in accuracies] == ["Flax", "PyTorch"]
    assert min(float(accuracy) for _, accuracy in accuracies) > 30
    parity = parity_of(out)
    assert parity["float32"][0] < 2e-6
    assert parity["float64"][0] < 1e-13
    assert [same for _, same in parity.values()] == [100, 100]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"digits.npz", "digits.pt"}


def test_the_demo_starts_from_a_released_file(tmp_path):
    """As a process."""
    out = run(tmp_path, GOLDENS["square"].weights_file)
    assert "parity on 4 images of seeded noise" in out
    assert set(parity_of(out)) == {"float32", "float64"}
    assert "accuracy" not in out
    assert (tmp_path / "out" / "google.pt").exists()


@pytest.mark.heavy
def test_the_recipe_of_the_demo_reaches_97_percent(tmp_path):
    out = run(tmp_path)
    accuracies = [float(accuracy) for accuracy in re.findall(r"(?:Flax|PyTorch) +([\d.]+) %", out)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 97
