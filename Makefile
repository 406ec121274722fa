# make demo | test | check | bench: each sets up .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# ... and make test-web, the page in a browser: it needs chromium (Debian: apt-get install chromium).
.PHONY: demo test test-web check bench clean

demo: $(VENV)/.installed
	$(BIN)/aios demo --root demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-web: $(VENV)/.installed
	@$(PIP) --editable '.[manager,web-tests]'
	$(BIN)/python -m pytest tests/web

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[demo,plots,tensorboard,manager,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
