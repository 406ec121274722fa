# make demo | test | check | docs | bench ...: each sets up .venv first if need be. Start here: CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-web test-web-short snapshots coverage check docs docs-serve wheel bench clean

demo: $(VENV)/.installed  # prepare real text, train, resume, evaluate, sample
	$(BIN)/aios demo --root demo

test: $(VENV)/.installed  # every test but the browser's
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-web: $(VENV)/.installed-web  # the manager in a browser; needs chromium (Debian: apt-get install chromium)
	$(BIN)/python -m pytest tests/web

test-web-short: $(VENV)/.installed-web  # those of them that fit into a minute
	$(BIN)/python -m pytest tests/web/test_safety.py

snapshots: $(VENV)/.installed  # compare help, JSON, tree and versions with their files; SNAPSHOTS=update writes them again
	$(BIN)/python -m pytest tests/aios/cli/test_snapshots.py tests/docs/test_written.py

coverage: $(VENV)/.installed  # every test with coverage; no floor is set yet
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

check: $(VENV)/.installed  # lint and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  # the documentation site, into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(VENV)/.installed-docs  # the same at http://127.0.0.1:8000, followed as you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

wheel:  # build the wheel, install it alone into an empty venv, run the first commands
	$(PYTHON) tests/wheel.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[demo,plots,tensorboard,manager,parquet,zstd,dev]'
	@touch $@

$(VENV)/.installed-web $(VENV)/.installed-docs: $(VENV)/.installed-%: $(VENV)/.installed
	@$(PIP) --editable '.[$(if $(filter web,$*),web-tests,$*)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
