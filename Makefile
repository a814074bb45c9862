# `make train`, `make test`, `make bench` and `make gpu` do all set-up themselves.
# VENV: the virtual environment they use and make. PYTHON: the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip
RUN = $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
SETTINGS = setup.py pyproject.toml CMakeLists.txt $(CONSTRAINTS)

.PHONY: train test bench gpu lint clean

train: $(VENV)/installed
	$(VENV)/bin/sid train --dataset digits --epochs 10 --out runs/digits --overwrite

test: $(VENV)/installed
	$(RUN) -m pytest tests

bench: $(VENV)/installed
	$(RUN) -m pytest bench/ --benchmark-only

# On a machine with CUDA; needs no network: it uses the machine's own Python with PyTorch, not $(VENV).
gpu:
	$(PYTHON) bench/gpu.py

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: $(SETTINGS) $(wildcard csrc/*.h csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) -e ".[vision,test]"
	touch $@

clean:
	rm -rf build $(VENV) sid_kernels/*.so *.egg-info
