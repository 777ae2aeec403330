PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test proof lint extension wheel bench gpu-report clean

demo: $(VENV)/demo-installed
	$(BIN)/python -m gpsa_kernels demo

# what a person runs between two edits, and everything; tests/tiers.py says what the difference is
test proof: lint
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going $(SUITES:%=$@-%)

# two at a time, each on one core; Triton's kernels are interpreted in a process of their own
SUITES := rest cuda triton
export OMP_NUM_THREADS ?= 1
test-%: TIER := -m "not proof"
test-cuda proof-cuda:
	$(PYTEST) $(TIER) tests/cuda tests/kernels
test-triton proof-triton:
	TRITON_INTERPRET=1 $(PYTEST) $(TIER) tests/kernels
test-rest proof-rest:
	$(PYTEST) $(TIER) --ignore tests/cuda --ignore tests/kernels

CXX_SOURCES := $(wildcard $(addprefix csrc/*.,h cpp cu cuh) $(addprefix tests/cuda/*.,cpp cu) $(addprefix tests/cuda/*/*.,cpp h))
lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# the CUDA library, built in place: needs nvcc and a CUDA build of torch, and no GPU
extension: $(VENV)/test-installed
	GPSA_BUILD_CUDA=1 $(BIN)/python setup.py build_ext --inplace

# the wheel to publish, in dist/, for all architectures; tagged by the oldest glibc that it runs on
wheel: $(VENV)/wheel-installed
	rm -rf build/wheel dist
	GPSA_BUILD_CUDA=1 $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH=$(BIN):$$PATH auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheel/*.whl
	$(BIN)/python -m tools.wheel dist/*.whl

bench: $(VENV)/test-installed
	$(BIN)/python -m benchmarks

# needs no environment: the torch, triton and timm that the machine has
gpu-report:
	$(PYTHON) -m benchmarks.gpu_report

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[$*]"
	touch $@
