# Every target sets up what it needs. A second run finds that done and needs no network. `make` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
MODEL := demo
WINDOWS :=
PEERS := $(if $(WINDOWS),kvpress,kvpress openvino)
TRIALS := 24
BUDGET := 0.3
ARGS :=

# No telemetry.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Ray listens on every interface and runs code for anyone who reaches it, so require a token.
export RAY_AUTH_MODE := token

# Of pip's output, show large downloads, the start of the installation, and errors.
FETCHED := s/^ *Downloading ([^ ]+) \(([0-9.]+ [MG]B)\)$$/  fetching \1 (\2)/p; s/^Installing collected packages: .*/  installing/p
PIP_INSTALL := -m pip --disable-pip-version-check install --no-input --progress-bar off
PIP := $(PY) $(PIP_INSTALL)
QUIETLY := quietly() { "$$@" 2> >(grep -vE '^(WARNING|DEPRECATION)|\[notice\]|^$$' >&2) | sed -nuE '$(FETCHED)'; }

# Tests run in parallel, so each process gets one thread, which does not spin while it waits. Those with Ray start
# processes of their own, so they run one by one, after the others.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1

.PHONY: help setup assets test test-unit drill soak lint docs search serve bench fidelity windows peers ui clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(READY) ## create the environment in .venv

$(READY): pyproject.toml constraints.txt
	@works() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }; \
	if ! works $(PY); then \
		for python in $(or $(PYTHON),python3.11 python3.12 python3 python); do works $$python && break || python=; done; \
		if [ -z "$$python" ]; then \
			echo 'no Python 3.11 or 3.12 with venv and pip was found; install one (on Debian: apt-get install' \
				'python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 setup' >&2; exit 2; \
		fi; \
		echo "creating $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); \
	fi
	@$(QUIETLY); \
	echo 'installing torch'; \
	quietly $(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"; \
	echo 'installing baklava and its dependencies'; \
	quietly $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

assets: $(READY) ## download and convert the demo model and texts
	@$(PY) -m baklava.data.demo_assets

test-unit: setup assets ## run the unit tests (five minutes on two cores)
	@$(TEST_ENV) $(PY) -m pytest -n 2 --dist worksteal -m 'not slow and not demo and not ray and not drill' tests/unit tests/test_layout.py $(ARGS)

test: setup assets ## run all tests except the drills and the soak test (seventeen minutes on two cores)
	@export $(TEST_ENV); none=0; \
	part() { \
		$(PY) -m pytest -o cache_dir=".pytest_cache/$$1" --lfnf none -m "$$1 and not drill" "$${@:2}" $(ARGS) || \
			{ code=$$?; [ $$code = 5 ] || exit $$code; none=$$((none + 1)); }; \
	}; \
	part 'not ray' -n 2 --dist worksteal; part ray; \
	[ $$none -lt 2 ] || { echo 'no tests were selected' >&2; exit 5; }

drill: setup assets ## run the drills: nodes, drivers, servers, disks and replicas fail during work (15 minutes)
	@$(TEST_ENV) $(PY) -m pytest -m 'drill and not soak' $(ARGS)

soak: setup assets ## load a server for half an hour and check that its memory stays bounded
	@$(TEST_ENV) $(PY) -m pytest -s -m soak $(ARGS)

lint: $(READY) ## check style and types
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

docs: $(READY) ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

search: setup assets ## search a plan for the demo model and register it (more options in ARGS=)
	@$(PY) jobs/search.py --trials $(TRIALS) --budget $(BUDGET) $(ARGS)

serve: setup assets ## serve the champion plan of the demo model
	@$(PY) jobs/serve.py --plan models:/baklava-demo@champion --model demo $(ARGS)

bench: setup assets ## time decode and prefill against transformers' own cache (up to two hours)
	@OMP_NUM_THREADS=2 $(PY) jobs/benchmark.py decode $(ARGS) && OMP_NUM_THREADS=2 $(PY) jobs/benchmark.py prefill $(ARGS)

fidelity: setup assets ## score every method at every budget on unseen text, into docs/benchmarks (three hours)
	@$(PY) jobs/benchmark.py fidelity --json docs/benchmarks/fidelity.json --page docs/benchmarks/fidelity.md $(ARGS)

# Peers require an older transformers, so each has its own environment. Its torch is the version in .venv.
benchmarks/%/.venv/ready: benchmarks/%/requirements.txt | $(READY)
	@echo "creating $(@D)"; $(PY) -m venv --clear $(@D)
	@$(QUIETLY); \
	echo 'installing torch'; \
	quietly $(@D)/bin/python $(PIP_INSTALL) "$$(grep '^torch==' $<)"; \
	echo 'installing $* and its dependencies'; \
	quietly $(@D)/bin/python $(PIP_INSTALL) $(PEER_OPTIONS) -r $<
	@touch $@

# Its requirements are complete without what only the export of other models needs.
benchmarks/openvino/.venv/ready: PEER_OPTIONS := --no-deps

windows: # checked before anything is installed
	@if [ -n '$(WINDOWS)' ] && [ ! -f '$(WINDOWS)' ]; then \
		echo "WINDOWS='$(WINDOWS)' is not a file; give token windows (see benchmarks/kvpress/README.md)" >&2; exit 2; \
	fi

peers: windows setup assets $(PEERS:%=benchmarks/%/.venv/ready) ## create the peers' environments (PEERS=); with WINDOWS=FILE.json score kvpress (MODEL=)
	@if [ -z '$(WINDOWS)' ]; then exit; fi; \
	model='$(MODEL)'; if [ "$$model" = demo ]; then \
		model=$$($(PY) -c 'from baklava.data.demo_assets import demo_model; print(demo_model())'); \
	fi; \
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 benchmarks/kvpress/.venv/bin/python -m benchmarks.kvpress.cli --model "$$model" \
		--windows '$(WINDOWS)' $(ARGS)

ui: setup ## open MLflow with all searches, at http://127.0.0.1:5000
	@data=$$($(PY) -c 'from baklava.paths import data_dir; print(data_dir())'); mkdir -p "$$data"; \
	echo "MLflow on $$data/mlflow.db: http://127.0.0.1:5000 (starts in about 15 s; Ctrl-C stops it)"; \
	$(VENV)/bin/mlflow server --backend-store-uri "sqlite:///$$data/mlflow.db" \
		--artifacts-destination "$$data/mlartifacts" --host 127.0.0.1 --port 5000 --workers 1 $(ARGS)

clean: ## remove the environments, builds and tool caches; downloads and results stay
	rm -rf $(VENV) benchmarks/*/.venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
