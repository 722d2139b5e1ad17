# make demo: the main job. make test: the CPU test suite. Each builds .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test clean

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

# Editable, so that one environment serves both targets and never runs stale sources.
.venv/.base: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e .
	@touch $@

.venv/.test: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[test]'
	@touch $@

.venv/.gpu: setup.cfg pyproject.toml | .venv
	$(PIP) install -q -e '.[gpu]'
	@touch $@

.venv:
	$(PYTHON) -m venv $@

clean:
	rm -rf .venv build *.egg-info
