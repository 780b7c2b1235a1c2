# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LATEST := .venv-latest/bin
H100 := .venv-h100/bin
PEERS := .venv-peers/bin
WITH_H100 = $(if $(wildcard $(H100)/python),--h100-python $(H100)/python)

.PHONY: demo test test-heavy test-latest test-h100 parity-devices verify bench bench-quick bench-compiled picture lint format clean

demo: .venv/installed  ## train on digits, convert, compare; WEIGHTS=Mixer-B_16.npz starts from a released file
	$(BIN)/python -m mixer_jax demo $(WEIGHTS)

test: .venv/installed  ## the whole suite, save for what takes minutes
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-heavy: .venv/installed  ## what takes minutes or gigabytes
	$(BIN)/python -m pytest -m heavy

test-latest: .venv-latest/installed  ## the newest JAX and Flax on the newest Python found, without PyTorch
	WITHOUT_TORCH=1 $(LATEST)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-h100: .venv-h100/installed  ## what an H100 would be given to run; 5 GB of packages, no GPU
	$(H100)/python -m pytest -m h100 tests/test_compiled.py

parity-devices: .venv/installed  ## every device here against every other; writes parity-devices.json and .html to attach
	$(BIN)/python benchmarks/devices.py $(WEIGHTS) --force

verify: $(if $(WEIGHTS),.venv/installed)  ## fingerprint, self-test and parity of WEIGHTS=Mixer-B_16.npz
	$(if $(WEIGHTS),,$(error usage: make verify WEIGHTS=Mixer-B_16.npz))
	$(BIN)/python -m convert inspect $(WEIGHTS)
	$(BIN)/python -m mixer_jax parity $(WEIGHTS) --self-test
	$(BIN)/python -m mixer_jax parity $(WEIGHTS) --explain --html verify.html --force

bench: .venv/installed .venv-peers/installed  ## every figure beside its peers', most of an hour; the chart of the README
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/conversion.py --json benchmarks/results/conversion.json
	$(BIN)/python benchmarks/predict.py --json benchmarks/results/predict.json
	$(BIN)/python benchmarks/compiled.py --json benchmarks/results/compiled.json $(WITH_H100)
	$(BIN)/python benchmarks/chart.py

bench-quick: .venv/installed  ## a small model, no peers' environment: whether all sides agree
	$(BIN)/python benchmarks/run.py --quick

bench-compiled: .venv/installed  ## programs for TPU v5e, and for an H100 where test-h100 has installed its packages
	$(BIN)/python benchmarks/compiled.py $(WITH_H100)

picture: .venv/installed  ## docs/token-mixing.png: train a small Mixer on two photographs, draw its units
	$(BIN)/python benchmarks/picture.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt pyproject.toml .ci/install_libtpu.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixer-jax needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python .ci/install_libtpu.py
	touch $@

.venv-latest/installed: pyproject.toml .ci/newest_python.py
	rm -rf .venv-latest
	"$$($(PYTHON) .ci/newest_python.py)" -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(LATEST)/python .ci/install_libtpu.py
	$(LATEST)/python -c 'import sys, jax, flax; print("Python", sys.version.split()[0], "JAX", jax.__version__, "Flax", flax.__version__)'
	touch $@

.venv-peers/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --requirement benchmarks/requirements.txt
	touch $@

.venv-h100/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-h100
	$(H100)/python -m pip install --quiet --constraint requirements.txt 'jax[cuda12]' --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-h100 .venv-peers build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache
