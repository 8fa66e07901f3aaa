# World-Env in two commands, on Linux and macOS:
#
#     make train        set up, then train with 5 demonstrations a task
#     make test         set up, then run the tests
#
# A dream from the small run that comes with the project:       make example
# The three notebooks, run anew and rendered to docs/*.html:    make notebooks
# Extra arguments go through ARGS:         make train ARGS="--preset debug --out runs/debug"
# Another interpreter, 3.10 to 3.13:       make setup PYTHON=python3.12
# The oldest packages that will do:        make test-minimum
# To keep the packages in order:           make constraints licences audit
# The CPU build of torch (see requirements.txt; on Linux without an NVIDIA GPU it saves GBs):
#     make setup PIP_TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# From another folder: make -C path/to/this/folder test

PYTHON ?= python3
VENV ?= .venv
MINIMUM_VENV ?= .venv-minimum
PIP_TORCH_ARGS ?=
ARGS ?=

STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.notebook-tools
OPTIONAL := $(VENV)/.optional-tools
SUPPLY := $(VENV)/.supply-tools
RUN := "$(VENV)/bin/python"
PIP := $(RUN) -m pip --disable-pip-version-check
# Two processes share the files of tests, each on a core of its own (tests/conftest.py).
PYTEST := -m pytest -n 2 --dist loadfile

.PHONY: train example test test-all test-minimum lint setup notebooks notebook-tools clean-venv
.PHONY: optional-tools constraints licences audit
.DEFAULT_GOAL := setup

train: setup
	$(RUN) cli.py train --demos 5 $(ARGS)

# shipped/example.md says what it is.
example: setup
	$(RUN) unpack.py shipped/example.tar.xz runs
	$(RUN) cli.py imagine runs/example $(ARGS)

test: setup
	$(RUN) $(PYTEST) $(ARGS)

# `make test` leaves out the tests marked slow (pyproject.toml); here they run as well.
test-all: setup
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# The tests with the oldest versions that World-Env supports, in an environment of its own. What
# these need in turn comes as new as they allow. Only the tests that ask for the pinned versions
# themselves are left out.
test-minimum:
	test -x "$(MINIMUM_VENV)/bin/python" || $(PYTHON) -m venv "$(MINIMUM_VENV)"
	"$(MINIMUM_VENV)/bin/python" -m pip install --quiet --upgrade pip
	"$(MINIMUM_VENV)/bin/python" -m pip install $(PIP_TORCH_ARGS) \
	    "$$(grep '^torch==' requirements-minimum.txt)"
	"$(MINIMUM_VENV)/bin/python" -m pip install --quiet -r requirements-minimum.txt
	"$(MINIMUM_VENV)/bin/python" $(PYTEST) -m "not slow and not pinned" $(ARGS)

# Style and types need no renderer, only the packages.
lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

setup: $(STAMP)
	$(RUN) doctor.py --ensure-renderer

notebooks: setup notebook-tools
	$(RUN) notebooks/to_html.py $(ARGS)

# With these `make test` runs the notebooks too, at debug size.
notebook-tools: $(TOOLS)

# With these it runs the tests of HDF5, LeRobot and LoRA too.
optional-tools: $(OPTIONAL)

# Every version of constraints.txt anew, for all Pythons and systems at once, from the direct
# dependencies in requirements*.txt; what still fits stays, unless ARGS=--upgrade. The libraries of
# NVIDIA and triton stay out: torch names the ones that its build needs, and other builds of the
# same torch need others or none.
constraints: $(SUPPLY)
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.10 --annotation-style line \
	    --custom-compile-command "make constraints" $(ARGS) --output-file constraints.txt \
	    $$(ls requirements*.txt | grep -v minimum)
	grep -vE '^(nvidia|cuda|triton)' constraints.txt > constraints.new
	mv constraints.new constraints.txt

# docs/licences.md. Only what is installed says its licence, so this installs everything, LIBERO's
# hundreds of megabytes too.
licences: $(SUPPLY)
	for file in $$(ls requirements-*.txt | grep -v minimum); do \
	    $(PIP) install --quiet -r "$$file" -c constraints.txt || exit 1; \
	done
	$(RUN) tests/list_licences.py

# Asks PyPI for known vulnerabilities of what constraints.txt pins. --strict: a package that it
# cannot be asked about is a failure, not a pass.
audit: $(SUPPLY)
	$(RUN) -m pip_audit --strict --disable-pip --no-deps -r constraints.txt $(ARGS)

clean-venv:
	rm -rf "$(VENV)"

# The packages, once, and again whenever their list changes. torch goes first and alone, so that
# accelerate finds it installed and does not fetch another build; and without constraints.txt, since
# the index of the CPU build has few versions of what torch needs: the next line puts them right.
# An old pip (the 22 and 23 that come with Python 3.10) loses its way in the pins below, so pip
# itself is renewed before. pip would compile the packages to bytecode one after the other; that is
# done at the end instead, on all cores (files for other Pythons, which some bring, do not compile).
$(STAMP): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "World-Env needs Python 3.10 to 3.13; try: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    package=$$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])'); \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq; apt-get install -y -qq "$$package"; \
	    else \
	        echo "Python's venv module is missing; run: sudo apt-get install -y $$package"; \
	        exit 1; \
	    fi; }
	test -x $(RUN) || $(PYTHON) -m venv "$(VENV)"
	$(PIP) install --quiet --upgrade pip -c constraints.txt
	$(PIP) install --no-compile $(PIP_TORCH_ARGS) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install --quiet --no-compile -r requirements.txt -c constraints.txt
	@$(RUN) -m compileall -qq -j 0 "$(VENV)/lib" || true
	@touch "$@"

$(TOOLS): requirements-notebooks.txt $(STAMP)
	$(PIP) install --quiet -r requirements-notebooks.txt -c constraints.txt
	@touch "$@"

$(OPTIONAL): requirements-data.txt requirements-gpu.txt $(STAMP)
	$(PIP) install --quiet -r requirements-data.txt -c constraints.txt
	$(PIP) install --quiet --no-deps -r requirements-gpu.txt
	@touch "$@"

$(SUPPLY): requirements-tools.txt $(STAMP)
	$(PIP) install --quiet -r requirements-tools.txt -c constraints.txt
	@touch "$@"
