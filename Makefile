# Every target does its own set-up; a second run finds it done and needs no network. `make` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
PEERS := benchmarks/kvpress
PEERS_PY := $(PEERS)/.venv/bin/python
MODEL := demo
WINDOWS :=
TRIALS := 24
BUDGET := 0.3
ARGS :=

# nothing is reported to anyone
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Ray listens on every interface, so nobody without the token may talk to it
export RAY_AUTH_MODE := token

# what pip prints that is worth reading: large downloads, the installation, errors
FETCHED := s/^ *Downloading ([^ ]+) \(([0-9.]+ [MG]B)\)$$/  fetching \1 (\2)/p; s/^Installing collected packages: .*/  installing/p
PIP_INSTALL := -m pip --disable-pip-version-check install --no-input --progress-bar off
PIP := $(PY) $(PIP_INSTALL)
QUIETLY := quietly() { "$$@" 2> >(grep -vE '^(WARNING|DEPRECATION)|\[notice\]|^$$' >&2) | sed -nuE '$(FETCHED)'; }

# tests run side by side: one thread each, which does not spin while it waits
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1

.PHONY: help setup assets test test-unit drill soak lint docs search serve bench fidelity windows peers ui clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY) ## make the environment in .venv

$(READY): pyproject.toml constraints.txt
	@works() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }; \
	if ! works $(PY); then \
		for python in $(or $(PYTHON),python3.11 python3.12 python3 python); do works $$python && break || python=; done; \
		if [ -z "$$python" ]; then \
			echo 'No Python 3.11 or 3.12 that can make an environment was found; install one (on Debian: apt-get install' \
				'python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 setup' >&2; exit 2; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); \
	fi
	@$(QUIETLY); \
	echo 'installing torch'; \
	quietly $(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"; \
	echo 'installing baklava and what it needs'; \
	quietly $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

assets: $(READY) ## fetch and convert the demo's model and texts
	@$(PY) -m baklava.data.demo_assets

test-unit: setup assets ## run the unit tests (two minutes on two cores)
	@$(TEST_ENV) $(PY) -m pytest -n 2 tests/unit tests/test_layout.py $(ARGS)

test: setup assets ## run every test but drills and the soak (twelve minutes on two cores)
	@export $(TEST_ENV); none=0; \
	part() { $(PY) -m pytest "$$@" $(ARGS) || { code=$$?; [ $$code = 5 ] || exit $$code; none=$$((none + 1)); }; }; \
	part -n 2 -m 'not ray and not drill'; part -m 'ray and not drill'; \
	[ $$none -lt 2 ] || { echo 'no test was selected' >&2; exit 5; }

drill: setup assets ## kill nodes, drivers, servers and disks under real searches, replicas under load (15 minutes)
	@$(TEST_ENV) $(PY) -m pytest -m 'drill and not soak' $(ARGS)

soak: setup assets ## ask a server for half an hour, and see that it stays inside its promises
	@$(TEST_ENV) $(PY) -m pytest -s -m soak $(ARGS)

lint: $(READY) ## check style and types
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

docs: $(READY) ## build the documentation into site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

search: setup assets ## find a plan for the demo model and register it (more options in ARGS=)
	@$(PY) jobs/search.py --trials $(TRIALS) --budget $(BUDGET) $(ARGS)

serve: setup assets ## serve the champion among the plans for the demo model
	@$(PY) jobs/serve.py --plan models:/baklava-demo@champion --model demo $(ARGS)

bench: setup assets ## time decode and prefill against transformers' own cache (up to two hours)
	@OMP_NUM_THREADS=2 $(PY) jobs/benchmark.py decode $(ARGS) && OMP_NUM_THREADS=2 $(PY) jobs/benchmark.py prefill $(ARGS)

fidelity: setup assets ## score every method at every budget on unseen text, into docs/benchmarks (an hour)
	@$(PY) jobs/benchmark.py fidelity --json docs/benchmarks/fidelity.json --page docs/benchmarks/fidelity.md $(ARGS)

# kvpress allows no transformers as new as ours, so it lives apart; torch first, the same that is in .venv already
$(PEERS)/.venv/ready: $(PEERS)/requirements.txt | $(READY)
	@echo "making $(PEERS)/.venv"; $(PY) -m venv --clear $(PEERS)/.venv
	@$(QUIETLY); \
	echo 'installing torch'; \
	quietly $(PEERS_PY) $(PIP_INSTALL) "$$(grep '^torch==' $<)"; \
	echo 'installing kvpress and what it needs'; \
	quietly $(PEERS_PY) $(PIP_INSTALL) -r $<
	@touch $@

windows: # before anything is installed for nothing
	@if [ ! -f '$(WINDOWS)' ]; then \
		echo "WINDOWS='$(WINDOWS)' is not a file; give token windows: make peers WINDOWS=FILE.json (see $(PEERS)/README.md)" >&2; \
		exit 2; \
	fi

peers: windows setup assets $(PEERS)/.venv/ready ## score kvpress's presses on token windows (WINDOWS=FILE.json, MODEL=)
	@model='$(MODEL)'; if [ "$$model" = demo ]; then \
		model=$$($(PY) -c 'from baklava.data.demo_assets import demo_model; print(demo_model())'); \
	fi; \
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(PEERS_PY) -m benchmarks.kvpress.cli --model "$$model" --windows '$(WINDOWS)' $(ARGS)

ui: setup ## open MLflow on the searches, at http://127.0.0.1:5000
	@data=$$($(PY) -c 'from baklava.paths import data_dir; print(data_dir())'); mkdir -p "$$data"; \
	echo "MLflow on $$data/mlflow.db: http://127.0.0.1:5000 (up in about 15 s; Ctrl-C ends it)"; \
	$(VENV)/bin/mlflow server --backend-store-uri "sqlite:///$$data/mlflow.db" \
		--artifacts-destination "$$data/mlartifacts" --host 127.0.0.1 --port 5000 --workers 1 $(ARGS)

clean: ## remove the environment and what tools left here; downloads and results stay
	rm -rf $(VENV) $(PEERS)/.venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
