# `make train` and `make test` set up all that they need in .venv; the other targets use it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test check lint golden torture pictures gpu clean

train: $(VENV)/.installed
	PYTHON=$(BIN)/python launch/local.sh missing=synthetic

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.sh' | xargs $(BIN)/shellcheck -x

# Write the golden files anew: loss curves, and (as root, with SLURM) command lines. `git diff tests/golden` then shows
# what a change did to them.
golden: $(VENV)/.dev
	$(BIN)/python -m tests.golden
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.slurm.commands

# The whole kill campaign, about half an hour: 160 runs with one rank, 40 with two, 50 with bit_exact on 1, 2 and 4.
torture: $(VENV)/.dev
	$(BIN)/python -m tests.torture

# Draw README's pictures anew, in docs/pictures/, from runs that are made for it; some minutes.
pictures: $(VENV)/.dev
	$(BIN)/python -m benchmarks.pictures

# On a machine with a GPU: all that only a GPU can show, in nine minutes, into docs/gpu-results.json and a table. WHEELS
# names a folder of wheels where no index can be reached: PYTHON, which has PyTorch, then lacks only what is in there.
gpu: $(if $(WHEELS),,$(VENV)/.dev)
ifdef WHEELS
	rm -rf build/wheels
	$(PYTHON) -m pip install -q --no-index --no-deps --target build/wheels $(WHEELS)/*.whl
	PYTHONPATH=build/wheels:. $(PYTHON) -m benchmarks.gpu $(if $(OUTPUT),--output $(OUTPUT))
else
	$(BIN)/python -m benchmarks.gpu $(if $(OUTPUT),--output $(OUTPUT))
endif

clean:
	rm -rf $(VENV) build *.egg-info .*_cache

# A virtual environment of too old a Python, or half of one, would stay in the way for ever.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; name a newer one, as make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "make: installing PyTorch and the rest into $(VENV), which takes minutes and, with CUDA, 6 GB"

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -e '.[dev,tracking]'
	touch $@ $(VENV)/.installed
