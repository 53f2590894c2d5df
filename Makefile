# `make` prints what there is to do. Every target works on a fresh clone that has Python 3.10 or newer and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce test results lab docs bench check readme dist clean

PYTHON ?= python3
OLDEST := 3.10
BIN := .venv/bin
PRESET ?= quick
# What decides whether an installation is out of date. The stamps hold a digest, so a fresh checkout's dates do not matter.
FACTS := settings.ini setup.py pyproject.toml
DIGEST := $(shell cat $(FACTS) | cksum | tr ' ' -)
LIBRARY := .venv/.library-$(DIGEST)
DEV := .venv/.dev-$(DIGEST)
DOCS := .venv/.docs-$(DIGEST)
BENCH := .venv/.bench-$(DIGEST)

help:  ## print this list
	@echo 'wib_nbdev: make TARGET [PYTHON=python3] [PRESET=quick|paper]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(LIBRARY)  ## create .venv, install, run the reproduction (PRESET=paper: the full one)
	@$(BIN)/wib-nbdev reproduce --preset $(PRESET)

test: $(DEV)  ## create .venv, install, run the notebooks' tests and pytest
	@$(BIN)/python tests/run_notebooks.py
	@$(BIN)/pytest

results: $(LIBRARY)  ## run what results/ lacks of the full reproduction (hours; resumes), and merge it there
	@$(BIN)/wib-nbdev data --download > /dev/null
	@$(BIN)/python results/make.py

lab: $(DEV)  ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs/index.ipynb

docs: $(DOCS)  ## build the documentation site in _docs
	@$(BIN)/python docs/build.py

bench: $(BENCH)  ## run the benchmarks beside their peers, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

check: $(DEV)  ## export and clean are no-ops; lint and types pass
	@$(BIN)/python tests/check_generated.py
	@$(BIN)/python docs/readme.py --check
	@$(BIN)/ruff check nbs tests benchmarks docs results setup.py
	@$(BIN)/mypy

readme: $(DEV)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

dist: $(DEV)  ## build the wheel and the sdist in dist
	@$(BIN)/python -m build

clean:  ## remove what the other targets made, but not data and runs
	@rm -rf .venv _docs _proc build dist wib_nbdev.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each way an installation can fail on a stranger's machine ends in one line that says what to do.
.venv/.made:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here: install Python $(OLDEST) or newer, or name yours with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' || { \
		echo "make: $$($(PYTHON) --version 2>&1) is too old: Python $(OLDEST) or newer is needed; name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: this Python has no venv: install it (Debian, Ubuntu: apt install python3-venv), or name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@touch $@

define install
	@echo 'Installing $(1) into .venv (minutes the first time: torch is large) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)' || { \
		echo "make: the installation failed (see above). Without a network, point pip at a folder of wheels with PIP_FIND_LINKS and PIP_NO_INDEX=1." >&2; exit 1; }
	@touch $@
endef

$(LIBRARY): | .venv/.made
	$(call install,.)

$(DEV): | .venv/.made
	$(call install,.[dev])
	@touch $(LIBRARY)

$(DOCS): $(DEV)
	$(call install,.[dev$(comma)docs])

$(BENCH): $(DEV)
	$(call install,.[dev$(comma)bench$(comma)cluster])

comma := ,
