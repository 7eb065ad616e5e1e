# Needs make and Python 3.11 or newer. Everything is installed into .venv; nothing outside this folder is touched.
#
#   make probe     the built-in data through every fast pooling: leaderboard here, report in cenote-out/report.html
#   make explain   which explanation of the built-in classifier is faithful: report in explain-out/report.html
#   make reduce    how few vectors per document will do for a built-in collection: report in reduce-out/report.html
#   make mix       which keys a built-in decoder need not read: report in mix-out/report.html
#   make test      the quick test suite
#   make test-thorough  the tests that the quick suite leaves out: many of a kind, each of which costs seconds
#   make models    real pretrained models for the tests, into models/: some 340 MB to fetch, 520 MB to hold
#   make test-real the tests that use them
#   make lint      style, types, import floors
#   make pages     what is generated from the catalog: the pages of docs/methods, the stubs of the rooms
#   make docs      the documentation, into site/
#   make bench     every benchmark, one after the other; writes docs/benchmarks.md
#

VENV ?= .venv
OUT ?= cenote-out
EXPLAIN_OUT ?= explain-out
REDUCE_OUT ?= reduce-out
MIX_OUT ?= mix-out
MODELS ?= models
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= --numprocesses auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PACKAGE := $(VENV)/package.stamp
EXPLAIN := $(VENV)/explain.stamp
SEARCH := $(VENV)/search.stamp
MIX := $(VENV)/mix.stamp
TEST := $(VENV)/test.stamp
REAL := $(VENV)/real.stamp
DEV := $(VENV)/dev.stamp
DOCS := $(VENV)/docs.stamp
BENCH := $(VENV)/bench.stamp

.DEFAULT_GOAL := help
.PHONY: help probe explain reduce mix test test-thorough models test-real lint pages docs bench clean

help:
	@sed -n 's/^#   //p' Makefile

probe: $(PACKAGE)
	$(BIN)/cenote probe --out $(OUT)

explain: $(EXPLAIN)
	$(BIN)/cenote explain --out $(EXPLAIN_OUT)

# the same command goes on after any interruption
reduce: $(SEARCH)
	$(BIN)/cenote reduce --out $(REDUCE_OUT)

mix: $(MIX)
	$(BIN)/cenote mix --out $(MIX_OUT)

# one thread a process: threads of several test processes would only wait for each other;
# bytecode is kept, or every process that a test starts compiles the package again
test test-thorough: export OMP_NUM_THREADS := 1
test test-thorough: export PYTHONDONTWRITEBYTECODE :=

test: $(TEST)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-thorough: $(TEST)
	$(BIN)/python -m pytest -m thorough --thorough $(PYTEST_ARGS)

models: $(REAL)
	$(BIN)/python -m scripts.real_models --out $(MODELS)

# one process: each would hold models of its own
test-real: models
	$(BIN)/python -m pytest tests -m real --real --models $(MODELS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pages: $(PACKAGE)
	$(BIN)/python scripts/build_stubs.py
	$(BIN)/python scripts/build_method_pages.py

docs: $(DOCS) pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BENCH)
	$(BIN)/python -m benchmarks.all
	$(BIN)/python scripts/build_benchmark_page.py

clean:
	rm -rf $(VENV) $(OUT) $(EXPLAIN_OUT) $(REDUCE_OUT) site build dist

# torch comes first and alone, so that the package's own requirement cannot pick another build
$(PACKAGE): pyproject.toml
	@set -e; found=; for python in python3.11 python3 python python3.12 python3.13; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: Python 3.11 or newer is needed; found none on PATH" >&2; exit 2; fi; \
	if [ ! -x $(BIN)/python ]; then echo "creating $(VENV) with $$($$found --version)"; $$found -m venv $(VENV); fi
	@echo "installing $(TORCH) and cenote into $(VENV), once"
	@$(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@

$(EXPLAIN): $(PACKAGE)
	@$(PIP) --editable '.[explain]'
	@touch $@

$(SEARCH): $(PACKAGE)
	@$(PIP) --editable '.[search]'
	@touch $@

$(MIX): $(PACKAGE)
	@$(PIP) --editable '.[models]'
	@touch $@

# timm asks for torchvision, which its models do not need
$(TEST): $(PACKAGE)
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps 'timm>=1.0'
	@touch $@

$(REAL): $(TEST)
	@$(PIP) --editable '.[real,test]'
	@touch $@

$(DEV): $(PACKAGE)
	@$(PIP) --editable '.[dev,test]'
	@touch $@

$(DOCS): $(PACKAGE)
	@$(PIP) --editable '.[docs]'
	@touch $@

$(BENCH): $(PACKAGE)
	@$(PIP) --editable '.[bench]'
	@touch $@
