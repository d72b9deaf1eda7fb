# Everything a newcomer needs. `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PREFECT_PORT ?= 4200
CONFIG ?= configs/demo.toml
# of `make image`: server | evaluator | worker
IMAGE ?= server
# of `make test`; one of them mostly waits for servers and containers, and each takes its own twenty seconds to begin
WORKERS ?= 3
# `make lint test` does both at once: much of the tests' time is waiting
MAKEFLAGS += --jobs=2

export PREFECT_API_URL ?= http://127.0.0.1:$(PREFECT_PORT)/api
export PREFECT_HOME ?= $(CURDIR)/.soppu/prefect
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false
# nothing is compiled at once: what is imported is, once, also where the environment says not to keep it
export PYTHONDONTWRITEBYTECODE =
# LAPACK on two threads that share busy cores is many times slower than on one
test test-fast test-long bench-compression: export OMP_NUM_THREADS = 1

.PHONY: help setup demo up down status docker-up image vllm browser test test-fast test-long lint lint-types lint-style lint-imports lint-packages format docs bench bench-compression bench-serve clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## create .venv and install everything from constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by pip, first: it knows of a CPU build where one is configured. The rest by uv: a tenth of pip's time
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0 uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup      ## the whole pipeline on this machine: federate, compress, gate, serve (minutes)
	$(BIN)/python -m deploy.stack up
	$(BIN)/soppu run --config $(CONFIG)
	$(BIN)/soppu report runs/latest --prefect-url $(PREFECT_API_URL:/api=)

up: setup        ## Prefect server, worker and deployments, if they are not up
	$(BIN)/python -m deploy.stack up

down: setup      ## stop what `make up` and the pipeline started, nothing else
	$(BIN)/python -m deploy.stack down

status: setup    ## what is up
	$(BIN)/python -m deploy.stack status

docker-up:       ## a docker engine, where none answers: Debian's docker.io (root)
	deploy/engine.sh up

image: setup docker-up  ## a container image: the embedded server, soppu-server; soppu-evaluator with IMAGE=evaluator
	VENV=$(VENV) deploy/image.sh soppu-$(IMAGE):latest $(IMAGE)

# once, before workers that start at the same time each compile it for themselves; in two halves
$(VENV)/.compiled: $(VENV)/.installed
	$(BIN)/python -W ignore -c 'import prefect.cli, flwr.superlink.cli, schemathesis, openai, pandas, matplotlib.pyplot' & \
	$(BIN)/python -m pytest --collect-only --quiet > $@.log || { cat $@.log; exit 1; }; wait
	mv $@.log $@

.venv-lorax/.installed: tests/lorax_env.sh | $(VENV)/.installed
	bash tests/lorax_env.sh && touch $@

.venv-vllm/.installed: tests/vllm_env.sh constraints-vllm.txt
	PYTHON=$(PYTHON) sh tests/vllm_env.sh && touch $@

vllm: .venv-vllm/.installed  ## the environment of a vLLM server with our plugin (gigabytes, minutes)

test: $(VENV)/.compiled .venv-lorax/.installed   ## the tests, real servers and a real federated run included
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov -m "not long"

test-long: $(VENV)/.compiled .venv-lorax/.installed   ## what takes minutes: hosts in network namespaces, connections, more kills
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

browser:         ## Chromium, where there is none: Debian's (root); `make test-long` looks at the live page with it
	sh tests/browser.sh

test-fast: $(VENV)/.compiled .venv-lorax/.installed  ## without the tests that start Ray or Prefect
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

lint: setup      ## ruff, mypy, who imports whom, what is installed for nothing
	@$(MAKE) --no-print-directory --output-sync=target lint-types lint-style lint-imports lint-packages

lint-types:
	$(BIN)/mypy --cache-dir=/dev/null   # an incremental run at times loses submodules of a package

lint-style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-imports:
	$(BIN)/lint-imports --no-cache --no-logo

lint-packages:
	$(BIN)/deptry --no-ansi .

format: setup    ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup      ## regenerate docs/cli.md and docs/lorax.md
	$(BIN)/python -m docs.generate_cli
	$(BIN)/python -m docs.generate_lorax

bench: demo      ## run the demo and keep its figures in benchmarks/results/demo.json
	$(BIN)/python -m benchmarks.demo

.venv-rivals/.installed: benchmarks/rivals_env.sh
	bash benchmarks/rivals_env.sh && touch $@

bench-compression: setup .venv-rivals/.installed  ## measure compression: all of docs/compression.md (hours); needs the GPT-2 adapters
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for n in 100 500 2000; do $(BIN)/python -m benchmarks.compression synthetic --n $$n || exit 1; done
	for what in "compression gpt2" gain streaming cold_start ternary joint_speed compress "fuzz_bundle --minutes 3" "compression page"; do \
		$(BIN)/python -m benchmarks.$$what || exit 1; done

bench-serve: setup vllm .venv-lorax/.installed  ## measure serving: all of docs/serving.md (an hour, nothing else running)
	for what in serve serve_equality soak engine prefix serve_kernels serve_page; do $(BIN)/python -m benchmarks.$$what || exit 1; done

clean: down      ## remove the environment, state and runs
	rm -rf $(VENV) .venv-lorax .venv-vllm .soppu runs
