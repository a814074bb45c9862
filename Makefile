# `make train`, `make test`, `make bench` and `make gpu` do all set-up themselves.
# VENV: the virtual environment they use and make. PYTHON: the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip
RUN = $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
CPP = $(wildcard csrc/*.h csrc/*/* tests/helpers/simt/*.h tests/helpers/simt/*.cpp)
# What the type checker finds no error in; `make types` checks everything.
TYPED = sid_kernels $(addprefix sid_trainer.,network methods distributed training.trainer training.strategy)
SETTINGS = setup.py pyproject.toml CMakeLists.txt $(CONSTRAINTS)

.PHONY: train test test-quick test-all docs types bench gpu gpu-train lint clean

train: $(VENV)/installed
	$(VENV)/bin/sid train --dataset digits --epochs 10 --out runs/digits --overwrite

# One process a core, one thread each: what a case needs beyond that it sets itself.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto tests

test: $(VENV)/installed
	$(PYTEST)

test-quick: $(VENV)/installed
	$(PYTEST) -m "not slow and not aot and not processes"

test-all: $(VENV)/installed
	$(PYTEST) -m ""

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

types: $(VENV)/installed
	$(VENV)/bin/mypy

bench: $(VENV)/installed
	$(RUN) -m pytest bench/ --benchmark-only

# On a machine with CUDA; needs no network: it uses the machine's own Python with PyTorch, not $(VENV).
gpu:
	$(PYTHON) bench/gpu/gpu.py

# There, too: SID and backpropagation on CIFAR-10 at full size, into one table a network. DATA: its files.
DATA ?= data/cifar
EPOCHS ?= 8
gpu-train:
	for arch in resnet18 vit_tiny; do $(PYTHON) -m sid_trainer compare --arch $$arch --layouts stagewise \
	--methods sid bp --seeds 0 --dataset cifar10 --data $(DATA) --epochs $(EPOCHS) --batch-size 512 --dtype bfloat16 \
	--device cuda --out runs/gpu-$$arch || exit; done

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy --follow-imports=silent $(TYPED:%=-p %)

$(VENV)/installed: $(SETTINGS) $(wildcard csrc/*.h csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) -e ".[trainer,test,lint,docs]"
	touch $@

clean:
	rm -rf build $(VENV) sid_kernels/*.so *.egg-info
