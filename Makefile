# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LATEST := .venv-latest/bin

.PHONY: demo test test-heavy test-latest bench lint format clean

demo: .venv/installed  ## train on digits, convert, compare; WEIGHTS=Mixer-B_16.npz starts from a released file
	$(BIN)/python -m mixer_jax demo $(WEIGHTS)

test: .venv/installed  ## the whole suite, save for what takes minutes
	$(BIN)/python -m pytest

test-heavy: .venv/installed  ## what takes minutes or gigabytes
	$(BIN)/python -m pytest -m heavy

test-latest: .venv-latest/installed  ## the newest JAX and Flax on the newest Python found, without PyTorch
	WITHOUT_TORCH=1 $(LATEST)/python -m pytest

bench: .venv/installed  ## memory and time of conversions, some minutes
	$(BIN)/python benchmarks/conversion.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixer-jax needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv-latest/installed: pyproject.toml .ci/newest_python.py
	rm -rf .venv-latest
	"$$($(PYTHON) .ci/newest_python.py)" -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(LATEST)/python -c 'import sys, jax, flax; print("Python", sys.version.split()[0], "JAX", jax.__version__, "Flax", flax.__version__)'
	touch $@

clean:
	rm -rf .venv .venv-latest build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache
