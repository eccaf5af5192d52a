# make demo    a whole run on the embedded model and data, from nothing
# make test    the test suite, from nothing
# make flat    memory over 1,000 updates; `make test` makes 150
# make kills   kills and faults in a training, each gone on with and compared (15 minutes); `make test` does some of them
# make bench   the benchmarks, whose results are kept in benchmarks/results (about an hour)
# make check   formatting, lint, types, then the tests: what CI runs

PYTHON ?= python3
# Linux with an NVIDIA GPU: make demo EXTRA=cuda
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test flat kills check format bench clean

demo: $(VENV)/installed
	$(BIN)/mlx-qlora train --demo --overwrite

test: $(VENV)/installed-dev
	$(BIN)/pytest

flat: $(VENV)/installed-dev
	MLX_QLORA_UPDATES=1000 $(BIN)/pytest tests/test_memory.py -k flat

kills: $(VENV)/installed-dev
	$(BIN)/python tests/kills.py

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(VENV)/installed
	$(BIN)/python benchmarks/frozen_matmul.py
	$(BIN)/python benchmarks/prepare_million.py
	$(BIN)/python benchmarks/memory_7b.py
	$(BIN)/python benchmarks/kept_states.py
	$(BIN)/python benchmarks/recorder.py
	$(BIN)/python benchmarks/phases.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/recorder.py

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; this is " + sys.version.split()[0] + ". Name one: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA)]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
