# Two commands: `make lpa` runs the default experiment, `make test` checks everything. Both set up .venv themselves.
PYTHON ?= python3
WORKDIR ?= runs/lpa
BIN := .venv/bin

.PHONY: lpa test lint docs litert coreml clean

# The stamp of an install depends on what it installs, so that an edit of setup.py reinstalls.
.venv/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "edgespeech needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

lpa: .venv/installed
	$(BIN)/python -m experiments.lpa_librispeech --workdir=$(WORKDIR) --resume

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile

docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict --site-dir site

# Exports whose tools do not go with the rest, each in an environment of its own: .venv-litert/bin/edgespeech export ...
.venv-%/installed: setup.py
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

litert coreml: %: .venv-%/installed

clean:
	rm -rf .venv .venv-litert .venv-coreml build dist site *.egg-info .pytest_cache .ruff_cache
