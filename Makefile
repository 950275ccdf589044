# Everything starts here; a machine with Python 3.11 or later and make is enough.
#   make quickstart   trains a small language model on the documentation of Python itself
#   make test         the fast tests;  make test-all  the slow ones too;  make lint  ruff and mypy
#   make test-gpu    what only an NVIDIA GPU can show, where one is at hand and jax[cuda13] is installed
#   make test-notebooks   launch/colab from the first cell to the last
#   make test-peers   what needs PyTorch, TRL, lm-evaluation-harness or an S3 server, in an environment of its own
PYTHON ?= python3
VENV   ?= .venv
PEERS  ?= .venv-peers
WORKDIR ?= runs/quickstart
BIN    := $(VENV)/bin
INSTALL = if command -v uv >/dev/null; \
	then uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[$(EXTRAS)]"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"; fi

.PHONY: quickstart test test-all test-gpu test-notebooks test-peers lint clean

quickstart: $(VENV)/.run
	$(BIN)/lmtrain run --config experiments/quickstart.py --workdir $(WORKDIR)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "slow or not slow"

test-gpu: $(VENV)/.test
	LMTRAIN_TEST_DEVICE=gpu $(BIN)/python -m pytest -q tests/test_gpu.py

test-notebooks: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_notebooks.py

test-peers: $(PEERS)/.done
	$(PEERS)/bin/python -m pytest -q -rs -n 2 tests/objectives/test_trl.py tests/interop/test_transformers.py tests/eval/test_lm_eval.py
	$(PEERS)/bin/python -m pytest -q -rs -m slow tests/test_scattered.py -k s3

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@if command -v uv >/dev/null; then uv venv --quiet --python $(PYTHON) $(VENV); else $(PYTHON) -m venv $(VENV); fi

$(VENV)/.run: EXTRAS = chat,report,tensorboard
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lmtrain into $(VENV) (once)"
	@$(INSTALL)
	@touch $@

$(VENV)/.test: EXTRAS = test
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lmtrain and what its tests need into $(VENV) (once)"
	@$(INSTALL)
	@touch $@ $(VENV)/.run

# PyTorch first and by itself, by plain pip: its build without a GPU's libraries, which others would drag in.
$(PEERS)/.done: pyproject.toml constraints.txt
	@echo "installing PyTorch, TRL, lm-evaluation-harness and moto into $(PEERS) (once)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lm-eval]" trl==1.8.0 peft==0.21.2 requests
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt s3fs moto flask flask-cors
	@touch $@
