# Each target does its own set-up in .venv; nothing but Python is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint format

quickstart: .venv/run  ## the main job in minutes; make quickstart ARGS=--full for all of it
	$(BIN)/python quickstart.py $(ARGS)

test: .venv/dev  ## the test suite; make test ARGS="-k resume" for a part
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/run: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
