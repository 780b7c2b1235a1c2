"""A batch sharded over a mesh of eight simulated devices, with explicit and with automatic axes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    script = Path(__file__).with_name("mesh.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_way_to_call_a_model_on_a_mesh_gives_the_logits_and_the_step_of_one_device(rows):
    called = [row for row in rows if "way" in row]
    assert len(called) == 2 * 3 * 5
    assert max(row["error"] for row in called) <= 1e-12  # measured: 1e-15


def test_the_batch_stays_sharded(rows):
    assert {row["shards"] for row in rows if row.get("way", "step") != "step"} == {8}


def test_a_compiled_forward_gathers_nothing(rows):
    assert [row["collectives"] for row in rows if "collectives" in row] == [[], []]
