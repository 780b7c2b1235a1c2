"""`make demo`, whole: real digits, the converter as a process, both frameworks."""

import re
import subprocess
import sys

import pytest
from conftest import GOLDENS

pytestmark = pytest.mark.torch


def demo(tmp_path, *arguments):
    command = [sys.executable, "-m", "mixer_jax", "demo", "--folder", tmp_path / "out", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_demo_trains_converts_and_compares(tmp_path):
    said = demo(tmp_path)
    accuracies = [float(found) for found in re.findall(r"(?:Flax|PyTorch) +([\d.]+)%", said)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 97
    parity = {name: (float(d), float(same)) for name, d, same in re.findall(r"(float\d\d) +\S+ +(\S+) +([\d.]+)%", said)}
    assert parity["float32"][0] < 2e-6
    assert parity["float64"][0] < 1e-13
    assert [same for _, same in parity.values()] == [100, 100]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"digits.npz", "digits.pt"}


def test_the_demo_takes_a_released_file_from_the_conversion_on(tmp_path):
    said = demo(tmp_path, GOLDENS["square"].weights_file)
    assert "parity on 4 images of seeded noise" in said
    assert "accuracy" not in said
    assert (tmp_path / "out" / "google.pt").exists()
