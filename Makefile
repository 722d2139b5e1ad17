# make demo: the main job. make test: the CPU test suite. make lint: style, types and the arrows between rooms.
# make docs: the site, into site/. Each builds .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint docs clean

demo: .venv/.base
	$(BIN)/pkvsim replay --family bimodal --requests 24 --max-active 8 --steps 48 --seed 20260623 \
	    --device rtx3060 --split-splits 32 --workqueue-splits 20
	@if nvidia-smi >/dev/null 2>&1; then \
	    $(MAKE) --no-print-directory .venv/.gpu && $(BIN)/python examples/quickstart.py; \
	else \
	    echo "No GPU answers nvidia-smi: examples/quickstart.py, the GPU half of the demo, is left out."; \
	fi

test: .venv/.test
	$(BIN)/python -m pytest -q -n 2

lint: .venv/.lint
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/.docs
	$(BIN)/mkdocs build --strict

# Editable, so that one environment serves both targets and never runs stale sources.
.venv/.base: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e .
	@touch $@

.venv/.test: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[test]'
	@touch $@

.venv/.lint: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[lint]'
	@touch $@

.venv/.docs: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[docs,plot]'
	@touch $@

.venv/.gpu: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[gpu]'
	@touch $@

.venv:
	$(PYTHON) -m venv $@

clean:
	rm -rf .venv build site *.egg-info
