# Eight verbs; `make` alone lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
STAMP  := $(VENV)/.locked

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos check bench lock clean

help:            ## list the verbs
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv from requirements.lock (hash-checked), scalecv installed in it

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip sync --quiet --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: setup      ## the whole way on small real images: ingest, train on 2 workers, evaluate, report
	$(BIN)/scalecv demo

test: setup      ## every test but those of `make chaos` (about 17 minutes on 2 cores)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: setup     ## the long tests of faults: kills, lost nodes, crash points, broken stores
	$(BIN)/python -m pytest -m chaos $(PYTEST_ARGS)

check: setup     ## lint, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup     ## training throughput against plain PyTorch, paired
	$(BIN)/python -m tests.reference.bench $(BENCH_ARGS)

lock:            ## recompile requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

clean:           ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
