# Everything on a bare machine with Python 3.11+: each target makes its own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Waiting threads soon sleep: next to a busy program, PyTorch is up to nine times faster that way.
export GOMP_SPINCOUNT ?= 3000
# Compiled modules are kept, whatever the environment says: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo studio test soak matrix check format bench setup

demo: .venv/installed ## generate three clips with the model in the box, into out/
	$(BIN)/python examples/demo.py

studio: .venv/web ## generate clips on a page in a browser
	$(BIN)/cogvideo studio

test: setup ## run the tests, except those that take minutes
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not soak"

soak: setup ## run the tests that take minutes: the demo, the whole training chain, a Ray cluster
	$(BIN)/python -m pytest -n auto -m soak

matrix: ## run the tests on the oldest and the newest Python, each with the oldest and the newest dependencies
	scripts/matrix.sh -n auto --dist worksteal -m "not soak"

check: setup ## run the checks of continuous integration: style, types, parity
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.parity tests/golden

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure, about 20 minutes on two cores; writes benchmarks/results/ (on a GPU also: benchmarks.cuda)
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.evaluate

setup: .venv/ready

.venv/ready: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

.venv/web: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[web]"
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cogvideo needs Python 3.11 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@
