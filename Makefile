# make demo: the main job on a small network, into out/digits-resnet20/    make test: every check but the slowest, which make nightly runs, too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Three on two cores: tests of several ranks wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=3 --dist=loadscope

.PHONY: demo test nightly lint types docs linkcheck benchmarks clean

demo: $(VENV)/installed-onnx
	$(BIN)/python -m hawq.quantize digits-resnet20 --avg-bits 4 --activations 8 --out out/digits-resnet20 --force

test: lint types
	$(PYTEST) --durations=10

nightly: lint types
	$(PYTEST) -m "nightly or not nightly"

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed-test
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n docs docs/_build/html

linkcheck: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -b linkcheck docs docs/_build/linkcheck

benchmarks: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.three_bits
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.sensitivities
	$(BIN)/python -m benchmarks.quantizer
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.large_batch

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) out docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
