# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-lowest lint docs clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dynmix needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## A semi-dynamic pretraining run beside its static prior, with a report: runs/demo
	$(BIN)/dynmix demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-lowest:  ## What meets transformers and accelerate, with the oldest of them that pyproject.toml declares
	$(PYTHON) -m venv build/venv-lowest
	build/venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	# That transformers' own Trainer cannot load an optimizer's state in several processes on CPUs.
	build/venv-lowest/bin/python -m pytest tests/callbacks tests/influence tests/recipe tests/test_docs.py \
		tests/test_tasks.py --deselect \
		tests/callbacks/test_trainer.py::test_a_run_goes_on_with_other_processes_workers_and_batches

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## These pages and the reference, with warnings as errors: build/docs/index.html
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

clean:
	rm -rf $(VENV) build *.egg-info runs
