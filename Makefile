# make demo   a fresh machine: makes .venv, installs, converts the embedded model, shows it off, writes a report
# make test   a fresh machine: makes .venv, installs, lints, runs the whole suite
# make lint   ruff and mypy
# make floor  the suite again on the oldest supported torch and transformers, in .venv-floor
#
# On Linux without an NVIDIA GPU torch's build for CPUs is taken where pip's indexes have one (name PyTorch's own index for
# CPUs in PIP_EXTRA_INDEX_URL); TORCH=any takes the usual build.
#
# Python 3.11 or newer is looked for; name one with: make test PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PACKAGE := hildanext/backend
VENV := .venv
FLOOR := .venv-floor
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# torch 2.4.1 was built for Python 3.12 and older.
FLOOR_PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
TORCH ?= $(shell [ "$$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && echo cpu || echo any)
# $(call torch,VENV,VERSION): torch's build for CPUs, where that is wanted, none is there yet and the index has one. VERSION
# is the beginning of a version, or nothing for the newest.
define torch
@$(1)/bin/python -c 'import torch' 2>/dev/null || { [ "$(TORCH)" = cpu ] \
	&& version=$$($(1)/bin/python -m pip index versions torch --disable-pip-version-check 2>/dev/null \
	| grep -o '[0-9][0-9.]*+cpu' | grep '^$(2)' | head -1) && echo "torch $$version, without the libraries of CUDA" \
	&& $(1)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$$version"; } \
	|| echo "torch as the package index has it: on Linux with the libraries of CUDA, 3 to 6 GB"
endef
DECLARED := $(PACKAGE)/pyproject.toml

.PHONY: demo test lint floor install clean

demo: $(VENV)/.installed
	$(VENV)/bin/hildanext run hildanext/runs/configs/demo.json

test: lint
	$(VENV)/bin/python hildanext/test/run_tests.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python hildanext/test/run_tests.py

install: $(VENV)/.installed

$(VENV)/.installed: $(DECLARED)
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer with venv was found: install one, or name it with PYTHON=..." >&2; exit 2; }
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(call torch,$(VENV),)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '$(PACKAGE)[test]'
	touch $@

$(FLOOR)/.installed: $(DECLARED) $(PACKAGE)/floor.txt
	@[ -n "$(FLOOR_PYTHON)" ] || { echo "error: the oldest torch needs Python 3.11 or 3.12: install one, or name it with FLOOR_PYTHON=..." >&2; exit 2; }
	[ -x $(FLOOR)/bin/python ] || $(FLOOR_PYTHON) -m venv $(FLOOR)
	$(call torch,$(FLOOR),2.4.1)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PACKAGE)/floor.txt -e '$(PACKAGE)[test]'
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR)
