# Every recipe makes what it needs: a fresh checkout needs only Python 3.11 and a Rust toolchain.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STUDENT := models/SmolLM2-135M-Instruct
RUST := $(shell find rust Cargo.toml Cargo.lock \( -name target -o -path rust/fuzz \) -prune -o -type f -print)

.DEFAULT_GOAL := help
.PHONY: help demo test test-python test-rust lint format wheel corpus fuzz serve-test mutants long-run gpu-suite gpu-bundle clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/built $(STUDENT) ## environment, build, student, quickstart run (minutes)
	rm -rf runs/quickstart
	$(BIN)/gad-fast train recipes/quickstart.toml

test: test-rust test-python ## environment, build, all Rust and Python tests

# nextest gives each test a process and runs them side by side; cargo's own runner needs no install.
test-rust:
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --exclude gad-fast-python --status-level fail; \
	else \
	  cargo test --quiet --workspace --exclude gad-fast-python; \
	fi

test-python: $(VENV)/built
	$(BIN)/pytest

lint: $(VENV)/built ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/basedpyright --pythonpath $(BIN)/python -p tests/pyrightconfig.json
	$(BIN)/stubtest gad_fast._core
	$(BIN)/lint-imports --no-cache
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

format: $(VENV)/built ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

wheel: $(VENV)/built ## wheel and sdist in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

corpus: $(VENV)/built $(STUDENT) ## ids of four real tokenizers against the published package (fetches 240 MB)
	$(BIN)/python scripts/fetch_tokenizers.py models/tokenizers
	$(BIN)/pytest -m corpus

fuzz: ## hostile input for the core, a minute a target (needs nightly Rust and cargo-fuzz)
	for target in decode packing cache_request; do \
	  cargo +nightly fuzz run --fuzz-dir rust/fuzz $$target -- -max_total_time=60 || exit 1; done

serve-test: $(VENV)/built $(STUDENT) ## collect from a real model behind transformers serve
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[serve]'
	$(BIN)/pytest -m serve tests/integration/test_collect_serve.py

mutants: $(VENV)/built ## plant bugs in the kernels and see the tests catch them (minutes)
	$(BIN)/python tests/kernels/mutations.py

long-run: $(VENV)/built ## 500 steps of a tiny model: memory, file handles and threads stay as they are
	GAD_FAST_LONG_STEPS=500 $(BIN)/pytest --timeout 1200 tests/integration/test_long_run.py

gpu-suite: ## kernels on this machine's GPU: right, how fast, one step (9 minutes)
	$(or $(wildcard $(BIN)/python),python3) benchmarks/run_gpu_suite.py $(ARGS)

gpu-bundle: $(VENV)/built ## wheels for a GPU machine without network, in .gpu-bundle/
	$(BIN)/python scripts/gpu_bundle.py

clean: ## remove everything that was built
	rm -rf $(VENV) target dist build .pytest_cache .ruff_cache

$(STUDENT): $(VENV)/built
	$(BIN)/python scripts/fetch_model.py student $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Editable: Python changes need no new build, a Rust change makes one.
$(VENV)/built: pyproject.toml constraints.txt $(RUST) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,examples,quickstart,bench,lowbit]'
	touch $@
