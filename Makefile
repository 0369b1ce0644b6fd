# Two commands do all the set-up: `make demo` and `make test`. Both make .venv, install, and go.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check gpu install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install        ## train, catch, move, prove, go on: under 10 minutes on 2 cores
	$(BIN)/bascule run runs/demo.toml

test: install        ## the tests: under 10 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: install    ## the slow ones too
	$(BIN)/python -m pytest -m 'not gpu'

check: install       ## what CI runs beside the tests: style, types, the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu:                 ## on a machine with a CUDA chip: tests, qualify, demo and cost there, under 10 minutes, written to out/gpu
	bash benchmarks/gpu.sh

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
