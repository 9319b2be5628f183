# Needs Linux, make, Python >= 3.11 and a package index. Everything is installed into .venv.

# CUDA 13 packages where the driver supports them, CUDA 12 elsewhere, also without a GPU. EXTRA=cuda12 or cuda13 decides.
# What is installed already stays.
EXTRA ?= $(or $(patsubst .venv/installed-%,%,$(firstword $(wildcard .venv/installed-*))),$\
	$(if $(shell nvidia-smi 2>/dev/null | grep 'CUDA Version: 1[3-9]'),cuda13,cuda12))
# The first Python on the PATH that is new enough. PYTHON=/path/to/python decides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed-$(EXTRA)

.PHONY: setup demo test gpu-check format clean

setup: $(INSTALLED)

# The stamp comes last: an interrupted installation starts again.
$(INSTALLED): setup.cfg pyproject.toml constraints/$(EXTRA).txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one or give PYTHON=/path/to/python" >&2; exit 2; }
	@# The two kinds of CUDA packages cannot share an environment.
	test -z "$$(ls .venv/installed-* 2>/dev/null | grep -v -- '-$(EXTRA)$$')" || rm -rf .venv
	rm -f .venv/installed-*
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA),demo,test]' -c constraints/$(EXTRA).txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/mammostream demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The tests that compare GPU and CPU, and the measurements, in under 8 minutes.
gpu-check: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python benchmarks/gpu_check.py --output-dir runs/gpu-check

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs *.egg-info
