# Every target sets up what it needs: python3 (3.11 or newer) and make are enough. A stamp in the virtual environment
# says what is installed there; it is made anew when pyproject.toml changes.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test parity lint format gpu-test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.plot  ## find a fact in a long text, dense and with RaBitQ side by side; DEMO_ARGS='--key KEY --value VALUE'
	$(BIN)/python -m demo.run $(DEMO_ARGS)

test: $(VENV)/.test  ## the test suite on the CPU; tests that need a GPU are skipped
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

parity: $(VENV)/.parity  ## compare the stored references with Hugging Face transformers
	$(BIN)/python tests/parity/make_references.py --check

lint: $(VENV)/.test  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test  ## fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A GPU machine often comes with its own JAX for its driver, so this target installs nothing.
gpu-test:  ## on a GPU: the tests that need one, and every kernel compiled, with GPU_PYTHON's own JAX
	$(GPU_PYTHON) -m pytest -m "gpu or kernel" $(PYTEST_ARGS)

clean:  ## remove the virtual environments and everything built
	rm -rf .venv* demo/out dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rabitq-jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install" \
	         "python3-venv), or choose another: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Setting up $(VENV) (once; it takes a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

# On Linux, PyPI's torch brings the CUDA libraries (gigabytes). For the CPU build alone:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make parity
$(VENV)/.plot $(VENV)/.test $(VENV)/.parity: $(VENV)/.%: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@
