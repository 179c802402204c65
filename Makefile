# Everything is one command away: git, make and Python 3.11 to 3.13 are all that has to be there.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
GPTQ ?= runs/qlora-merged-base-gptq
PORT ?= 8000
AGQ := .venv-auto-gptq
# The Hub and telemetry are asked for nothing.
export HF_HUB_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export TOKENIZERS_PARALLELISM := false
export GPTQMODEL_CPU_WORKERS ?= 2
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup run rag select prompting gate people test check lab docs serve interop clients lock results seeds browser clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv and install what the lock files pin

# A failed set-up leaves failed.txt, so that the last line is what to do and not the number of an error.
NO_PYTHON = $(PYTHON) is not a command here: name a Python 3.11, 3.12 or 3.13, such as `make setup PYTHON=python3.11`
install = mkdir -p $(2) && rm -f $(2)/failed.txt && if command -v '$(PYTHON)' >/dev/null; \
	then '$(PYTHON)' requirements/install.py $(1) || test -f $(2)/failed.txt; else echo '$(NO_PYTHON)' > $(2)/failed.txt; fi

$(VENV)/.installed: requirements/lock.txt requirements/carriers.txt requirements/install.py setup.py settings.ini
	@$(call install,main,$(VENV))

$(READY): $(VENV)/.installed
	@$(if $(shell cat $(VENV)/failed.txt 2>/dev/null),$(error $(shell cat $(VENV)/failed.txt)))llmops setup && touch $@

run: $(READY)  ## run the pipeline and show the leaderboard
	@llmops run

rag: $(READY)  ## index two corpora, tune on found passages, and answer with evidence
	@llmops rag

select: $(READY)  ## compare models behind servers and on this machine on your own questions
	@llmops select

prompting: $(READY)  ## find the best way to ask, and hold answers to spans of the passage
	@llmops prompting

gate: $(READY)  ## may the new version replace the one in service? ship, hold or reject
	@llmops gate

people: $(READY)  ## have people rate answers in the browser; prints a link for each rater
	@llmops people

test: SHELL := bash
test: export TIMEFORMAT = took %0lR
test: export OMP_NUM_THREADS = 1
test: $(READY) browser  ## run every check: notebooks, library, lint, types, docs, tests
	python -m llmops.tools.notebooks check
	python -m llmops.tools.pipeline deps --check
	ruff check llmops tests requirements
	time mypy
	time nbdev_test --n_workers 2
	time python -m llmops.tools.site build
	python -m llmops.tools.site check
	python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lab: $(READY)  ## open JupyterLab on the notebooks
	@llmops lab

docs: $(READY)  ## build the documentation site and serve it on 127.0.0.1
	@llmops docs

interop: $(READY) $(AGQ)/.ready  ## does AutoGPTQ 0.7.1 read our checkpoint? GPTQ=runs/...
	python tests/interop_auto_gptq.py $(GPTQ) --python $(AGQ)/bin/python

$(AGQ)/.installed: requirements/auto-gptq.txt requirements/install.py
	@$(call install,auto-gptq,$(AGQ))

$(AGQ)/.ready: $(AGQ)/.installed
	@$(if $(shell cat $(AGQ)/failed.txt 2>/dev/null),$(error $(shell cat $(AGQ)/failed.txt)))touch $@

clients: $(READY)  ## do LangChain, LlamaIndex, LiteLLM and OpenAI's packages talk to our server?
	test -d .venv-clients || '$(PYTHON)' -m venv .venv-clients
	.venv-clients/bin/pip install -q -r requirements/clients.txt
	if command -v npm >/dev/null; then npm install --silent --prefix .venv-clients/npm openai; fi
	python tests/interop_clients.py

serve: $(READY)  ## serve the winner on 127.0.0.1:$(PORT)
	@llmops serve --port $(PORT)

seeds: $(READY)  ## two more seeds of the rows that the conclusion rests on (half an hour)
	llmops run params/seeds/dvc.yaml
	python -m llmops.studies.seeds runs/evaluation runs/seeds/43/evaluation runs/seeds/44/evaluation

results: $(READY)  ## keep the last run's figures in the notebooks, the README and the site
	python -m llmops.tools.notebooks carry
	mkdir -p nbs/results
	cp runs/leaderboard/leaderboard.json runs/leaderboard/leaderboard.md runs/leaderboard/leaderboard.svg nbs/results/
	@test ! -f runs/seeds/spread.md || for f in md json; do cp runs/seeds/spread.$$f nbs/results/seeds.$$f; done
	@test ! -f runs/answering/scores.json || python -m llmops.retrieval.answering report nbs/results/rag.md
	python -m llmops.studies.lifecycle
	llmops show
	python -m llmops.tools.site readme

browser:  # the browser that the tests drive
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	echo "no Chromium found: install it with your system's package manager; the browser tests need it"

lock:  ## resolve requirements/*.in again into requirements/lock.txt and auto-gptq.txt
	@'$(PYTHON)' requirements/install.py lock

clean:  ## remove what runs and builds left; votes, history, keys and feedback stay
	@if command -v llmops >/dev/null; then llmops clean; else rm -rf _docs _proc build dist; fi
