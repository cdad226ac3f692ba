# `make mnist` trains on handwritten digits, `make test` runs the tests. Both create .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: mnist test lint types bench docs wheel clean

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

mnist: $(VENV)/.installed
	$(BIN)/python examples/mnist.py $(ARGS)
	@echo "(curves: $(BIN)/tensorboard --logdir runs; to continue the run: make mnist ARGS=--resume)"

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html
	@echo "(open docs/_build/html/index.html)"

wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
