# Everything happens in .venv; nothing has to be installed before but Python 3.11 or later.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-lowest test-newest lint format typecheck bench clean

demo: $(VENV)/.installed
	$(BIN)/core-rerank demo

test: $(VENV)/.installed
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow

# The ends of the version ranges in pyproject.toml, each in an environment of its own.
test-lowest: LIMITS := -c constraints-lowest.txt
test-newest: LIMITS := torch==2.13.0
test-lowest test-newest:
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install $(LIMITS) --upgrade -e ".[test]"
	.venv-$@/bin/python -m pytest -m "not slow" --ignore tests/test_examples.py \
		--ignore tests/test_cli.py --ignore tests/test_evaluation.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/transformers_backend.py

clean:
	rm -rf $(VENV) .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
