"""The benchmarks in their quick form, as processes: sides must agree before anything is timed. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ROOT / "benchmarks" / "run.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, RUN, "--quick", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.torch
def test_all_sides_of_a_forward_pass_agree_and_are_timed(tmp_path):
    done = run("forward", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "forward.json").read_text())
    assert {row["side"] for row in found["rows"]} == {"ours", "nnx_jit", "linen", "twin"}
    for row in found["rows"]:
        assert row["largest_difference"] <= 1e-5  # 4.5e-7 measured
        assert row["median_s"] > 0
        assert row["versions"]["numpy"]
    assert found["machine"]["threads"] == os.cpu_count()
    assert found["machine"]["device"].startswith("CPU")


@pytest.mark.torch
@pytest.mark.parametrize("side", ["linen", "twin"])
def test_a_side_that_computes_something_else_stops_the_run_before_it_is_timed(tmp_path, side):
    done = run("forward", "--results", tmp_path, "--plant", side)
    assert done.returncode == 1
    assert f"error: forward: logits differ by more than 1e-05 of the largest: {side} by" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_does_not_exist_is_a_usage_error(tmp_path):
    done = run("backward", "--results", tmp_path)
    assert done.returncode == 2
    assert "no part is called backward: there are forward, bfloat16" in done.stderr


def test_a_second_process_compiles_nothing(tmp_path):
    """Where JAX's persistent compilation cache is on."""
    done = run("cache", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cache.json").read_text())
    first, second = found["rows"]
    assert first["cache_hits"] == 0
    assert first["cache_misses"] > 0
    assert second["cache_hits"] == first["cache_misses"]
    assert second["cache_misses"] == 0


def test_training_steps_of_both_formulations_give_the_same_losses(tmp_path):
    done = run("train", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert {row["side"] for row in rows} == {"ours", "ours, remat", "linen"}
    assert all(row["largest_difference"] <= 1e-4 for row in rows)  # 0 measured
