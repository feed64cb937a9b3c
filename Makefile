# `make run` sets up .venv and runs the main job; `make test` also builds Horovod and runs all tests but the long ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The oldest versions have wheels for Python 3.11, and not for all that came after it.
OLDEST := .venv-oldest
export TF_CPP_MIN_LOG_LEVEL ?= 2
export KERAS_BACKEND := tensorflow

.PHONY: run text report test test-long test-oldest test-keras conformance lint bench docs figures screenshots package saved-model clean

run: $(VENV)/.package
	$(BIN)/keras-dwd run

# The short form of summarization, then translation. TEXT_DIR has the tasks as JSONL files.
TEXT_DIR ?= $(KERAS_DWD_TEXT_DIR)
text: $(VENV)/.text
	@test -n "$(TEXT_DIR)" || { echo "name the folder of the tasks: make text TEXT_DIR=…"; exit 1; }
	$(BIN)/keras-dwd run --scenario text:summarize,translate --data-dir "$(TEXT_DIR)" \
	  --methods finetune,ewc,dwd --strength ewc=10000 --seeds 1 --examples 800

# The comparison of `make run` as a page to look at: report.html.
report: $(VENV)/.plots
	$(BIN)/keras-dwd run --out results.json --report report.html

test: lint $(VENV)/.horovod
	KERAS_DWD_REQUIRE_HOROVOD=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not long"

# Real crashes, several hosts, many damaged files.
test-long: $(VENV)/.horovod $(VENV)/.docs
	KERAS_DWD_REQUIRE_HOROVOD=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m long

# With exactly the lowest versions that pyproject.toml allows, without Horovod.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 -m "not long"

# Keras' own tests, on wrapped models. KERAS_REPO names a checkout of Keras at the installed version,
# if not the tests inside the installed package.
test-keras: $(VENV)/.dev
	$(BIN)/python scripts/keras_tests.py $(if $(KERAS_REPO),--repo $(KERAS_REPO))

# Writes docs/conformance.md.
conformance: $(VENV)/.dev
	$(BIN)/python tests/conformance.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours; wants CIFAR-100 prepared for tensorflow-datasets where TFDS_DATA_DIR says.
bench: $(VENV)/.dev
	$(BIN)/keras-dwd run --out benchmarks/results/run_default.json
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/text_cost.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/fisher_cost.py
	$(BIN)/python benchmarks/grouping_cost.py
	$(BIN)/python benchmarks/retention.py --parts
	$(BIN)/python benchmarks/policy.py
	$(BIN)/python benchmarks/streams.py
	$(BIN)/python benchmarks/strength.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/crash.py
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/checkpoint_cost.py
	$(BIN)/python benchmarks/import_cost.py
	$(BIN)/python benchmarks/misuse.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python scripts/make_figures.py

# The pages of docs/ as a site in build/docs; a warning or a broken link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pictures of the README and docs/, from benchmarks/results.
figures: $(VENV)/.dev
	$(BIN)/python scripts/make_figures.py

# The pictures of the terminal and of the report page in docs/; the latter needs Chromium.
screenshots: $(VENV)/.dev
	$(BIN)/python scripts/make_screenshots.py

# The wheel and the source distribution, in dist.
package: $(VENV)/.packaging
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The model in saved_models, with its card.
saved-model: $(VENV)/.package
	$(BIN)/python scripts/make_saved_model.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { echo "on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.package: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[experiments]"
	touch $@

$(VENV)/.text: $(VENV)/.package
	$(PIP) -e ".[experiments,text]"
	touch $@

$(VENV)/.plots: $(VENV)/.package
	$(PIP) -e ".[experiments,plots]"
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) -e ".[dev,experiments,export,plots,text]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)/.packaging: $(VENV)/.package
	$(PIP) -e ".[package]"
	touch $@

$(OLDEST)/bin/python:
	python3.11 -m venv $(OLDEST) || { echo "Python 3.11 is needed, with venv"; rm -rf $(OLDEST); exit 1; }

$(OLDEST)/.dev: $(OLDEST)/bin/python pyproject.toml scripts/oldest_pins.py
	$(OLDEST)/bin/python scripts/oldest_pins.py dev experiments export plots > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(OLDEST)/constraints.txt -e ".[dev,experiments,export,plots]"
	touch $@

$(VENV)/.horovod: $(VENV)/.dev scripts/build_horovod.py
	$(BIN)/python scripts/build_horovod.py --constraint constraints.txt
	touch $@
