# make help | make run | make test | make test-slow | make test-ui | make bench | make ui | make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# An index of CPU builds of torch saves gigabytes on a machine without a GPU; empty takes pip's own.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
# pip compiles with one process. Like pip, this passes over files that are no Python any more.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
RECIPE ?= tiny
# The files of tests that run side by side; those that take longest begin.
TEST_PROCESSES ?= 2
SLOWEST_FIRST := tests/kernels/test_interpreted.py tests/faults tests/kernels/test_gpu_code.py tests/model
# A folder's files one by one, where some of them began: pytest takes a file out that lies in a folder it is given.
SLOWEST_FIRST += $(filter-out $(SLOWEST_FIRST) tests/kernels %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
SLOWEST_FIRST += $(filter-out $(SLOWEST_FIRST),$(wildcard tests/kernels/test_*.py))

.NOTPARALLEL: # else two targets install into one folder at once
.PHONY: help run test coverage test-slow test-ui lint types layers bench bench-corpus bench-kernels ui clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy setuptools wheel packaging psutil ninja py-cpuinfo $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --no-build-isolation deepspeed
	touch $@

$(VENV)/installed: $(VENV)/base pyproject.toml
	$(PIP) --no-build-isolation -e .
	$(COMPILE)
	touch $@

$(VENV)/installed-dev: $(VENV)/base pyproject.toml
	$(PIP) --no-build-isolation -e ".[dev]"
	$(COMPILE)
	touch $(VENV)/installed $@

run: $(VENV)/installed ## install, then run the recipe `tiny` from raw text to the report
	$(BIN)/gristmill run $(RECIPE)

test: $(VENV)/installed-dev lint types layers ## everything that is checked by default
	$(BIN)/pytest -m "not slow and not ui" -q --durations=15 -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(SLOWEST_FIRST)

coverage: $(VENV)/installed-dev ## which lines the default tests run in their own process
	$(BIN)/pytest -m "not slow and not ui" -q --cov=gristmill --cov-report=term:skip-covered

test-slow: $(VENV)/installed-dev ## minutes long: kills in every stage on S3 too, the Prefect server
	$(BIN)/pytest -m "slow and not ui" -q

test-ui: $(VENV)/installed-dev ## the Prefect UI in headless Chromium (needs a chromium on the PATH)
	$(BIN)/pytest -m ui -q

lint: $(VENV)/installed-dev ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev ## pyright
	mkdir -p $(VENV)/layout/gristmill
	for room in flows data model kernels infra; do ln -sfn ../../../$$room $(VENV)/layout/gristmill/$$room; done
	$(BIN)/pyright

layers: $(VENV)/installed-dev ## import-linter: who may import whom
	$(BIN)/lint-imports

bench: $(VENV)/installed-dev ## does `tiny` learn, in what time and memory (three cold runs)
	$(BIN)/python bench/demo.py

bench-corpus: $(VENV)/installed-dev ## the corpus stages against datatrove, rensa, tokenizers (three quarters of an hour)
	for name in dedup filter spans tokenize loader; do OMP_NUM_THREADS=1 $(BIN)/python -P bench/$$name.py || exit 1; done

bench-kernels: $(VENV)/installed-dev ## the kernels against their peers, and a plot of each in build/kernels
	mkdir -p build/kernels
	$(BIN)/python -P -m gristmill.kernels.bench --json | tee build/kernels/result.txt
	$(BIN)/python -P bench/plot_kernels.py build/kernels/result.txt --out build/kernels

ui: $(VENV)/installed ## the Prefect UI with the deployments
	$(BIN)/gristmill ui

clean: ## remove what was installed and built; the store in .gristmill stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .import_linter_cache
