# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
# Constraints for pip, e.g. to pin a CPU build of torch: make test CONSTRAINTS=constraints-cpu.txt
CONSTRAINTS ?=
RUN ?= runs/demo
BIN := $(VENV)/bin

.PHONY: demo test install lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[test]"
	@touch $@

# Distils the built-in teacher into one step, exports, loads in stock diffusers, evaluates, writes a report.
demo: install
	$(BIN)/fewstep train emoji_dmd2_1step --output $(RUN)

test: install
	$(BIN)/python -m pytest --slow -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
