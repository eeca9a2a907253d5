# Two commands do all the set-up: `make demo` and `make test`. Everything is installed into .venv from this repository's files.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and by version: an unpinned torch may bring gigabytes of CUDA packages; any torch >= 2.11 works
TORCH ?= torch==2.13.0

.PHONY: demo install test families test-oldest test-model test-slow bench bench-full proof docs gpu asan lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja "cmake>=3.22"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[data,train,bench,dev]"
	touch $@

demo: install
	$(BIN)/grit fetch-model
	$(BIN)/grit demo

# the second run executes the Triton kernels on the CPU, in Triton's interpreter
test: install
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest

# docs/families.md: what patch() does for each family, from a run of its tests
families: install
	$(BIN)/python -m tests.families_table

# the oldest supported transformers and Triton, in a folder that goes before .venv's packages
test-oldest: install .oldest/.installed
	PYTHONPATH=.oldest $(BIN)/python -m pytest tests/grit_kernels/hf/test_patch.py tests/grit_kernels/hf/test_patch_generation.py \
		tests/grit_kernels/hf/test_families.py tests/grit_kernels/hf/test_cache_lengths.py tests/grit_kernels/hf/test_host_sync.py \
		tests/grit_kernels/hf/test_compiled_models.py tests/grit_kernels/hf/test_integrations.py tests/python_model
	PYTHONPATH=.oldest TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/grit_kernels/attention/test_triton_attention.py

.oldest/.installed: pyproject.toml
	rm -rf .oldest
	$(BIN)/python -m pip install --quiet --target .oldest transformers==5.17.0 triton==3.6.0 "numpy<2.4"
	touch $@

test-model: install
	$(BIN)/grit fetch-model
	$(BIN)/python -m pytest -m "model and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu"

# on a machine with a CUDA device, with its own Python and torch; nothing is downloaded. Tests first, then the most valuable
# benchmarks; run again, it goes on where it stopped
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m pip install --no-deps --no-build-isolation --quiet -e .
	$(GPU_PYTHON) -m bench --device cuda --keep --minutes 7

# about 15 minutes on 2 quiet cores: compares with the committed records and says what moved
bench: install
	$(BIN)/grit fetch-model
	$(BIN)/python -m bench

# every size and peer; the records become the committed ones
bench-full: install
	$(BIN)/grit fetch-model
	$(BIN)/python -m bench --full --keep

# unified training against two specialists of the same length and the base model; an interrupted run goes on
proof: install
	$(BIN)/grit fetch-model
	$(BIN)/python -m bench.proof

# the pages of docs/ that are written by code
docs: install
	$(BIN)/python -m tests.docs_pages
	$(BIN)/python -m bench.report

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the CPU kernels with the address and undefined-behaviour sanitizers; the package finds this build by GRIT_KERNELS_LIBRARY
SANITIZED := build/asan
asan: install
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DGRIT_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DTORCH_INCLUDE=$$($(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent / 'include')")
	$(BIN)/cmake --build $(SANITIZED)
	GRIT_KERNELS_LIBRARY=$(SANITIZED)/_C.so ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest tests/grit_kernels/pooling tests/grit_kernels/attention tests/grit_kernels/contrastive/test_cpu_contrastive.py

clean:
	rm -rf .oldest build dist *.egg-info grit_kernels/*.so .pytest_cache .ruff_cache .mypy_cache
