# `make quickstart` is the tour, `make test` the proof. pip's own settings (PIP_INDEX_URL, pip.conf, ...) are honoured.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := $(BIN)/python -m pytest

# Threads that spin while they wait make a busy machine thirty times slower; on an idle one sleeping costs a fifth.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install quickstart test test-all check format docs bench pins clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "burnish needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart.py

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m ''

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: install
	$(BIN)/python docs/key_reference.py

bench: install
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

pins:
	rm -rf build/pins && $(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet --upgrade-strategy eager 'torch==2.13.0' '.[dev]'
	{ sed '/^[^#]/d' constraints.txt; build/pins/bin/python -m pip freeze | grep -vE '^(burnish|cuda-|nvidia-|triton)' | sed 's/+[a-z0-9.]*$$//'; } > build/pins.txt
	mv build/pins.txt constraints.txt

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
