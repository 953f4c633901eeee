# Fresh machine: Python 3.11 and make are enough. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(STAMP)
	$(BIN)/python demo/run.py

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=subscriber $(BIN)/mypy --config-file pyproject.toml -p taktsight_subscribe
	$(BIN)/python -m pytest tests/unit tests/contract tests/test_architecture.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml subscriber/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[trainer,openvino,onnxruntime,demo,dev]' --editable './subscriber[postgresql]'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info subscriber/build subscriber/*.egg-info
