# Every target does its own set-up: Python 3.10 or newer, make and a C++ compiler are all that a machine needs,
# and Chromium for the long tests.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process for each core, up to eight, that computes in one thread. What shares them out is in tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8
# Python keeps what it compiles, whatever the caller's environment says: commands here start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE
NATIVE := $(wildcard src/batchnorm/kernels/cpu/*/*.?pp)

.PHONY: demo test test-long test-torch cuda check docs sanitize bench wheel peers clean

demo: $(VENV)/package ## the study's quick form, on real data
	$(BIN)/batchnorm study --quick

test: $(VENV)/tests ## the tests that take seconds each
	$(PYTEST) -m "not long"

test-long: $(VENV)/dev ## the others: wheels, the study, scripts, large inputs, reports in Chromium
	$(PYTEST) -m long

# Everything is .venv's, the extension too, but torch and what torch needs: their folder comes first on the path. Left out
# are what needs other people's tools in versions made for .venv's torch, the scripts of benchmarks/, the study and the reports.
TORCH ?= 2.10.0
OTHER := .torch/$(TORCH)
IGNORED := compatibility integrations bench benchmarks study report
test-torch: $(VENV)/tests $(OTHER)/installed ## the tests with another torch: TORCH=2.14.1
	PYTHONPATH=$(abspath $(OTHER)) $(BIN)/python -c \
	  'import torch, batchnorm; print(torch.__version__, batchnorm.kernels()); assert torch.__version__.split("+")[0] == "$(TORCH)"'
	PYTHONPATH=$(abspath $(OTHER)) $(PYTEST) -m "not long" $(IGNORED:%=--ignore tests/%) $(TESTS)

$(OTHER)/installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OTHER) --upgrade torch==$(TORCH)
	touch $@

cuda: $(VENV)/dev ## on a GPU, in under ten minutes: its tests, sanitizers, measurements, into build/cuda
	PYTHON=$(BIN)/python benchmarks/gpu_session.sh build/cuda

check: $(VENV)/dev ## format, lint and types; the workflows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --no-progress --quiet .github/workflows

docs: $(VENV)/dev ## the site, into build/docs/index.html; broken links and undocumented public names are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs

CASES ?= 2000
SEED ?= $(shell date +%Y%m%d)
# One build for each sanitizer. Its runtime comes before everything else, and torch, which has none, is not looked at.
sanitize: $(VENV)/tests ## random calls of the operators under the address, undefined-behaviour and thread sanitizers
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

bench: $(VENV)/package ## ours beside torch, in one run
	$(BIN)/batchnorm bench

DIST ?= dist
# Nobody compiles again what an environment has compiled. LibTorch is the user's own, whatever its version.
wheel: $(VENV)/dev ## the wheel for this kind of machine: every Python, every torch from 2.10 on
	rm -rf build/wheel
	$(PIP) wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	if [ "$$(uname)" = Linux ]; then \
	  PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libtorch_cpu.so --exclude libc10.so -w $(DIST) build/wheel/*.whl; \
	else mkdir -p $(DIST) && cp build/wheel/*.whl $(DIST)/; fi

peers: ## environments for `batchnorm bench --peers`
	for peer in jax tensorflow; do test -d .peers/$$peer || $(PYTHON) -m venv .peers/$$peer; done
	.peers/jax/bin/python -m pip install --quiet --disable-pip-version-check jax numpy
	.peers/tensorflow/bin/python -m pip install --quiet --disable-pip-version-check tensorflow-cpu numpy

clean: ## everything that the targets made
	rm -rf $(VENV) .torch build dist study-report

# What is in the environment, a stamp for each step: a target asks for the steps that it needs, a later one adds to them.
# Modules are compiled to bytecode when they are first imported: most never are.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --no-compile -c constraints.txt
TOOLS := tests/compatibility/requirements.txt
# Make has a value of its own for CXX, which is no one's wish; what comes from the user, cmake finds in the environment.
COMPILER := $(firstword $(foreach name,$(if $(filter default,$(origin CXX)),c++ g++ clang++,$(firstword $(CXX))),$(shell command -v $(name))))
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
endif
pinned = $(1) $(shell sed -n 's/^$(1)==//p' constraints.txt)

$(VENV)/torch: constraints.txt
	@echo "making an environment in $(VENV) (seconds)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(call pinned,torch) and what the build needs (about half a minute, and the download)"
	@$(INSTALL) torch scikit-build-core cmake ninja
	@touch $@

# Torch is there already, and the build uses it: the extension is compiled against the torch that it is tested with. The
# compiler's own lines are many: seen are those of finished files, and where it fails, the end of everything it said.
PACKAGE := -v --no-compile -c constraints.txt --no-build-isolation --log build/install.log
COMPILED := s|^ *\[\([0-9]*/[0-9]*\)\] Building CXX object .*/\([^/]*\)\.o$$|  compiled \1: \2|p
$(VENV)/package: $(VENV)/torch pyproject.toml CMakeLists.txt $(NATIVE)
	@mkdir -p build && rm -f build/install.log
	@set -o pipefail; if [ -n "$(COMPILER)" ]; then \
	  echo "installing the package and what the study needs, compiling its kernels (one to two minutes)"; \
	  $(PIP) install $(PACKAGE) -e ".[study]" 2>&1 | sed -un '$(COMPILED)' || { \
	    tail -n 40 build/install.log; \
	    echo "The package could not be installed: see above, all of it is in build/install.log. Where the compiler is at" \
	      "fault, another one may do: make CXX=clang++ (GCC 11 and newer, Clang 14 and newer)." >&2; exit 1; }; \
	else \
	  echo "no C++ compiler: installing the package without its kernels; all works, slower, but for the tests of" \
	    "the kernels. For the kernels install one (Debian: apt-get install g++), then: rm $(VENV)/package"; \
	  $(INSTALL) --no-build-isolation --config-settings=wheel.cmake=false -e ".[study]"; \
	fi
	@touch $@

# The package is there: pip installs what its extras name, and nothing is built again.
$(VENV)/tests: pyproject.toml constraints.txt | $(VENV)/package
	@echo "installing what the tests need (about a minute)"
	@$(INSTALL) "batchnorm[test]"
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt $(TOOLS) | $(VENV)/tests
	@echo "installing what the other developers' commands need (about a minute)"
	@$(INSTALL) "batchnorm[dev]"
	@$(INSTALL) --upgrade --no-deps --target $(VENV)/tools -r $(TOOLS)
	@touch $@
