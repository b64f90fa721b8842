# make demo   environment, install, the demo: learn one half of a brain, predict the other
# make test   environment, install, the daily tests
# make test-all  the same and every exhaustive test
# make bench  environment, install, the benchmarks
# make lint   environment, style of Python and C++, types
# make docs   environment, the pages as a site in site/, every link checked
# make sanitize  the C++ kernels alone, compiled to report undefined behaviour and every access out of
#             bounds, on every instruction set that this machine runs; needs g++, 3 minutes of one core
#
# PYTHON=python3.12 takes another interpreter, VENV=DIR another place for the environment,
# CONSTRAINTS=constraints-oldest.txt the oldest versions that pyproject.toml admits,
# TORCH_INDEX=URL another index for torch alone: on a machine without a GPU that of its CPU builds,
# several gigabytes smaller (see pytorch.org, Get Started).

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo test test-all bench lint docs sanitize clean

demo: $(VENV)
	$(PIP) ".[demo]"
	$(RUN)/unetrpp demo --output runs/demo --overwrite true

# Not `python -m pytest`: the installed package is tested, not the working tree.
test: $(VENV)
	$(PIP) ".[test]"
	$(RUN)/pytest --numprocesses 2 -m "not exhaustive" tests

test-all: $(VENV)
	$(PIP) ".[test]"
	$(RUN)/pytest --numprocesses 2 tests

bench: $(VENV)
	$(PIP) ".[bench]"
	$(RUN)/pytest benchmarks --benchmark-only

# mypy reads the types of the libraries. Where they are missing, an install without kernels brings
# them; the next target that runs the package installs it anew.
lint: $(VENV)
	$(RUN)/python -c "import monai" 2>/dev/null || EPA_KERNELS_CPU=0 EPA_KERNELS_CUDA=0 $(PIP) ".[train]"
	$(PIP) ruff clang-format mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	git ls-files "*.cpp" "*.h" "*.cu" "*.cuh" | xargs $(RUN)/clang-format --dry-run -Werror
	$(RUN)/mypy

# Without an install of the package: the docstrings are read, not imported.
docs: $(VENV)
	$(PIP) mkdocs-material "mkdocstrings[python]" ruff
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

# Without torch, and with the runtimes loaded first, because they replace malloc and wrap exceptions.
# A report ends the process, so nothing may capture it: sys leaves it on the screen.
SANITIZE := -fsanitize=address,undefined
sanitize: $(VENV)
	$(PIP) setuptools pybind11 ninja numpy pytest
	EPA_KERNELS_CPU=1 EPA_KERNELS_CUDA=0 CXX=g++ LDFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE) -O1 -g -DEPA_POISON \
		-fno-sanitize-recover=undefined" \
		$(RUN)/python setup.py -q build_ext --build-lib build/sanitize/lib \
		--build-temp build/sanitize/temp
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		EPA_KERNELS_MODULE=build/sanitize/lib/epa_kernels \
		$(RUN)/python -m pytest --capture=sys tests/test_kernels_without_torch.py

# torch first and alone, so that its index serves nothing else.
$(VENV): $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $(VENV)

clean:
	rm -rf $(VENV) build dist site *.egg-info
