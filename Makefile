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

.PHONY: setup demo test docs gpu-check gpu-rehearsal format clean

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
	@# Three processes keep two cores busy: some tests wait, for a killed process or a lost server.
	$(BIN)/python -m pytest -n 3 --dist loadfile

# The documentation site, in runs/site. Warnings, such as a broken link, are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site: $(CURDIR)/runs/site/index.html"

# The tests that compare GPU and CPU, and short measurements, in 6 minutes.
gpu-check: $(INSTALLED)
	$(BIN)/python benchmarks/gpu/check.py --output-dir runs/gpu-check

# The same without a GPU, as on a machine without a package index: the tests that need a GPU are collected, those beside them
# run, and both calls of the run sheet are tried small. UNDER="command" runs each step under a command that, for example,
# hides packages. MIAS=folder tries the pre-trainings on mini-MIAS too.
gpu-rehearsal: export MAMMOSTREAM_FILMS := $(CURDIR)/runs/small-films/unpacked
gpu-rehearsal: $(INSTALLED)
	rm -rf runs/small-films
	env -u MAMMOSTREAM_FILMS $(BIN)/python benchmarks/gpu/small_films.py pack runs/small-films/packed
	$(UNDER) $(BIN)/python benchmarks/gpu/small_films.py unpack runs/small-films/packed $$MAMMOSTREAM_FILMS
	$(UNDER) $(BIN)/python -m pytest -q -m gpu
	@# The small films have lost their grain: what one more lossy codec costs is bounded on the films themselves.
	$(UNDER) $(BIN)/python -m pytest -q -k 'not lossy_syntaxes' $$(grep -rl 'mark.gpu' tests --include='test_*.py')
	$(UNDER) $(BIN)/python benchmarks/gpu/check.py --output-dir runs/gpu-rehearsal --device cpu --tiny
	$(UNDER) $(BIN)/python benchmarks/gpu/check.py --output-dir runs/gpu-rehearsal --device cpu --tiny \
		--call second $(if $(MIAS),--mias $(MIAS))

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs *.egg-info
