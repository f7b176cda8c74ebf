# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

.PHONY: install demo test quick check format

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	PATH=$(BIN):$$PATH accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no examples/fact_rlhf.py

test: install
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=15

# For whoever changes one thing: two model families, one process, nothing that trains for long.
quick: install
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --families quick -m "not slow and not distributed"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check trl_vlm tests examples benchmarks
	PATH=$(BIN):$$PATH pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format trl_vlm tests examples benchmarks
