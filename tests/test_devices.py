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
from sides import checkpoint

from mixer_jax.parity import Side, compare


def on(library, device):
    return pytest.mark.device(library, device)


def both(here, there):
    return pytest.param(here, there, marks=[on("flax", here), on("torch", there)], id=f"flax:{here}-torch:{there}")


def parity(a, b, **options):
    return compare(checkpoint(random_weights(TINY), TINY), random_images(TINY), a, b, **options)


# Shares of the budget measured on the CPU are beside each setting: of the logits, and the largest of an operation.
@pytest.mark.torch
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("float32", "highest"),  # 0.47, 0.43
        ("float32", "high"),  # the same
        ("float32", "default"),  # the same
        ("bfloat16", "default"),  # 0.24, 0.31
    ],
)
@pytest.mark.parametrize(("here", "there"), [both(*pair) for pair in product(("cpu", "gpu", "tpu"), ("cpu", "gpu"))])
def test_flax_and_the_twin_agree_on_every_pair_of_devices(here, there, dtype, precision):
    report = parity(Side("flax", here, dtype, precision), Side("torch", there, dtype, precision))
    worst = max(max(operation.share) for operation in report.operations)
    print(f"{report.a}, {report.b}: {report.share:.2f} of the budget, {worst:.2f} of an operation's")
    assert report.passed, report.first


@pytest.mark.parametrize("device", [pytest.param(name, marks=on("flax", name)) for name in ("cpu", "gpu", "tpu")])
def test_flax_on_every_device_is_the_referee_in_float32(device):
    report = parity(Side.parsed("referee"), Side("flax", device))  # 0.22, 0.37 on the CPU
    assert report.passed, report.first


@pytest.mark.parametrize("device", [pytest.param(name, marks=on("flax", name)) for name in ("cpu", "gpu", "tpu")])
def test_a_device_that_computes_with_fewer_digits_than_it_says_is_found_out(device):
    """bfloat16 under the name of float32."""
    weights = checkpoint(random_weights(TINY), TINY)
    run = Side("flax", device, "bfloat16", "default").open(weights)
    report = parity(Side.parsed("referee"), Side("flax", device), runs=(None, run))
    assert not report.passed
    assert report.first.operation == "stem"


def child(folder, *tests):
    """pytest in a process of its own, which sees no device but the CPU, on tests under our rule for skips."""
    shutil.copy(HERE / "conftest.py", folder)
    (folder / "test_child.py").write_text("import pytest\n" + "\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-rs", "-c", HERE.parent / "pyproject.toml", "--rootdir", folder, folder]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider"], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stdout


ABSENT = "@pytest.mark.device('flax', 'gpu')\ndef test_absent(): assert False\n"
PRESENT = "@pytest.mark.device('flax', 'cpu')\ndef test_present(): pytest.skip('a device is absent')\n"
ORDINARY = "def test_ordinary(): pytest.skip('absent')\n"
UNKNOWN = "@pytest.mark.device('flax', 'gpo')\ndef test_unknown(): pass\n"


def test_an_absent_device_is_skipped_by_name_with_what_stays_unproved(tmp_path):
    code, said = child(tmp_path, ABSENT, "def test_other(): pass\n")
    assert code == 0, said
    assert "unproved on flax:gpu: JAX: " in said
    assert "1 passed, 1 skipped" in said


def test_no_other_skip_passes_for_an_absent_device(tmp_path):
    code, said = child(tmp_path, ABSENT, PRESENT, ORDINARY, UNKNOWN)
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("skipped without leave")]
    assert [line.split("::")[1] for line in lines] == ["test_present", "test_ordinary"]
    assert "ValueError: no such device: flax:gpo" in said


@pytest.mark.torch
def test_the_report_of_all_devices_says_what_was_run_and_what_stays_unproved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "SETTINGS", (("float32", "highest"),))
    monkeypatch.setattr(devices, "absent", lambda name, device: None if device == "cpu" else f"no {device} for {name}")
    out = tmp_path / "all.json"
    assert devices.main([str(GOLDENS["square"].weights_file), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(report["sides"], report["passed"]) for report in found["reports"]] == [
        (["flax:cpu:float32:highest", "torch:cpu:float32:highest"], True)
    ]
    assert len(found["unproved"]) == 5
    assert "flax:tpu against torch:gpu: no tpu for flax; no gpu for torch" in found["unproved"]
    page = (tmp_path / "all.html").read_text()
    assert all(line in page for line in (found["reports"][0]["verdict"], *found["unproved"]))
    assert capsys.readouterr().out.count("unproved: ") == 5
    assert devices.main([str(GOLDENS["square"].weights_file), "--out", str(out)]) == 1
    assert "exists already (replace it with --force" in capsys.readouterr().err


def test_a_report_of_no_device_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "absent", lambda name, device: f"no {device}")
    with pytest.raises(SystemExit, match="1"):
        devices.main([str(GOLDENS["square"].weights_file), "--out", str(tmp_path / "all.json")])


def test_what_is_absent_is_told_in_one_line():
    assert devices.absent("flax", "cpu") is None
    assert "\n" not in (devices.absent("flax", "gpu") or "")


@pytest.mark.device("flax", "cpu")
@pytest.mark.torch
def test_pytorch_on_a_tpu_is_absent():
    assert devices.absent("torch", "tpu") == "PyTorch finds no tpu here"


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)


def test_make_verify_asks_for_weights():
    done = make("verify")
    assert done.returncode == 2
    assert "usage: make verify WEIGHTS=Mixer-B_16.npz" in done.stderr


def test_make_verify_goes_from_the_file_to_the_report():
    said = make("--dry-run", "--old-file=.venv/installed", "verify", "WEIGHTS=w.npz").stdout
    wanted = ["convert inspect w.npz", "parity w.npz --self-test", "parity w.npz --explain --html verify.html"]
    assert [said.index(command) for command in wanted] == sorted(said.index(command) for command in wanted)
