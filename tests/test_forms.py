"""What ordinary scripts write is read, and equal, or refused with a message."""

import os
import re
import subprocess
import sys

import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from forms import FORMS
from written_by_jax import AVERAGE, AVERAGE_PARAMS, FRESH, PARAMS, TREES, WEIGHTS, WIDE, model, with_average

import convert
from convert import Checkpoint, CheckpointError
from convert.commands import inspect_file
from convert.identity import fingerprint
from convert.layouts import GOOGLE

NAMES = [pytest.param(name, marks=pytest.mark.torch) if form.torch else name for name, form in FORMS.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_form_is_read_and_equal_or_refused(tmp_path, name):
    form = FORMS[name]
    path = form.write(tmp_path)
    if form.refused:
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}(?s:.*){form.refused}"):
            convert.read(path, form.options)
        return
    facts = inspect_file(path, reading=form.options)
    assert facts["fingerprint"] == fingerprint(form.expected.arrays, form.expected.layout)
    if form.beside is not None:
        listed = facts["also in the file"]
        assert {entry.split(" ")[0].split("/")[-1] for entry in listed if listed != "nothing"} == form.beside


def test_there_are_more_than_sixty_forms_and_wrong_weights_would_be_noticed():
    assert len(FORMS) >= 60
    assert 10 < sum(bool(form.refused) for form in FORMS.values()) < len(FORMS) / 2
    prints = {fingerprint(weights, GOOGLE) for weights in (WEIGHTS, AVERAGE, FRESH)}
    assert len(prints) == 3


def test_arrays_that_four_devices_share_are_read_whole(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = "import pathlib, sys; from written_by_jax import sharded; sharded(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, check=True, capture_output=True)
    wanted = Checkpoint.from_arrays(WIDE)
    assert len(list((tmp_path / "zarr").rglob("params.head.kernel/?.?"))) == 4  # it was shared
    for name in ("ocdbt/state", "zarr/state", "big_vision"):
        checkpoint = convert.read(tmp_path / name)
        assert fingerprint(checkpoint.arrays, checkpoint.layout) == fingerprint(wanted.arrays, wanted.layout), name


IN_MEMORY = {name: build for name, (build, _) in TREES.items()} | {
    "tuple-keyed flat dict": lambda: flatten_dict({"params": PARAMS}),
    "dict of nnx.to_flat_state": lambda: dict(nnx.to_flat_state(nnx.state(model()))),
    "nnx.state": lambda: nnx.state(model()),
    "nnx.state, unstacked": lambda: nnx.state(model().unstacked()),
    "nnx.state of parameters": lambda: nnx.state(model(), nnx.Param),
    "nnx.split with dropout": lambda: nnx.split(model(dropout_rate=0.1, rngs=nnx.Rngs(0)))[1],
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_tree_in_memory_is_taken_as_it_is(name):
    checkpoint, wanted = Checkpoint.from_arrays(IN_MEMORY[name]()), Checkpoint.from_arrays(WEIGHTS)
    assert fingerprint(checkpoint.arrays, checkpoint.layout) == fingerprint(wanted.arrays, wanted.layout)


def test_of_two_sets_in_memory_one_needs_a_key():
    with pytest.raises(CheckpointError, match="several sets of weights, ema_params, params: say which"):
        Checkpoint.from_arrays(with_average())
    average = Checkpoint.from_arrays(with_average(), key="ema_params")
    wanted = Checkpoint.from_arrays({"params": AVERAGE_PARAMS})
    assert fingerprint(average.arrays, average.layout) == fingerprint(wanted.arrays, wanted.layout)
