# Everything a developer or a first-time reader runs. Needs Python 3.11 or newer, make and a POSIX shell.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# The folder that `watch` and `watch-remote` keep in step, and the server that `watch-remote` sends to.
WATCH_ROOT ?= ./media
REMOTE_UPLOAD_ENDPOINT ?=

# Where `serve` keeps its data and listens.
DATA ?= ./server-data
LISTEN ?= 127.0.0.1:8080

# How large the benchmark's workloads are, how often it repeats each, and anything else for `python -m bench`.
SCALE ?= 1
RUNS ?= 3
BENCH_ARGS ?=

# How often `crash` kills a server or a client at random.
KILLS ?= 200

# How many minutes `torture` may take, its seed (another one each time if there is none), and where its record goes.
TORTURE ?= 20
TORTURE_OUT ?= build/torture.json
SEED ?=
TORTURE_ARGS ?=

# How large a sparse file `huge` pushes; both sides hash all of it, at some GiB a second.
SPARSE_GIB ?= 1024

# Worker processes of the tests, one more than two cores because many wait; and anything else for pytest.
TEST_WORKERS ?= 3
PYTEST_ARGS ?=

.PHONY: help setup demo test crash torture huge check serve watch watch-remote replay bench clean

help:
	@echo 'make setup          create $(VENV) and install deltasync with everything that development needs'
	@echo 'make demo           see it work: a server, a watcher, real changes, a job, an offline replay (under a minute)'
	@echo 'make test           run every test and print the coverage of core and of everything'
	@echo 'make crash          kill the real commands at every change they make, and both sides KILLS=200 times at random'
	@echo 'make torture        every harness at random for TORTURE=$(TORTURE) minutes, with planted defects; writes $(TORTURE_OUT)'
	@echo 'make huge           push a sparse file of SPARSE_GIB=$(SPARSE_GIB) GiB, a folder of a million files, a file of 64,000 names'
	@echo 'make check          ruff, mypy --strict, import layers'
	@echo 'make serve          run a server on LISTEN=$(LISTEN) with DATA=$(DATA)'
	@echo 'make watch          watch WATCH_ROOT=$(WATCH_ROOT) and seal bundles; needs no server'
	@echo 'make watch-remote   the same, sent to REMOTE_UPLOAD_ENDPOINT=http://host:8080'
	@echo 'make replay         replay the reference bundles into a fresh server and compare the roots'
	@echo 'make bench          measure against rsync, SCALE=$(SCALE) RUNS=$(RUNS); writes bench/RESULTS.md'
	@echo 'make clean          remove what the other targets made, except data'

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'deltasync needs Python 3.11 or newer; `$(PYTHON)` is not: install one and name it, make PYTHON=python3.12' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '`$(PYTHON)` has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)' >&2; \
	  exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV); the first time this takes a minute or more'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m bench.demo

# Subprocesses measure themselves too (coverage's `patch = subprocess`); one that is killed with -9 loses its share.
test: setup
	@$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@echo 'coverage of core, lines and branches (at least 95 %):'
	@$(BIN)/coverage report --include='deltasync/core/*' --fail-under=95
	@echo 'coverage of everything, lines and branches (at least 90 %):'
	@$(BIN)/coverage report --fail-under=90

crash: setup
	CRASH_STRIDE=1 KILLS=$(KILLS) $(BIN)/python -m pytest -n $(TEST_WORKERS) -rP tests/crash tests/e2e/test_random_kills.py tests/e2e/test_run_kills.py

torture: setup
	@PYTHONPATH=tests $(BIN)/python -m torture --minutes $(TORTURE) --out $(TORTURE_OUT) $(if $(SEED),--seed $(SEED)) $(TORTURE_ARGS)

huge: setup
	SPARSE_GIB=$(SPARSE_GIB) HUGE=1 $(BIN)/python -m pytest -o faulthandler_timeout=0 --durations=4 \
	  tests/e2e/test_sparse.py tests/e2e/test_odd_files.py -k 'sparse or very_many'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

serve: setup
	$(BIN)/deltasync-server serve --data $(DATA) --listen $(LISTEN)

watch: setup
	@test -d '$(WATCH_ROOT)' || { echo 'no folder $(WATCH_ROOT): create it, or name another with WATCH_ROOT=/path' >&2; exit 1; }
	$(BIN)/deltasync watch '$(WATCH_ROOT)'

watch-remote: setup
	@test -n '$(REMOTE_UPLOAD_ENDPOINT)' || { \
	  echo 'REMOTE_UPLOAD_ENDPOINT is missing: make watch-remote REMOTE_UPLOAD_ENDPOINT=http://host:8080' >&2; exit 1; }
	@test -d '$(WATCH_ROOT)' || { echo 'no folder $(WATCH_ROOT): create it, or name another with WATCH_ROOT=/path' >&2; exit 1; }
	$(BIN)/deltasync watch '$(WATCH_ROOT)' --to '$(REMOTE_UPLOAD_ENDPOINT)'

replay: setup
	@$(BIN)/python -m bench.replay

bench: setup
	$(BIN)/python -m bench --scale $(SCALE) --runs $(RUNS) $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* *.egg-info \
	  .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
