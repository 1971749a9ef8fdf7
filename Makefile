# make run     as root: processes starting, running programs, exiting, live, until Ctrl-C
# make test    install what the tests need, run all of them (as root; else what needs root is skipped)
# make lint    only style and types
# make bench   the figures of the README
# make image   the container image
# make clean   back to a fresh clone
#
# PYTHON=...   which Python to use, if not the one found by tests/find-python.sh

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
IMAGE ?= ringside:latest

.PHONY: run test lint bench image clean

run: $(VENV)/.installed
	@if [ "$$(id -u)" != 0 ]; then echo "make run: tracing the kernel needs root, as in: sudo make run" >&2; exit 1; fi
	@exec $(BIN)/ringside watch process

test: $(VENV)/.tools
	tests/setup.sh
	$(BIN)/python tests/run.py

lint: $(VENV)/.tools
	$(BIN)/tox run -q -e lint,types

bench: $(VENV)/.installed $(VENV)/.tools
	tests/setup.sh
	$(BIN)/python -m bench

# BASE=... an image with python3 that is there already; without it, debootstrap makes one
image: $(VENV)/.made
	PYTHON=$(BIN)/python deploy/image.sh $(IMAGE) $(BASE)

clean:
	rm -rf $(VENV) .tox build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f sensor/_perf*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: made once, and again when what they depend on has changed.

$(VENV)/.made: tests/find-python.sh
	@command -v $${CC:-gcc} >/dev/null || { echo "Ringside needs a C compiler: apt install gcc libc6-dev" >&2; exit 1; }
	python=$$(tests/find-python.sh) && $$python -m venv --clear $(VENV)
	@touch $@

# editable: a change in a .py file needs no new installation
$(VENV)/.installed: $(VENV)/.made pyproject.toml setup.py build_ffi.py $(wildcard sensor/_*.[ch])
	$(PIP) install --editable .
	@touch $@

$(VENV)/.tools: $(VENV)/.made
	$(PIP) install 'tox>=4.30'
	@touch $@
