# Two commands do everything: `make demo` and `make test`. Both set themselves up.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python

.PHONY: help setup demo test lint bench proto lock clean
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready  ## make .venv (does nothing when it is there)

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	@scripts/setup $(VENV)
	@touch $@

demo: setup  ## the main job on this machine, without gateway, OPA server or internet
	@$(PY) examples/demo.py

test: setup  ## the whole suite
	@scripts/test

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: setup  ## measure beside stock mitmdump, in one run
	@$(PY) -m bench

proto: setup  ## generate the protobuf messages from proto/
	@$(PY) scripts/generate_proto.py

lock: setup  ## resolve the requirements anew, with hashes and without addresses
	@scripts/lock $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
