PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/demo-installed
	$(BIN)/python -m gpsa_kernels demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test-installed
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[$*]"
	touch $@
