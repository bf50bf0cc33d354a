# Thin on purpose: every target is the command itself. `make` alone prints this help.
PYTHON ?= python3
CONFIG ?= config/gpt-oss.yaml
SCENARIO ?= short-chat
SCALE ?= small
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve doctor test test-fast test-vllm soak bench load locust sweep tune overhead bench-gpu lint format types lock clean environments

# Makes the environment on first use (shared by all checkouts, see deploy/environments.py) and .venv/bin for this checkout.
DEV = $(PYTHON) deploy/environments.py dev --commands .venv/dev >/dev/null
# Locust pins what the server must be free to choose, so load tests have their own.
LOAD = $(PYTHON) deploy/environments.py load --commands .venv/load >/dev/null
IN = .venv/dev/bin
GATEWAY = $(PYTHON) deploy/environments.py gateway --commands .venv >/dev/null
# Where it cannot be made, the tests that need it are listed as not run, with the reason.
ENGINE = $(PYTHON) deploy/environments.py engine-cpu >/dev/null || true

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo; echo "  Needs python3 (3.11 or newer, with venv), make and gcc. CONFIG=path for another configuration."

serve:  ## everything it takes, then a model behind the gateway; Ctrl-C stops it
	@$(GATEWAY); engine=$$($(PYTHON) deploy/environments.py engine); \
	VITALIS_ENGINE_PYTHON="$$engine" exec .venv/bin/vitalis-serve up --config $(CONFIG)

doctor:  ## what this machine has, and what is missing
	@$(GATEWAY); exec .venv/bin/vitalis-serve doctor --config $(CONFIG)

test:  ## lint, types and every test, real engines included
	@$(DEV); $(LOAD); $(ENGINE); status=0; \
	$(IN)/ruff check . || status=1; \
	$(IN)/ruff format --check . || status=1; \
	$(IN)/mypy || status=1; \
	$(IN)/pytest -m "not soak" $(ARGS) || status=1; \
	exit $$status

test-fast:  ## the tests that start no real engine
	@$(DEV); exec $(IN)/pytest -m "not vllm and not soak" $(ARGS)

test-vllm:  ## the tests against the real vLLM on this machine's CPU
	@$(DEV); $(ENGINE); exec $(IN)/pytest -m vllm tests/vllm $(ARGS)

soak:  ## the long tests: SOAK_SECONDS of load (600), then ten minutes of more examples
	@$(DEV); status=0; \
	$(IN)/pytest -m soak -s tests/soak $(ARGS) || status=1; \
	$(IN)/pytest tests/property --hypothesis-profile=soak --timeout=1800 || status=1; \
	exit $$status

bench:  ## the gateway's cost per request and event, measured on this machine
	@$(DEV); $(IN)/python tests/bench/tenants.py; \
	if command -v redis-server > /dev/null; then $(IN)/python tests/bench/redis_limits.py; \
	else echo "limits in Redis: not measured, redis-server is not installed"; fi; \
	exec $(IN)/python tests/bench/overhead.py $(ARGS)

load:  ## SCENARIO (short-chat) against a running `make serve`, with a report; SCALE=full for a GPU
	@$(LOAD); exec .venv/load/bin/vitalis-load run $(SCENARIO) --scale $(SCALE) $(ARGS)

locust:  ## the same scenario in Locust's web UI, http://127.0.0.1:8089
	@$(LOAD); exec .venv/load/bin/locust -f loadtests/locustfile.py --scenario $(SCENARIO) --scale $(SCALE) --web-host 127.0.0.1 $(ARGS)

sweep:  ## raise the load of SCENARIO on a running server until its SLO is missed; SCALE=full for a GPU
	@$(LOAD); exec .venv/load/bin/vitalis-load sweep $(SCENARIO) --scale $(SCALE) $(ARGS)

tune:  ## engine options with the best goodput for SCENARIO, as a profile; SCALE=full for a GPU
	@$(GATEWAY); $(LOAD); engine=$$($(PYTHON) deploy/environments.py engine); VITALIS_ENGINE_PYTHON="$$engine" \
	exec .venv/load/bin/vitalis-load tune $(SCENARIO) --scale $(SCALE) --config $(CONFIG) $(ARGS)

overhead:  ## a running server's engine, directly and through the gateway; ARGS=--simulator needs none
	@$(GATEWAY); $(LOAD); exec .venv/load/bin/vitalis-load overhead --config $(CONFIG) $(ARGS)

bench-gpu:  ## the whole matrix on one card, unattended; ARGS=--rehearse in small without one
	@$(GATEWAY); $(LOAD); engine=$$($(PYTHON) deploy/environments.py engine); VITALIS_ENGINE_PYTHON="$$engine" \
	exec .venv/load/bin/vitalis-load bench-gpu --config $(CONFIG) $(ARGS)

lint:  ## ruff: rules and format
	@$(DEV); $(IN)/ruff check .; exec $(IN)/ruff format --check .

format:  ## ruff: mend what it can
	@$(DEV); $(IN)/ruff check --fix .; exec $(IN)/ruff format .

types:  ## mypy, strict
	@$(DEV); exec $(IN)/mypy

lock:  ## resolve deploy/locks/ again (ARGS=--upgrade for the newest versions)
	@exec $(PYTHON) deploy/lock.py $(ARGS)

environments:  ## make every environment that make test needs, and stop
	@$(DEV); $(GATEWAY); $(LOAD); $(PYTHON) deploy/environments.py engine-cpu

clean:  ## what was made in this checkout; the cache and var/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
