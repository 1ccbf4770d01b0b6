# Every target does its own set-up: Python 3.10 or newer, make and a C++ compiler are all that a machine needs,
# and Chromium for the long tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/batchnorm/kernels/cpu/*/*.?pp)

.PHONY: demo test test-long test-torch cuda check docs sanitize bench peers clean

demo: $(VENV)/installed ## the study's quick form, on real data
	$(BIN)/batchnorm study --quick

test: $(VENV)/installed ## the tests that take seconds each
	$(BIN)/python -m pytest -m "not long"

test-long: $(VENV)/installed ## the others: wheels, the study, scripts, large inputs, reports in Chromium
	$(BIN)/python -m pytest -m long

# Everything is .venv's, the extension too, but torch and what torch needs: their folder comes first on the path. Left out
# are what needs other people's tools in versions made for .venv's torch, the scripts of benchmarks/, the study and the reports.
TORCH ?= 2.10.0
OTHER := .torch/$(TORCH)
IGNORED := compatibility integrations bench benchmarks study report
test-torch: $(VENV)/installed $(OTHER)/installed ## the tests with another torch: TORCH=2.14.1
	PYTHONPATH=$(abspath $(OTHER)) $(BIN)/python -c \
	  'import torch, batchnorm; print(torch.__version__, batchnorm.kernels()); assert torch.__version__.split("+")[0] == "$(TORCH)"'
	PYTHONPATH=$(abspath $(OTHER)) $(BIN)/python -m pytest -m "not long" $(IGNORED:%=--ignore tests/%) $(TESTS)

$(OTHER)/installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OTHER) --upgrade torch==$(TORCH)
	touch $@

cuda: $(VENV)/installed ## on a GPU, in under ten minutes: its tests, sanitizers, measurements, into build/cuda
	PYTHON=$(BIN)/python benchmarks/gpu_session.sh build/cuda

check: $(VENV)/installed ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed ## the site, into build/docs/index.html; broken links and undocumented public names are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs

CASES ?= 2000
SEED ?= $(shell date +%Y%m%d)
# One build for each sanitizer. Its runtime comes before everything else, and torch, which has none, is not looked at.
sanitize: $(VENV)/installed ## random calls of the operators under the address, undefined-behaviour and thread sanitizers
	for sanitizer in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/$$sanitizer -G Ninja -DCMAKE_BUILD_TYPE=Release -DBATCHNORM_SANITIZE=$$sanitizer \
	    -DBATCHNORM_FIRST_LEVEL=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) && $(BIN)/ninja -C build/$$sanitizer || exit 1; \
	done
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 BATCHNORM_POOL_MIB=0 \
	  $(BIN)/python tests/fuzz/operators.py --cases $(CASES) --seed $(SEED) \
	    --library "$(abspath build)/address,undefined/_native.so"
	if setarch -R true; then \
	  LD_PRELOAD="$$(c++ -print-file-name=libtsan.so) $$(c++ -print-file-name=libstdc++.so)" \
	    TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 OMP_NUM_THREADS=1 setarch -R \
	    $(BIN)/python tests/fuzz/operators.py --cases $(CASES) --seed $(SEED) --threads 4 \
	      --library $(abspath build)/thread/_native.so; \
	else echo "left out: the thread sanitizer needs fixed addresses, and this machine forbids setarch -R"; fi

bench: $(VENV)/installed ## ours beside torch, in one run
	$(BIN)/batchnorm bench

peers: ## environments for `batchnorm bench --peers`
	for peer in jax tensorflow; do test -d .peers/$$peer || $(PYTHON) -m venv .peers/$$peer; done
	.peers/jax/bin/python -m pip install --quiet --disable-pip-version-check jax numpy
	.peers/tensorflow/bin/python -m pip install --quiet --disable-pip-version-check tensorflow-cpu numpy

clean: ## everything that the targets made
	rm -rf $(VENV) .torch build study-report

TOOLS := tests/compatibility/requirements.txt
# Torch comes first and the build uses it, so the extension is compiled against the torch it is tested with.
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(TOOLS) $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/tools -r $(TOOLS)
	touch $@
