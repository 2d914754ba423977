# Two commands do everything: `make quickstart` and `make test`. Windows: see the README for the same steps in pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-slow lint clean

quickstart: .venv/.core
	$(BIN)/zero2llm quickstart $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .

.venv/.core: pyproject.toml constraints.txt
	@echo "setting up .venv (once; a few minutes)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) -e .
	@touch $@

.venv/.test: .venv/.core tests/oracles.txt
	$(PIP) -e ".[test]"
	$(PIP) --no-deps -r tests/oracles.txt
	@touch $@

clean:
	rm -rf .venv build *.egg-info
