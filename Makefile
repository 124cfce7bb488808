# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
DONE := .venv/installed

.PHONY: demo test soak check gpu docs clean

demo: $(DONE)
	$(BIN)/python examples/demo.py

test: $(DONE)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

soak: $(DONE)
	$(BIN)/python -m pytest -m soak

check: $(DONE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DONE)
	$(BIN)/python docs/generate.py

# in the machine's own Python, which has torch with CUDA: nothing is installed; benchmarks/gpu.py says what it needs
OUT ?= build/gpu
gpu:
	$(PYTHON) benchmarks/gpu.py --output $(OUT)

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("featx needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[openvino,parquet,ray,timm]" --group dev
	touch $(DONE)

clean:
	rm -rf .venv demo build *.egg-info
