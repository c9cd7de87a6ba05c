# Daily words. `make check` is what a change must pass; CI runs its last part, the tests.
# PYTHON names the interpreter: the checkout's own environment where run.sh made one.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
CODE = setup.py moss_jt converters kernels cli tests benchmarks docs examples

.PHONY: help setup check format-check lint types test slow fix docs bench clean

help:
	@echo "make setup | check | fix | test | slow | docs | bench | clean"

setup:  ## what check and fix need, into the environment of PYTHON
	$(PYTHON) -m pip install --quiet -e '.[test,dev]'

check: format-check lint types test

format-check:
	$(PYTHON) -m ruff format --check $(CODE)

lint:
	$(PYTHON) -m ruff check $(CODE)

types:
	$(PYTHON) -m mypy
	$(PYTHON) -m pyright

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest --slow

fix:
	$(PYTHON) -m ruff format $(CODE)
	$(PYTHON) -m ruff check --fix $(CODE)

docs:  ## docs/cli.md from the --help texts
	$(PYTHON) docs/make_cli.py

bench:
	$(PYTHON) benchmarks/import_time.py --save

clean:  ## build/ too: setuptools keeps deleted files there, and they would come back in a wheel
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
