PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint extension bench gpu-report clean

demo: $(VENV)/demo-installed
	$(BIN)/python -m gpsa_kernels demo

# the interpreted kernels beside everything else: neither keeps two cores busy; what they print comes last
INTERPRETED := $(VENV)/interpreted.log
test: lint
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider tests/kernels > $(INTERPRETED) 2>&1 & \
	interpreted=$$!; \
	$(BIN)/python -m pytest; status=$$?; \
	wait $$interpreted || status=1; \
	cat $(INTERPRETED); \
	exit $$status

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the CUDA library, built in place: needs nvcc and a CUDA build of torch, and no GPU
extension: $(VENV)/test-installed
	GPSA_BUILD_CUDA=1 $(BIN)/python setup.py build_ext --inplace

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
