# The verbs; `make` alone lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
STAMP  := $(VENV)/.locked
PEERS  := .venv-peers

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos check bench bench-gpu bench-feeds wheel lock clean

help:            ## list the verbs
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv from requirements.lock (hash-checked), scalecv installed in it

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)"
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(UV) pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: setup      ## the whole way on small real images: ingest, train on 2 workers, evaluate, report
	$(BIN)/scalecv demo

test: setup      ## every test but those of `make chaos`, two files at a time (under 20 minutes on 2 cores)
	@-$(BIN)/python -m compileall -q scalecv tests  # once, not in each process where PYTHONDONTWRITEBYTECODE is set
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: setup     ## the long tests of faults: kills, lost nodes, crash points, broken stores
	$(BIN)/python -m pytest -m chaos $(PYTEST_ARGS)

check: setup     ## lint, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup     ## training throughput against plain PyTorch, paired
	$(BIN)/python -m tests.reference.bench $(BENCH_ARGS)

bench-gpu: setup ## training on a GPU from shards against a loop that waits for no data; GPU_ARGS="--photos … --tiles …"
	$(BIN)/python -m tests.reference.gpu_bench $(GPU_ARGS)

bench-feeds: $(PEERS)/.locked  ## training feeds side by side: scalecv, its peers and the limit of the machine
	$(PEERS)/bin/python -m tests.reference.feeds $(BENCH_ARGS)

$(PEERS)/.locked: requirements.lock pyproject.toml | $(STAMP)
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	VIRTUAL_ENV=$(CURDIR)/$(PEERS) $(UV) pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	VIRTUAL_ENV=$(CURDIR)/$(PEERS) $(UV) pip install --quiet --no-deps --no-build-isolation -e .
	VIRTUAL_ENV=$(CURDIR)/$(PEERS) $(UV) pip install --quiet --compile-bytecode --group peers
	@touch $@

wheel: setup     ## dist/: a wheel with our C for JPEGs compiled, for this kind of machine (Linux; gcc and libjpeg-dev)
	rm -rf dist/plain && mkdir -p dist/plain
	SCALECV_WHEEL=native $(BIN)/python -m hatchling build -t wheel -d dist/plain
	PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --lib-sdir /jpeg --wheel-dir dist dist/plain/*.whl
	rm -r dist/plain

lock:            ## recompile requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

clean:           ## remove the environment and caches
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache
