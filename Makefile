# Every target does its own set-up: Python 3.10 or newer, make and a C++ compiler are all that a machine needs,
# and Chromium for the long tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/batchnorm/kernels/cpu/*/*.?pp)

.PHONY: demo test test-long check bench peers clean

demo: $(VENV)/installed ## the study's quick form, on real data
	$(BIN)/batchnorm study --quick

test: $(VENV)/installed ## the tests that take seconds each
	$(BIN)/python -m pytest -m "not long"

test-long: $(VENV)/installed ## the others: wheels, the study, scripts, large inputs, reports in Chromium
	$(BIN)/python -m pytest -m long

check: $(VENV)/installed ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed ## ours beside torch, in one run
	$(BIN)/batchnorm bench

peers: ## environments for `batchnorm bench --peers`
	for peer in jax tensorflow; do test -d .peers/$$peer || $(PYTHON) -m venv .peers/$$peer; done
	.peers/jax/bin/python -m pip install --quiet --disable-pip-version-check jax numpy
	.peers/tensorflow/bin/python -m pip install --quiet --disable-pip-version-check tensorflow-cpu numpy

clean: ## everything that the targets made
	rm -rf $(VENV) build study-report

# Torch comes first and the build uses it, so the extension is compiled against the torch it is tested with.
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
