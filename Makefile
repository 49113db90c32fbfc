# One file of habits. `make demo` and `make test` install what they need into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DURATION ?= 180
DATA ?= ../shared/data
PEER ?= ../shared/peers/freshness_lightgbm.py
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Each worker is a process of its own: without cached bytecode every start compiles torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench bench-quality setup format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON="; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -c constraints.txt -e '.[cpu,minilm,replay,dev]'
	@touch $@

demo: setup  ## simulated users on a real Kafka, a live view in the terminal
	$(BIN)/millstream demo --duration $(DURATION)

test: setup  ## every test, integration on a real Kafka included
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: setup  ## ruff, mypy strict, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not integration"

bench: setup  ## the table of docs/benchmarks.md, measured here and now
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

bench-quality: setup  ## AUC on ../shared/data by feedback delay, with the LightGBM peer beside it
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quality_table $(DATA) --peer $(PEER)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .millstream .pytest_cache .mypy_cache .ruff_cache
