# Shortcuts; everything they run can be run by hand.
PYTHON ?= python3

.PHONY: lint test matrix docs census

lint:            ## style, formatting and the direction of imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as lint; lint()"

test:            ## unit tests, as many processes as cores
	$(PYTHON) -m pytest -m "not engine and not large" -n auto --maxprocesses 4 --dist loadfile

matrix:          ## real engines in two processes
	$(PYTHON) -m pytest -m engine

census:          ## every architecture of transformers; writes docs/supported_models.md
	$(PYTHON) scripts/census.py --write

docs:            ## what documentation is made of measurements
	$(PYTHON) scripts/settings_table.py
	$(PYTHON) scripts/messages.py
	$(PYTHON) scripts/picture.py
	$(PYTHON) scripts/bench/peak_memory.py
