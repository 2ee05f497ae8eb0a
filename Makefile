## make demo           a fresh machine to a picture: five encodings trained on real text, their curves compared
## make test           a fresh machine to a tested one: lint, types, tests
## make test-all       the slow tests too
## make test-oracles   goldens against live PyTorch and transformers
## make study          six encodings trained, tuned and measured as in Wang et al. 2024, into docs/study.md
## make study SIZE=10m|100m|1b LENGTH=512|1024|2048   the same with five encodings on GPUs, into docs/study_SIZE_LENGTH.md
## make length-study SIZE=small|paper   tasks, encodings and seeds of Kazemnejad et al. 2023, into docs/length_generalization.md
## make benchmarks     attention, training and decoding on this machine, beside torch where it is installed, into docs/performance.md
## make smollm2        a published model read to 32,768 tokens, extended and tested, into docs/smollm2.md
## make pods           compiles decoders for slices of TPUs and for GPUs, hours of one core: the tables of docs/pods.md
## make constraints    after an upgrade, for each supported PYTHON: writes down what was installed
## make clean          removes environments and caches

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
CONSTRAINTS := $(wildcard constraints/$(VERSION).txt)
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oracles lint study length-study smollm2 benchmarks pods constraints clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# The versions of constraints/ are those it was tested with; a Python without such a file gets the newest that fit.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

$(BIN)/.installed: requirements.txt pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later, please: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt
	@touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

ENCODINGS := nope rope alibi t5 learned
RUNS := runs/demo

demo: $(BIN)/.installed
	@echo "Training $(ENCODINGS), two at a time: a few minutes."
	@$(MAKE) --no-print-directory --jobs 2 $(ENCODINGS:%=demo-%)
	$(BIN)/python eval.py --workdirs $(addprefix $(RUNS)/,$(ENCODINGS)) --lengths 128 256 512 1024 2048 --out $(RUNS)/report
	@echo "The picture: $(RUNS)/report/perplexity.png, $(RUNS)/report/entropy.png; all of it: $(RUNS)/report/report.html"

# A model this small leaves a second core idle: two runs at once take less time than one after the other. Each writes to
# a file, whose last lines are shown at once when it is done: GNU make 3.81, which macOS has, cannot keep two outputs
# apart.
demo-%: $(BIN)/.installed
	@mkdir -p $(RUNS)
	@echo "$*: trains, and writes to $(RUNS)/$*.log"
	@$(BIN)/python train.py --config configs/tiny.py --workdir $(RUNS)/$* --model.encoding $* > $(RUNS)/$*.log 2>&1 || \
		{ echo "`tail -n 20 $(RUNS)/$*.log; echo $*: failed`"; exit 1; }
	@echo "$*: `tail -n 1 $(RUNS)/$*.log`"

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process takes whole files, so that what the tests of a module share, runs and compiled programs, is made once.
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile

test: lint
	$(PYTEST)

# Apart from the rest: where JAX finds the TPU or GPU compiler without a TPU or GPU, every command complains that there
# is none. The GPU compiler needs none of NVIDIA's libraries.
TPU := $(abspath $(VENV))/tpu
$(TPU)/.installed: $(BIN)/.installed
	libtpu=$$($(BIN)/python -c "from importlib.metadata import requires; print(*[r.split(';')[0] for r in requires('jax') if r.startswith('libtpu')])") && \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TPU) "$$libtpu"
	@touch $@

CUDA := $(abspath $(VENV))/cuda
$(CUDA)/.installed: $(BIN)/.installed
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(CUDA) "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
	@touch $@

test-all: lint $(TPU)/.installed $(CUDA)/.installed
	$(PYTEST) -m 'not tpu and not cuda and not oracle'
	PYTHONPATH=$(CURDIR):$(TPU) $(BIN)/pytest -m tpu
	PYTHONPATH=$(CURDIR):$(CUDA) $(BIN)/pytest -m cuda

test-oracles: $(BIN)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[oracles]'
	$(BIN)/pytest -m oracle

study: $(BIN)/.installed
	@$(MAKE) --no-print-directory --jobs 2 --file benchmarks/study/Makefile PYTHON=$(BIN)/python

SIZE ?= small
length-study: $(BIN)/.installed
	$(BIN)/python -m benchmarks.length_study.study --size $(SIZE) $(if $(STEPS),--steps $(STEPS))

smollm2: $(BIN)/.installed
	$(PIP) --editable '.[interop]'
	@$(MAKE) --no-print-directory --file benchmarks/smollm2/Makefile PYTHON=$(BIN)/python

benchmarks: $(BIN)/.installed
	for name in attention train_step encodings long_context decoding; do $(BIN)/python -m benchmarks.$$name || exit; done
	$(BIN)/python -m benchmarks.page

pods: $(BIN)/.installed $(TPU)/.installed $(CUDA)/.installed
	PYTHONPATH=$(CURDIR):$(TPU):$(CUDA) $(BIN)/python -m benchmarks.pods

constraints: $(BIN)/.installed-test
	mkdir -p constraints
	$(BIN)/pip freeze --exclude-editable > constraints/$(VERSION).txt

clean:
	rm -rf .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
