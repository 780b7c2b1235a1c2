"""Command lines, in this process and in one of their own."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys

import pytest


def main(*arguments, module="mixer_jax"):
    """The exit code of a command line in this process: faster than one of its own, and the same code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return importlib.import_module(f"{module}.__main__").main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def run(capture, *arguments, code=0, module="mixer_jax"):
    """What a command line in this process writes, as `out` and `err`."""
    with pytest.raises(SystemExit, match="2") if code == 2 else contextlib.nullcontext():
        assert main(*arguments, module=module) == code
    return capture.readouterr()


def process(*arguments, code=0, python=("-m", "mixer_jax"), **options):
    """Standard output and standard error of a command line in a process of its own."""
    line = [sys.executable, *python, *(item if isinstance(item, bytes) else str(item) for item in arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # else JAX may report missing devices on standard error
    done = subprocess.run(line, capture_output=True, check=False, env=environment, **options)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, err + out
    assert "Traceback" not in err
    return out, err
