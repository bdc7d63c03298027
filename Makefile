# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
# Constraints for pip, e.g. to pin a CPU build of torch: make test CONSTRAINTS=constraints-cpu.txt
CONSTRAINTS ?=
RUN ?= runs/demo
COVERAGE ?=
BIN := $(VENV)/bin
# Where it is set, every process would compile torch and diffusers anew: twice the time of each start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long coverage install lint docs notebooks release clean

install: $(VENV)/.installed

# Most modules are never imported: those that are get compiled once, by their first import; halves the time.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[test,docs]"
	@touch $@

# Distils the built-in teacher into one step, exports, loads in stock diffusers, measures, writes a report.
demo: install
	@$(BIN)/fewstep train demo --output $(RUN)
	@echo
	@echo "Look:               $(RUN)/report.html, in a browser"
	@echo "Draw:               $(BIN)/fewstep sample $(RUN) --prompt 'red apple' --prompt owl --num 4 --scale 2"
	@echo "Measure with more:  $(BIN)/fewstep resume $(RUN) --evaluation.num 500 --evaluation.named 500"
	@echo "Train for longer:   $(BIN)/fewstep train emoji_dmd2_1step"
	@echo "Your own pipeline:  $(BIN)/fewstep recipes copy sdxl_dmd2_4step .    then docs/guides/own-sdxl.md"

test: install
	$(BIN)/python -m pytest --slow -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# With those of half a minute and more, for which others stand in `make test`.
test-long: install
	$(BIN)/python -m pytest --slow --long -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The fast tests, and the lines that they never reach; COVERAGE="--slow -n 4" adds the slow ones.
coverage: install
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html $(COVERAGE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site of its own, to be opened from the disk; nothing comes from a network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo site/index.html

# The notebooks, executed from top to bottom and stored with what they show; ten minutes of one core.
notebooks: install
	$(BIN)/python notebooks/execute.py

# An sdist and of it a wheel, in dist/, checked as an index would.
release: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[release]"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage* htmlcov
