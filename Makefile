# Python 3.11 or later that makes .venv; another one: make demo PYTHON=/path/to/python3
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '$(ENOUGH)' 2>/dev/null && echo $$name && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
# Another index for PyTorch alone, as https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Processes that run the tests, one thread each.
WORKERS ?= 2

# An installation is known by the version of Python: another version makes .venv anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP   := $(VENV)/.installed-$(VERSION)
PIP     := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help demo test test-slow lint docs docs-reference options clean venv
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PyTorch without CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo"

demo: $(STAMP) ## run the whole pipeline on SmolLM2-135M
	@$(BIN)/lapora demo

test: $(STAMP)-test ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(STAMP)-test ## run the slow tests
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

lint: $(STAMP)-dev ## run ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A warning is an error. NO_MKDOCS_2_WARNING: an advertisement of the theme.
docs: $(STAMP)-docs ## build the site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: file://$(CURDIR)/site/index.html"

# The page of the command line is written from the code; a test fails where they differ.
docs-reference: $(STAMP) ## write docs/reference/cli.md
	$(BIN)/typer lapora.cli.app utils docs --name lapora --title "Command line" --output docs/reference/cli.md

# The option classes of the Python API are written from lapora/config.py; a test fails where they differ.
options: $(STAMP)-dev ## write src/lapora/options.py
	$(BIN)/python tools/make_options.py
	$(BIN)/ruff format --quiet src/lapora/options.py

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache lapora-demo

venv:
	@if [ -z "$(VERSION)" ]; then \
		echo "error: no Python 3.11 or later $(if $(PYTHON),in $(PYTHON),found): install it, or give its path: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@$(PYTHON) -c '$(ENOUGH)' || { \
		echo "error: $(PYTHON) is Python $(VERSION), and lapora needs 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if [ -e $(VENV) ] && ! $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null; then \
		echo "$(VENV) is of another Python than $(VERSION): made anew"; rm -rf $(VENV); fi
	@[ -x $(BIN)/python ] || { printf "making $(VENV) "; $(PYTHON) -m venv $(VENV) & made=$$!; \
		while kill -0 $$made 2>/dev/null; do printf .; sleep 1; done; echo; wait $$made; }
	@# pip 25.1 and later show what they install.
	@$(BIN)/python -c 'import sys, pip; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))' || \
		$(PIP) --upgrade 'pip>=25.1' || true
	@if ! $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then \
		if [ -n "$(TORCH_INDEX)" ]; then \
			echo "installing into $(VENV): PyTorch from $(TORCH_INDEX), then the rest"; \
			$(PIP) 'torch>=2.9' --index-url $(TORCH_INDEX); \
		elif [ "$$(uname -s)" = Linux ]; then \
			echo "installing about 6.3 GB into $(VENV), most of it PyTorch's wheel with CUDA."; \
			echo "Without a GPU, stop here (Ctrl-C) and type:"; \
			echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo"; \
		fi; fi

$(STAMP): pyproject.toml | venv
	$(PIP) -e .
	@touch $@

$(STAMP)-test: pyproject.toml | venv
	$(PIP) -e '.[test]'
	@touch $@ $(STAMP)

$(STAMP)-dev: pyproject.toml | venv
	$(PIP) -e '.[test,dev]'
	@touch $@ $(STAMP) $(STAMP)-test

$(STAMP)-docs: pyproject.toml | venv
	$(PIP) -e '.[docs]'
	@touch $@ $(STAMP)
