# Everything a newcomer needs; `make help` lists it. Needs make and Python 3.11 or newer, nothing else.
# Settings: README.md. TORCH_INDEX=<index url> takes torch from another index (CUDA or CPU builds).

BIN := .venv/bin
# The first Python that is new enough, unless PYTHON=... names one.
PYTHON ?= $(shell for one in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$one -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$one && break; done)
INSTALL = @test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python3 $@" >&2; exit 1; }; \
	$(PYTHON) requirements/install.py

.NOTPARALLEL: # set-up comes first, also under `make -j`
.PHONY: help run worker stop test test-slow check format soak clean lock setup setup-dev model

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

run: setup  ## install what is missing, fetch the model, start the whole fleet; Ctrl-C stops it
	@$(BIN)/millrace up

worker: setup  ## add one more torch worker to the running fleet, or to REDIS_URL
	@$(BIN)/millrace worker

stop:  ## stop a fleet that runs elsewhere
	@if test -x $(BIN)/millrace; then $(BIN)/millrace stop; else echo "no fleet runs here"; fi

test: check  ## checks and quick tests, on a real server of their own
	@$(BIN)/python -m pytest -q -m "not slow"

test-slow: setup-dev model  ## cluster, sentinel, long fault loops, real time
	@$(BIN)/python -m pytest -q -m slow

check: setup-dev model  ## linter, strict types, import rules, docs
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_docs.py

format: setup-dev  ## lay out the code
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

soak: setup-dev model  ## kill roles at random for MINUTES=10 and check that every job ends once
	@$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),10)

clean: stop  ## remove .venv and caches; var/ (data, keys, model, logs) stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: ## write requirements/*.lock anew (maintainers; needs uv)
	@requirements/lock.sh

setup:
	$(INSTALL) worker

setup-dev:
	$(INSTALL) dev

model:
	@$(BIN)/python -m gpu_worker.model_files fetch >/dev/null
	@$(BIN)/python -m gpu_worker.torch_engine.kernels
