# moerator: `make demo` shows it, `make test` checks it, `make help` lists the rest. Needs Python 3.11+ and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
SOURCES := operator runtime tests

# One thread per process unless told otherwise: ranks are processes, and they share the cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# uv installs; bytecode is compiled here, since importing torch and transformers without it takes 20 s instead of 6.
$(VENV)/.uv:
	$(PYTHON) -c 'import sys; sys.exit("moerator needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@touch $@

$(VENV)/.run: $(VENV)/.uv pyproject.toml constraints.txt
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	  --constraint constraints.txt --editable '.[operator,runtime]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	  --constraint constraints.txt --editable '.[operator,runtime,dev]'
	@touch $@

.PHONY: setup
setup: $(VENV)/.dev  ## virtual environment with everything for development

.PHONY: demo
demo: $(VENV)/.run  ## train, serve, kill a rank, watch it heal; on this machine, no cluster
	$(BIN)/moerator demo

# Every tier runs, whatever became of the one before, and the sums come last.
.PHONY: test
test: $(VENV)/.dev  ## everything that CI checks
	@rm -rf .moerator/reports
	@failed=; for tier in lint types contracts fast integration cluster node gpu; do \
	  $(MAKE) --no-print-directory $$tier || failed="$$failed $$tier"; done; \
	  $(BIN)/python tests/summary.py || failed="$$failed tests"; \
	  if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

.PHONY: lint
lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

.PHONY: types
types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy operator/moe_core operator/moe_operator runtime/moe_runtime tests

.PHONY: contracts
contracts: $(VENV)/.dev  ## import-linter: the walls of the house
	$(BIN)/lint-imports

.PHONY: fast
fast: $(VENV)/.dev  ## unit, property and golden tests
	$(PYTEST) tests/unit tests/property tests/golden --junitxml=.moerator/reports/fast.xml

.PHONY: integration
integration: $(VENV)/.dev  ## real Ray, real Gloo, real processes, real kills
	$(PYTEST) tests/integration --junitxml=.moerator/reports/integration.xml

.PHONY: control-plane
control-plane: $(VENV)/.dev  ## build Kubernetes' own programs into the cache (once)
	$(BIN)/python tests/cluster/controlplane/build.py

.PHONY: cluster
cluster: control-plane  ## the operator on a real API server
	$(PYTEST) tests/cluster --junitxml=.moerator/reports/cluster.xml

.PHONY: cluster-up
cluster-up: control-plane  ## start that control plane and print its kubeconfig; Ctrl-C ends it
	PYTHONPATH=tests $(BIN)/python -m cluster.controlplane

.PHONY: node
node: $(VENV)/.dev  ## pods that really run: a real kubelet and containerd (needs root)
	$(PYTEST) tests/node --junitxml=.moerator/reports/node.xml

.PHONY: gpu
gpu: $(VENV)/.dev  ## kernels on a real GPU, equal to plain torch (skipped without one)
	TRITON_INTERPRET=0 $(PYTEST) tests/gpu --junitxml=.moerator/reports/gpu.xml

.PHONY: bench
bench: $(VENV)/.dev  ## measure against raw limits, as ratios in one run (figures, no verdicts)
	for bench in recovery planner topology growth experts_cpu ep_layer exchange training families gpu_moe gpu_gate; do PYTHONPATH=tests $(BIN)/python tests/bench/$$bench.py || exit 1; done

.PHONY: crds
crds: $(VENV)/.dev  ## write crds/ and the chart's copy from the models
	$(BIN)/moerator crds --write crds --write helm/moerator/crds

.PHONY: format
format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: constraints
constraints: $(VENV)/.uv  ## resolve the versions anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links pyproject.toml --output-file constraints.txt
	$(BIN)/uv --version | awk '{print "uv==" $$2}' >> constraints.txt

.PHONY: clean
clean:  ## remove what make made here
	rm -rf $(VENV) .moerator .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
