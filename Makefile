# Fresh machine: Python 3.11 and make are enough. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# make install, bundle, deb, sbom: which engine, for which machine
ENGINE ?= openvino
ARCH ?= x86_64
PYTHONS ?= 3.11 3.12 3.13 3.14
PREFIX ?= /opt/taktsight
STATION ?=
OPTIONS ?=
SERVICE ?= pypi
TOOLS := build/tools
TOOLS_STAMP := $(TOOLS)/.installed

.PHONY: demo test test-parts test-line lint check format docs clean install lock sbom audit bundle deb producer

demo: $(STAMP)
	$(BIN)/python demo/run.py $(if $(CAMERA),--camera $(CAMERA))

# Two halves side by side: what computes, and what waits for brokers, cameras and services
test: $(STAMP)
	$(MAKE) --jobs=2 --output-sync=target --no-print-directory test-parts test-line

test-parts: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/contract

test-line: $(STAMP)
	$(BIN)/python -m pytest --ignore=tests/unit --ignore=tests/contract

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=subscriber $(BIN)/mypy --config-file pyproject.toml -p taktsight_subscribe

check: lint
	$(BIN)/python -m pytest tests/unit tests/contract tests/test_architecture.py tests/test_locks.py tests/test_threat_model.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The page of station.yaml's keys, from the code that reads them
docs: $(STAMP)
	$(BIN)/python docs/make_reference.py

$(STAMP): pyproject.toml subscriber/pyproject.toml
	@echo "installing into $(VENV): 2 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[trainer,openvino,onnxruntime,genicam,modbus,gpio,demo,dev]' --editable './subscriber[postgresql]'
	touch $@

# The GenTL producer and the line simulator, from their C sources into build/gentl: agent/gentl/README.md
producer:
	$(MAKE) -C agent/gentl BUILD=$(CURDIR)/build/gentl

# As root: make install STATION=cell7 OPTIONS='--camera gige'
install:
	test -x $(PREFIX)/bin/python || $(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python -m pip install --quiet --require-hashes -r locks/agent-$(ENGINE).txt
	rm -rf build/lib
	$(PREFIX)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(if $(STATION),$(PREFIX)/bin/taktsight-agent install $(STATION) --prefix $(PREFIX) $(OPTIONS))

# Keeps the versions that are locked and fit; UPGRADE=--upgrade takes the newest. Hashes are those of PyPI
COMPILE = $(TOOLS)/bin/uv pip compile --no-config --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--only-binary :all: --generate-hashes --custom-compile-command 'make lock' $(UPGRADE)
# PyTorch for the CPU is not on PyPI: it is installed first, by hand (docs/install.md)
NOT_FOR_CPU = $$(sed -nE 's/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==.*/--no-emit-package \1/p' locks/trainer.txt)
# Cameras and gates, 3 MB together: what runs beside the line has them, with either engine
BESIDE_THE_LINE := --extra genicam --extra modbus --extra gpio
lock: $(TOOLS_STAMP)
	$(COMPILE) locks/tools.in -o locks/tools.txt
	$(COMPILE) --extra trainer --extra openvino pyproject.toml -o locks/trainer.txt
	$(COMPILE) --extra trainer --extra openvino -c locks/trainer.txt $(NOT_FOR_CPU) \
		pyproject.toml -o locks/trainer-cpu.txt
	$(COMPILE) --extra openvino $(BESIDE_THE_LINE) -c locks/trainer.txt pyproject.toml -o locks/agent-openvino.txt
	$(COMPILE) --extra onnxruntime $(BESIDE_THE_LINE) -c locks/trainer.txt pyproject.toml -o locks/agent-onnxruntime.txt
	$(COMPILE) --extra genicam -c locks/agent-openvino.txt pyproject.toml -o locks/agent-genicam.txt

# Of a fresh environment, as the lock has it; x86-64 and aarch64 have the same packages
sbom: $(TOOLS_STAMP)
	$(TOOLS)/bin/python packaging/sbom.py --engine $(ENGINE)

# Fails as well where the database of vulnerabilities does not know a package, or is out of reach. SERVICE: pypi | osv
audit: $(TOOLS_STAMP)
	$(TOOLS)/bin/python packaging/audit.py --service $(SERVICE)

bundle: sbom
	$(TOOLS)/bin/python packaging/bundle.py --arch $(ARCH) --engine $(ENGINE) --pythons $(PYTHONS)

deb: bundle
	$(TOOLS)/bin/python packaging/deb.py --arch $(ARCH) --engine $(ENGINE)

$(TOOLS_STAMP): locks/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --require-hashes -r locks/tools.txt
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info subscriber/build subscriber/*.egg-info
