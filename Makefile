# Each target does its own set-up in .venv; nothing but Python is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
INPUTS ?= 100000
# Tests side by side, one on each core, four at most; those that share runs stay together.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

.PHONY: quickstart test check fuzz bench results lint format

quickstart: .venv/run  ## the main job in minutes; ARGS=--full for all of it, DEPLOY=1 with an export to ONNX and int8
	$(if $(DEPLOY),$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-deploy.txt)
	$(BIN)/python quickstart.py $(ARGS)

test: .venv/dev  ## the test suite; make test ARGS="-k resume" for a part
	$(PYTEST) $(ARGS)

check: lint  ## in a minute: the linter, and the tests that need no training
	$(PYTEST) -m "not training and not slow" $(ARGS)

fuzz: .venv/dev  ## damaged files for the readers, 100,000 each, and 200 kills of a run; make fuzz INPUTS=1000 for less
	FUZZ_INPUTS=$(INPUTS) $(BIN)/python -m pytest -s tests/test_fuzz.py $(ARGS)
	FUZZ_KILLS=200 $(BIN)/python -m pytest tests/test_run_checkpoints.py -k random_instants

bench: .venv/run  ## what a step costs against the looped way, into benchmarks/; ARGS="--device cuda --output_dir DIR"
	$(BIN)/python benchmarks/bench.py $(ARGS)

results: .venv/run  ## the experiment of docs/does-emd-help.md, which resumes, into results/; needs GLUE's CoLA and STS-B
	$(BIN)/python quickstart.py --data_only --full
	mkdir -p model/raw/SST-2 && cp model/quickstart/data/*.tsv model/raw/SST-2
	$(BIN)/python experiments/split_data.py --data_dir model/raw --tasks SST-2 --test_rows 2570 --train_rows 6500 \
	  --output_dir model/splits
	$(BIN)/python experiments/split_data.py --data_dir glue_data --tasks CoLA,STS-B --output_dir model/splits
	$(BIN)/python experiments/run_suite.py plans/does-emd-help-beta.toml --output_dir model/does-emd-help-beta
	$(BIN)/python experiments/run_suite.py plans/does-emd-help.toml --output_dir model/does-emd-help
	$(BIN)/python experiments/compare_results.py model/does-emd-help --figure divergence agreement score \
	  --output_dir model/does-emd-help/results --keep_runs results/runs
	$(BIN)/python experiments/compare_results.py results/runs --figure divergence agreement score --no_speed

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

.venv/dev: .venv/run $(wildcard requirements-*.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
