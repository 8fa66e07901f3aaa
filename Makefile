# World-Env in two commands, on Linux and macOS:
#
#     make train        set up, then train with 5 demonstrations a task
#     make test         set up, then run the tests
#
# The three notebooks, run anew and rendered to docs/*.html:    make notebooks
# Extra arguments go through ARGS:         make train ARGS="--preset debug"
# Another interpreter, 3.10 to 3.13:       make setup PYTHON=python3.12
# The CPU build of torch (see requirements.txt; on Linux without an NVIDIA GPU it saves GBs):
#     make setup PIP_TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# From another folder: make -C path/to/this/folder test

PYTHON ?= python3
VENV ?= .venv
PIP_TORCH_ARGS ?=
ARGS ?=

STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.notebook-tools
RUN := "$(VENV)/bin/python"
PIP := $(RUN) -m pip --disable-pip-version-check

.PHONY: train test test-all lint setup notebooks notebook-tools clean-venv
.DEFAULT_GOAL := setup

train: setup
	$(RUN) cli.py train --demos 5 $(ARGS)

test: setup
	$(RUN) -m pytest $(ARGS)

# `make test` leaves out the tests marked slow (pyproject.toml); here they run as well.
test-all: setup
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# Style needs no renderer, only the packages.
lint: $(STAMP)
	$(RUN) -m ruff check . $(ARGS)

setup: $(STAMP)
	$(RUN) doctor.py --ensure-renderer

notebooks: setup notebook-tools
	$(RUN) notebooks/to_html.py $(ARGS)

# With these `make test` runs the notebooks too, at debug size.
notebook-tools: $(TOOLS)

clean-venv:
	rm -rf "$(VENV)"

# The packages, once, and again whenever requirements.txt changes. torch goes first and alone, so
# that accelerate finds it installed and does not fetch another build. An old pip (the 22 and 23
# that come with Python 3.10) loses its way in the pins below, so pip itself is renewed before.
$(STAMP): requirements.txt
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
	$(PIP) install --quiet --upgrade pip
	$(PIP) install $(PIP_TORCH_ARGS) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install --quiet -r requirements.txt
	@touch "$@"

$(TOOLS): requirements-notebooks.txt $(STAMP)
	$(PIP) install --quiet -r requirements-notebooks.txt
	@touch "$@"
