# The README's two commands are `make repro` and `make test`; both start from a bare clone.
# PYTHON picks the interpreter (3.11 or 3.12) that the virtual environment is made with.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: help env repro test storm notebooks bench lab readme docs
help:
	@echo "make repro      environment, then the whole pipeline: table, figures, restored images in results/"
	@echo "make test       environment, then all tests, every notebook executed, notebooks and library in sync"
	@echo "make storm      environment, then the storms: hostile pictures, models and parameter files, kills; a quarter of an hour"
	@echo "make notebooks  environment, then every notebook exported, executed in place and cleaned"
	@echo "make bench      environment, then the measured ratios: degradations, metrics, training step, restore"
	@echo "make lab        environment, then JupyterLab on nbs/"
	@echo "make readme     README.md from nbs/index.ipynb"
	@echo "make docs       environment, then the site from the notebooks' stored outputs, without a network: build/docs/html"

# Made again only when what it is made of changes; half-made environments leave no stamp.
$(VENV)/.stamp: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "irnb: no Python 3.11 or 3.12 found; install one or run: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

env: $(VENV)/.stamp

repro: env
	dvc repro
	@irnb results
	-@irnb compare

test: env
	python -m pytest

storm: env
	python -m pytest tests/storms -m storm -s

notebooks: env
	python -m tests.notebooks

bench: env
	python -m tests.bench

lab: env
	jupyter lab nbs

readme: env
	python -m tests.notebooks --readme

docs: env
	python -m docs
