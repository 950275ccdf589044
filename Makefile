# Everything starts here; a machine with Python 3.11 or later and make is enough.
#   make quickstart   trains a small language model on the documentation of Python itself
#   make test         the fast tests;  make test-all  the slow ones too;  make lint  ruff and mypy
PYTHON ?= python3
VENV   ?= .venv
WORKDIR ?= runs/quickstart
BIN    := $(VENV)/bin
INSTALL = if command -v uv >/dev/null; \
	then uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[$(EXTRAS)]"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"; fi

.PHONY: quickstart test test-all lint clean

quickstart: $(VENV)/.run
	$(BIN)/lmtrain run --config experiments/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "slow or not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@if command -v uv >/dev/null; then uv venv --quiet --python $(PYTHON) $(VENV); else $(PYTHON) -m venv $(VENV); fi

$(VENV)/.run: EXTRAS = report,tensorboard
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lmtrain into $(VENV) (once)"
	@$(INSTALL)
	@touch $@

$(VENV)/.test: EXTRAS = test
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lmtrain and what its tests need into $(VENV) (once)"
	@$(INSTALL)
	@touch $@ $(VENV)/.run
