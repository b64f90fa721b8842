# make demo   environment, install, the demo: learn one half of a brain, predict the other
# make test   environment, install, all tests
# make bench  environment, install, the benchmarks
# make lint   environment, style checks
#
# PYTHON=python3.12 takes another interpreter, VENV=DIR another place for the environment,
# TORCH_INDEX=URL another index for torch alone: on a machine without a GPU that of its CPU builds,
# several gigabytes smaller (see pytorch.org, Get Started).

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test bench lint clean

demo: $(VENV)
	$(PIP) ".[demo]"
	$(RUN)/unetrpp demo --output runs/demo --overwrite true

# Not `python -m pytest`: the installed package is tested, not the working tree.
test: $(VENV)
	$(PIP) ".[test]"
	$(RUN)/pytest --numprocesses 2 tests

bench: $(VENV)
	$(PIP) ".[bench]"
	$(RUN)/pytest benchmarks --benchmark-only

lint: $(VENV)
	$(PIP) ruff
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# torch first and alone, so that its index serves nothing else.
$(VENV): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info
