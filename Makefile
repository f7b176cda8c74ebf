# `make demo` and `make test` do everything on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
LOWEST := .venv-lowest
LOWEST_BIN := $(CURDIR)/$(LOWEST)/bin
TORCHVISION := $(CURDIR)/.torchvision
QUICK := pytest -n 2 --dist loadfile --families quick

.PHONY: install demo test nightly quick test-lowest test-torchvision check format docs release-check upstream

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	PATH=$(BIN):$$PATH accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no examples/fact_rlhf.py

test: install
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=15 -m "not nightly"

# What would take `make test` over fifteen minutes on two cores.
nightly: install
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=15 -m nightly

# For whoever changes one thing: two model families, one process, nothing that trains for long.
quick: install
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 $(QUICK) -m "not slow and not distributed"

# The same with the oldest releases that pyproject.toml allows, in an environment of its own.
test-lowest: $(LOWEST)/.installed
	PATH=$(LOWEST_BIN):$$PATH OMP_NUM_THREADS=1 $(QUICK) -m "not slow and not distributed"

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST_BIN)/python -m pip install --quiet --upgrade pip
	$(LOWEST_BIN)/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

# What runs once per model family, with torchvision, and the family that needs it (mistral3). It is installed beside the
# environment, so that the other targets go without.
test-torchvision: install $(TORCHVISION)/.installed
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 TORCHVISION_STAND_IN=$(TORCHVISION) $(QUICK) \
		-m "family_grid and not slow and not distributed" tests/models tests/trainers tests/data tests/test_families.py
	PATH=$(BIN):$$PATH OMP_NUM_THREADS=1 TORCHVISION_STAND_IN=$(TORCHVISION) pytest -n 2 --dist loadfile -k mistral3 \
		-m "not slow and not distributed" tests/models tests/trainers

$(TORCHVISION)/.installed: Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TORCHVISION) 'torchvision==0.28.*'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check trl_vlm tests examples benchmarks
	PATH=$(BIN):$$PATH pyright -p .

# The site of docs/, below site/. NO_MKDOCS_2_WARNING: an advertisement for another program.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What a release must pass, from `python -m build` to `trl-vlm demo` in a clean environment: `make release-check PYTHON=python3.13`.
release-check:
	.ci/release-check $(PYTHON)

# The contracts with the newest TRL, transformers and PEFT: which one broke? A scheduled job runs it.
upstream:
	$(PYTHON) .ci/upstream.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format trl_vlm tests examples benchmarks
