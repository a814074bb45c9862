# Every target installs what it needs into a virtual environment, except `gpu` and `gpu-train`.
# VENV: the virtual environment. PYTHON: the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip
RUN = $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
CPP = $(wildcard csrc/*.h csrc/*/* tests/helpers/simt/*.h tests/helpers/simt/*.cpp)
SETTINGS = setup.py pyproject.toml CMakeLists.txt $(CONSTRAINTS)

.PHONY: train test test-quick test-all test-triton bench lint docs gpu gpu-train clean

train: $(VENV)/for-train
	$(VENV)/bin/sid train --dataset digits --epochs 10 --out runs/digits --overwrite

# One process per core with one thread each; a test that needs more threads sets their number.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n auto --dist worksteal --timeout 1800

test: $(VENV)/for-test
	$(PYTEST)

test-quick: $(VENV)/for-test
	$(PYTEST) -m "not slow and not aot and not processes"

test-all: $(VENV)/for-test
	$(PYTEST) -m ""

# The targets of the Triton kernels that `make test` leaves out.
test-triton: $(VENV)/for-test
	$(PYTEST) -m "slow and aot"

bench: $(VENV)/for-test
	$(RUN) -m pytest bench/ --benchmark-only

lint: $(VENV)/for-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy

docs: $(VENV)/for-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

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

# What each use needs of pyproject.toml's extras.
EXTRAS_train = trainer
EXTRAS_test = trainer,test,recipes
EXTRAS_lint = trainer,lint
EXTRAS_docs = docs

$(VENV)/for-%: $(SETTINGS) $(wildcard csrc/*.h csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) -e ".[$(EXTRAS_$*)]"
	touch $@

clean:
	rm -rf build $(VENV) sid_kernels/*.so *.egg-info
