# Two commands are enough: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
# Processes that run the tests, one thread each.
WORKERS ?= 2

.PHONY: demo test test-slow lint docs docs-reference options clean

demo: $(VENV)/.installed
	$(BIN)/lapora demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/; a warning is an error. NO_MKDOCS_2_WARNING: an advertisement of the theme.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The page of the command line is written from the code; a test fails where they differ.
docs-reference: $(VENV)/.installed
	$(BIN)/typer lapora.cli.app utils docs --name lapora --title "Command line" --output docs/reference/cli.md

# The option classes of the Python API are written from lapora/config.py; a test fails where they differ.
options: $(VENV)/.installed-dev
	$(BIN)/python tools/make_options.py
	$(BIN)/ruff format --quiet src/lapora/options.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache lapora-demo
