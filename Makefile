# Everything a person or a CI machine runs. Needs make, git and Python >= 3.11 with its venv module; all else is installed into .venv.
#
#   make train    install what training needs, train examples/digits.yaml
#   make test     install the development tools too, run the whole suite (make test ARGS="tests/unit -k window" for a part)
#   make check    format, lint, types, generated code, wheel, deployment files: all that is not a test
#   make bench    the benchmarks of benchmarks/ (BENCH="name ..." for some of them)
#   make chaos    kill and pause real processes and disturb their frames for about an hour, and write what it cost into benchmarks/RESULTS.md (CHAOS="--runs 5 ..." for less)
#   make format   rewrite the sources as `make check` wants them
#   make proto    generate proto/*_pb2.py again from proto/*.proto
#   make clean    remove .venv and all that was built

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Many processes start here: each would compile all its modules anew.
unexport PYTHONDONTWRITEBYTECODE

# The first interpreter that is new enough; PYTHON=... says another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Without compiling: of all those modules a process needs a third, and compiles them when it first imports them.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
, := ,
# What a check says stays together, with a make that can do that.
TOGETHER := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
# No build isolation: the constraint file's setuptools (which torch needs anyway) builds the editable install, nothing is fetched twice.
define install
$(INSTALL) setuptools
$(INSTALL) --no-build-isolation --editable '.[$1]'
@$(BIN)/python -m compileall -q -j 0 layerwise server worker proto
@$(BIN)/python -c 'from layerwise.spare import warm_up; warm_up()'
endef
SPEC ?= examples/digits.yaml
ARGS ?=
BENCH ?=
CHAOS ?=
CLUSTER_TESTS := tests/chaos tests/integration
LATE_TESTS := $(wildcard tests/integration/test_res*.py tests/integration/test_[s-z]*.py)
FOLDERS := layerwise server worker proto tests benchmarks tools examples

.PHONY: help train test test-clusters test-others test-late check bench chaos venv dev format format-check lint types proto proto-check wheel-check deploy-check clean

help:
	@sed -n 's/^#   //p' Makefile

# ---- the environment: one stamp for each thing installed, so that it is installed once ----

.venv/created:
	@test -n "$(PYTHON)" || { echo "layerwise needs Python 3.11 or newer and found none: install it, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "layerwise needs Python 3.11 or newer; $(PYTHON) is %d.%d" % v[:2])'
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	@touch $@

.venv/run-time: .venv/created pyproject.toml constraints.txt
	$(call install,examples)
	@touch $@

# Where both are asked for (make -j venv dev), one after the other: they install into one folder.
.venv/development: .venv/created pyproject.toml constraints.txt | $(if $(filter train venv,$(MAKECMDGOALS)),.venv/run-time)
	$(call install,examples$(,)dev)
	@touch .venv/run-time $@

venv: .venv/run-time

dev: .venv/development

# ---- what people run ----

train: .venv/run-time
	$(BIN)/layerwise train $(SPEC) $(ARGS)

# The whole suite in three runs, two of them side by side, since processes that wait for each other leave much of two cores idle: tests
# that start a cluster, all others, which step back for them, and, when these have ended, the last of those that start a cluster. What the
# second and the third say is shown when all have ended.
test: .venv/development
ifneq ($(ARGS),)
	$(BIN)/python -m pytest $(ARGS)
else
	@mkdir -p build
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-clusters test-others test-late; status=$$?; \
		cat build/test-others.txt build/test-late.txt; exit $$status
endif

test-clusters:
	$(BIN)/python -m pytest $(CLUSTER_TESTS) $(addprefix --ignore=,$(LATE_TESTS))

test-others:
	@nice $(BIN)/python -m pytest $(addprefix --ignore=,$(CLUSTER_TESTS)) >build/test-others.txt 2>&1

test-late:
	@$(BIN)/python -m pytest $(LATE_TESTS) >build/test-late.txt 2>&1

bench: .venv/development
	$(BIN)/python -m benchmarks $(BENCH)

chaos: .venv/development
	$(BIN)/python -m benchmarks chaos $(CHAOS)

# ---- make check ----

check: .venv/development
	@$(MAKE) --no-print-directory --jobs=2 $(TOGETHER) format-check types lint proto-check wheel-check deploy-check

format: .venv/development
	$(BIN)/ruff format $(wildcard $(FOLDERS))
	$(BIN)/ruff check --fix-only --quiet $(wildcard $(FOLDERS))

format-check: .venv/development
	$(BIN)/ruff format --check $(wildcard $(FOLDERS))

lint: .venv/development
	$(BIN)/ruff check $(wildcard $(FOLDERS))

# mypy knows nothing of the folder mapping in pyproject.toml, so it reads a tree of links laid out as the packages are imported.
types: .venv/development
	@rm -rf build/types && mkdir -p build/types/layerwise
	@for path in layerwise/*; do ln -s "../../../$$path" build/types/layerwise/; done
	@ln -s ../../../server ../../../worker ../../../proto build/types/layerwise/
	cd build/types && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p layerwise

proto: .venv/development
	$(BIN)/python proto/generate.py

proto-check: .venv/development
	$(BIN)/python proto/generate.py --check
	@echo "generated code: up to date"

# An editable install shows modules that a wheel may lack, so the wheel is installed on its own and every module in it is imported.
wheel-check: .venv/development
	$(BIN)/python tools/check_wheel.py

deploy-check: .venv/development
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@if command -v promtool >/dev/null; then promtool check config deploy/prometheus/prometheus.yml; \
	else echo "promtool is not installed (Debian: apt install prometheus): deploy/prometheus/prometheus.yml was not checked" >&2; test -z "$$CI"; fi

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find $(wildcard $(FOLDERS)) -name __pycache__ -type d -prune -exec rm -rf {} +
