# `make` prints what there is to do. Every target works on a fresh clone that has Python 3.10 or newer and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce test test-all cuda results depth lab docs bench check readme dist clean

PYTHON ?= python3
OLDEST := 3.10
BIN := .venv/bin
PRESET ?= quick
TORCH ?=
# An installation is out of date when one of these files changes. The stamps hold a digest: dates mean nothing in a fresh checkout.
DIGEST := $(shell cat settings.ini setup.py pyproject.toml | cksum | tr ' ' -)
LIBRARY := .venv/.library-$(DIGEST)
DEV := .venv/.dev-$(DIGEST)
DOCS := .venv/.docs-$(DIGEST)
BENCH := .venv/.bench-$(DIGEST)
PINNED := .venv/.pinned-$(DIGEST)
# An environment that was made at another path (the clone was moved or copied), or whose Python does not start, is made anew.
ifneq ($(wildcard .venv/.made),)
ifneq ($(shell cat .venv/.made; $(BIN)/python -c 'print("starts")' 2>/dev/null),$(realpath .venv) starts)
$(shell rm -f .venv/.made .venv/.library-* .venv/.dev-* .venv/.docs-* .venv/.bench-* .venv/.pinned-*)
endif
endif

help:  ## print this list
	@echo 'wib_nbdev: make TARGET [PYTHON=python3] [PRESET=quick|paper] [TORCH=cpu]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(LIBRARY)  ## create .venv, install, run the reproduction (PRESET=paper: the full one)
	@$(BIN)/python -m wib_nbdev reproduce --preset $(PRESET)

test: $(DEV)  ## create .venv, install, run every notebook and the tests: minutes
	@$(BIN)/python -m pytest -n auto

test-all: $(BENCH) $(DOCS)  ## the slow tests too: killed processes, full disks, many networks, the browser: an hour or more
	@$(BIN)/python -m pytest -n auto --run-slow

cuda: $(BENCH)  ## on a machine with a CUDA device: its tests, its notebook cells, and a benchmark
	@$(BIN)/python tools/cuda.py --root data

results: $(PINNED)  ## run what the full reproduction lacks (hours; resumes), and merge it
	@$(BIN)/python -m wib_nbdev data --download > /dev/null
	@$(BIN)/python tools/merge_results.py run

depth: $(PINNED)  ## run chapter 9's experiment again (15 hours of one core; resumes), and merge it
	@$(BIN)/python -m wib_nbdev data --download > /dev/null
	@$(BIN)/python tools/merge_results.py depth

lab: $(DEV)  ## open JupyterLab on the notebooks
	@$(BIN)/python -m jupyterlab nbs/index.ipynb

docs: $(DOCS)  ## build the documentation site in _docs
	@$(BIN)/python docs/build.py

bench: $(BENCH)  ## run the benchmarks beside their peers, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

check: $(DEV)  ## export and clean are no-ops; lint and types pass
	@$(BIN)/python tests/check_generated.py
	@$(BIN)/python docs/readme.py --check
	@$(BIN)/ruff check nbs tests benchmarks docs tools setup.py wib_nbdev
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
	@cd .venv && pwd -P > .made

pip = $(BIN)/python -m pip install --quiet --disable-pip-version-check
define install
	@echo 'Installing $(1) into .venv (minutes the first time: torch is large) ...'
	@if [ "$(TORCH)" = cpu ]; then $(pip) torch torchvision --index-url https://download.pytorch.org/whl/cpu; fi
	@$(pip) $(2) --editable '$(1)' || { \
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

# The versions that the committed runs were made with, so that a new release cannot void them half-way.
$(PINNED): constraints.txt | .venv/.made
	$(call install,.,--constraint constraints.txt)
	@touch $(LIBRARY)

comma := ,
