# Few targets: setup demo test lint protos starter. Everything runs in .venv, which `setup` makes.
SHELL := bash
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: setup demo test lint protos settings starter

setup: $(VENV)/.installed

# controlnet_aux is the reference that tests compare with. Its own dependencies would pull a torchvision that does not
# load beside the CPU build of torch, and the submodules that the tests import do not need them.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps controlnet-aux==0.0.10
	touch $@

demo: setup
	$(VENV)/bin/python demo/run.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=docker $(VENV)/bin/mypy docker/size_audit.py docker/audit
	$(VENV)/bin/lint-imports

test: lint
	$(VENV)/bin/pytest

protos:
	scripts/protos.sh

settings: setup
	PYTHONPATH=. $(VENV)/bin/python scripts/settings.py > docs/settings.md

# Trains the starter model anew, every stage that has no result yet: hours on two cores. Needs npm for the pictures.
starter: setup
	$(PIP) install --quiet --constraint constraints.txt --editable '.[training]'
	$(VENV)/bin/python -m training.all
