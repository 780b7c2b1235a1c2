"""Parity on every device there is, and that no other test may be skipped as if for want of one."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product

import devices
import pytest
from conftest import GOLDENS, HERE, TINY, random_images, random_weights
from implementations import checkpoint

from mixer_jax.parity.comparison import compare
from mixer_jax.parity.implementations import Implementation

NUMPY = Implementation.parse("numpy")
SQUARE = str(GOLDENS["square"].weights_file)


def on(library, device):
    return pytest.mark.device(library, device)


def pair(here, there):
    return pytest.param(here, there, marks=[on("flax", here), on("torch", there)], id=f"flax:{here}-torch:{there}")


def parity(a, b, **options):
    return compare(checkpoint(random_weights(TINY), TINY), random_images(TINY), a, b, **options)


# The figures are fractions of the tolerance measured on the CPU: of the logits, and the largest of an operation.
@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "precision"), devices.SETTINGS)  # 0.47, 0.43 in float32; 0.24, 0.31 in bfloat16
@pytest.mark.parametrize(("here", "there"), [pair(*names) for names in product(*devices.DEVICES.values())])
def test_flax_and_pytorch_agree_on_every_pair_of_devices(here, there, dtype, precision):
    comparison = parity(Implementation("flax", here, dtype, precision), Implementation("torch", there, dtype, precision))
    assert comparison.passed, comparison.first


@pytest.mark.parametrize("device", [pytest.param(d, marks=on("flax", d)) for d in ("cpu", "gpu", "tpu")])
def test_flax_agrees_with_the_numpy_model_in_float32_and_would_not_in_bfloat16(device):
    comparison = parity(NUMPY, Implementation("flax", device))  # 0.22, 0.37 on the CPU
    assert comparison.passed, comparison.first
    run = Implementation("flax", device, "bfloat16", "default").open(checkpoint(random_weights(TINY), TINY))
    first = parity(NUMPY, Implementation("flax", device), runs=(None, run)).first  # under the name of float32
    assert first.operation.name == "stem"


def child(folder, *tests):
    """pytest in a process of its own, which sees no device but the CPU, on tests under our rule for skips."""
    shutil.copy(HERE / "conftest.py", folder)
    (folder / "test_child.py").write_text("import pytest\n" + "\n".join(tests))
    options = ("-rs", "-c", HERE.parent / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider")
    command = list(map(str, (sys.executable, "-m", "pytest", *options, folder)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout


ABSENT = "@pytest.mark.device('flax', 'gpu')\ndef test_absent(): assert False\n"
PRESENT = "@pytest.mark.device('flax', 'cpu')\ndef test_present(): pytest.skip('a device is absent')\n"
ORDINARY = "def test_ordinary(): pytest.skip('absent')\n"
UNKNOWN = "@pytest.mark.device('flax', 'gpo')\ndef test_unknown(): pass\n"


def test_an_absent_device_is_skipped_by_name_with_what_stays_unproved(tmp_path):
    code, output = child(tmp_path, ABSENT, "def test_other(): pass\n")
    assert code == 0, output
    assert "unproved on flax:gpu: JAX: " in output
    assert "1 passed, 1 skipped" in output


def test_no_other_skip_passes_for_an_absent_device(tmp_path):
    code, output = child(tmp_path, ABSENT, PRESENT, ORDINARY, UNKNOWN)
    assert code == 1
    lines = [line for line in output.splitlines() if line.startswith("skipped without leave")]
    assert [line.split("::")[1] for line in lines] == ["test_present", "test_ordinary"]
    assert "ValueError: no such device: flax:gpo" in output


@pytest.mark.torch
def test_the_report_of_all_devices_lists_what_was_run_and_what_stays_unproved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "SETTINGS", (("float32", "highest"),))
    monkeypatch.setattr(devices, "absent", lambda name, device: None if device == "cpu" else f"no {device} for {name}")
    out = tmp_path / "all.json"
    assert devices.main([SQUARE, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (report,) = result["reports"]
    assert report["implementations"] == ["flax:cpu:float32:highest", "torch:cpu:float32:highest"]
    assert report["passed"]
    assert len(result["unproved"]) == 5
    assert "flax:tpu against torch:gpu: no tpu for flax; no gpu for torch" in result["unproved"]
    page = (tmp_path / "all.html").read_text()
    assert all(line in page for line in (report["verdict"], *result["unproved"]))
    assert capsys.readouterr().out.count("unproved: ") == 5
    assert devices.main([SQUARE, "--out", str(out)]) == 1
    assert "exists already (replace it with --force" in capsys.readouterr().err


def test_a_report_of_no_device_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "absent", lambda name, device: f"no {device}")
    with pytest.raises(SystemExit, match="1"):
        devices.main([SQUARE, "--out", str(tmp_path / "all.json")])


@pytest.mark.torch
def test_the_reason_why_a_device_is_absent_is_one_line():
    assert devices.absent("flax", "cpu") is None
    assert "\n" not in (devices.absent("flax", "gpu") or "")
    assert devices.absent("torch", "tpu") == "PyTorch finds no tpu here"


def test_make_verify_goes_from_the_file_to_the_report():
    def make(*arguments):
        return subprocess.run(["make", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)

    assert "usage: make verify WEIGHTS=Mixer-B_16.npz" in make("verify").stderr
    output = make("--dry-run", "--old-file=.venv/installed", "verify", "WEIGHTS=w.npz").stdout
    commands = ["convert inspect w.npz", "parity w.npz --explain --html verify.html"]
    assert [output.index(command) for command in commands] == sorted(output.index(command) for command in commands)
