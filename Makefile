# `make demo` and `make test` do all set-up on a fresh machine: a virtual environment in .venv, PyTorch for the CPU
# where there is no NVIDIA GPU, and tidesim itself. Set PYTHON to choose an interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo

# Without a GPU the full PyTorch would bring several GB of CUDA libraries that nothing here could use.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.8,torch==2.13.0)

# One process for each core; who is done takes tests from the others.
SIDE_BY_SIDE := -n logical --dist worksteal

.PHONY: demo test slow lint clean

demo: $(VENV)/engine.ready
	@BIN=$(BIN) RUNS=$(RUNS) sh tests/demo.sh

test: $(VENV)/dev.ready
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

slow: $(VENV)/dev.ready
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow

lint: $(VENV)/dev.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy tidesim

# All that a target needs is installed at once: each call of pip reads the whole environment again.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)" -e

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tidesim needs Python 3.11 or newer; set PYTHON=")'
	@echo "setting up $(VENV), once"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/engine.ready: pyproject.toml | $(BIN)/python
	@$(INSTALL) '.[engine]'
	@touch $@

$(VENV)/dev.ready: pyproject.toml | $(BIN)/python
	@$(INSTALL) '.[engine,dev]'
	@touch $(VENV)/engine.ready $@

clean:
	rm -rf $(VENV) runs dist
