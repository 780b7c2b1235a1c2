# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LATEST := .venv-latest/bin
H100 := .venv-h100/bin
PEERS := .venv-peers/bin
PYTEST = -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
WITH_H100 = $(if $(wildcard $(H100)/python),--h100-python $(H100)/python)

.PHONY: demo test test-heavy test-latest test-h100 parity-devices verify finetune-cifar10 bench bench-quick bench-ahead-of-time published picture lint format clean

demo: .venv/installed  ## train on digits, convert, compare; WEIGHTS=Mixer-B_16.npz starts from a released file
	$(BIN)/python -m mixer_jax demo $(WEIGHTS)

test: .venv/installed  ## the whole suite, save for what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-heavy: .venv/installed  ## what takes minutes or gigabytes
	$(BIN)/python -m pytest -m heavy

test-latest: .venv-latest/installed  ## the newest JAX and Flax on the newest Python found, without PyTorch
	WITHOUT_TORCH=1 OMP_NUM_THREADS=1 $(LATEST)/python $(PYTEST)

test-h100: .venv-h100/installed  ## compile for an H100 and test the program; 5 GB of packages, no GPU needed
	$(H100)/python -m pytest -m h100 tests/test_ahead_of_time.py

parity-devices: .venv/installed  ## compare all devices of this machine; writes parity-devices.json and .html
	$(BIN)/python benchmarks/devices.py $(WEIGHTS) --force

verify: $(if $(WEIGHTS),.venv/installed)  ## fingerprint and parity of WEIGHTS=Mixer-B_16.npz
	$(if $(WEIGHTS),,$(error usage: make verify WEIGHTS=Mixer-B_16.npz))
	$(BIN)/python -m convert inspect $(WEIGHTS)
	$(BIN)/python -m mixer_jax parity $(WEIGHTS) --explain --html verify.html --force

finetune-cifar10: .venv/installed  ## the official fine-tuning of WEIGHTS=Mixer-B_16.npz on DATA=cifar-10-batches-bin, to 96.72 %
	$(if $(and $(WEIGHTS),$(DATA)),,$(error usage: make finetune-cifar10 WEIGHTS=Mixer-B_16.npz DATA=cifar-10-batches-bin))
	$(BIN)/python -m mixer_jax finetune $(WEIGHTS) $(DATA) --run finetune-cifar10 --preset official --validation 0.02 \
		--accumulation 8 --momentum-dtype bfloat16 $(OPTIONS)

bench: .venv/installed .venv-peers/installed  ## measure everything beside its peers, and draw the chart; about two hours
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/conversion.py --json benchmarks/results/conversion.json
	$(BIN)/python benchmarks/predict.py --json benchmarks/results/predict.json
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/packed.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/ahead_of_time.py --json benchmarks/results/ahead_of_time.json $(WITH_H100)
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/learn.py
	$(BIN)/python benchmarks/chart.py

bench-quick: .venv/installed  ## check on a small model that all implementations agree
	$(BIN)/python benchmarks/run.py --quick

bench-ahead-of-time: .venv/installed  ## compile for a TPU v5e, and for an H100 after make test-h100
	$(BIN)/python benchmarks/ahead_of_time.py $(WITH_H100)
	$(BIN)/python benchmarks/memory.py

published: .venv/installed .venv-peers/installed  ## open published folders with timm and transformers: logits and pixels beside ours
	$(BIN)/python benchmarks/published.py --json benchmarks/results/published.json

picture: .venv/installed  ## train a small Mixer on two photographs and draw its units: docs/token-mixing.png
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
