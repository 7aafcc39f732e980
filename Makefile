# `make demo` and `make check` need no broker; `make test` starts live ones (Docker, or Debian as root).
PYTHON  ?= python3
BACKEND ?= rabbitmq
BIN     := .venv/bin
# How long a live case waits for what must come: it costs nothing where it comes, and a busy machine needs long.
SUITE   := MESSAGING_CONTRACT_PATIENCE_S=60 $(BIN)/messaging contract
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test live-rabbitmq live-nats live-memory live-sqs live-kafka live-zeromq swap flips evidence check static laws \
        doubles contract bench engine brokers clean

demo: .venv/run.stamp
	@$(BIN)/messaging demo

# One suite after the other, each with its kinds side by side: beside another one SQS lost leases. One profile of most
# backends here, for time: `make evidence` runs them all. The laws come last, so that a pytest summary closes the output.
test: .venv/test.stamp engine
	@$(MAKE) --no-print-directory brokers BROKERS="rabbitmq43 nats nats-core ministack kafka"
	@$(MAKE) --no-print-directory static
	@$(MAKE) --no-print-directory RABBITMQ=4.3 MEMORY=default SQS=ministack KAFKA=classic ZEROMQ=tcp \
	  live-rabbitmq live-nats live-memory live-sqs live-kafka live-zeromq
	@$(MAKE) --no-print-directory swap
	@$(MAKE) --no-print-directory -j3 flips
	@$(MAKE) --no-print-directory doubles laws

RABBITMQ := all
MEMORY   := all
SQS      := all
KAFKA    := all
ZEROMQ   := all

live-rabbitmq:
	@$(SUITE) rabbitmq --profile $(RABBITMQ) $(EVIDENCE)

live-nats:
	@$(SUITE) nats --profile all $(EVIDENCE)

live-memory:
	@$(SUITE) memory --profile $(MEMORY) $(EVIDENCE)

live-sqs:
	@$(SUITE) sqs --profile $(SQS) $(EVIDENCE)

live-kafka:
	@$(SUITE) kafka --profile $(KAFKA) $(EVIDENCE)

live-zeromq:
	@$(SUITE) zeromq --profile $(ZEROMQ) $(EVIDENCE)

# The example program on every live backend, and on two at once.
swap: .venv/test.stamp
	@$(BIN)/pytest contract_tests/live

# A capability declared otherwise must turn the suite red.
flips: flips-memory flips-rabbitmq flips-nats

flips-%: .venv/test.stamp
	@$(BIN)/messaging flips $*

# What the matrix is made of. Commit the result.
evidence: .venv/test.stamp engine brokers
	@$(MAKE) --no-print-directory live-rabbitmq live-nats live-memory live-sqs live-kafka live-zeromq \
	  EVIDENCE="--evidence contract_tests/evidence"
	@$(BIN)/messaging matrix

check: static laws

static: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

laws: .venv/test.stamp
	$(BIN)/pytest contract_tests/core

doubles: .venv/test.stamp
	$(BIN)/messaging doubles

contract: .venv/test.stamp
	$(BIN)/messaging contract $(BACKEND)

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks

engine:
	@contract_tests/containers/engine.sh

brokers: .venv/test.stamp
	@$(BIN)/python -m messaging_sdk_contract.live $(BROKERS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: one .venv; test contains run, bench contains test -----------------------------

.venv/python.stamp:
	@echo "creating .venv ..."
	@$(PYTHON) -m venv .venv
	@touch $@

# --no-build-isolation: the build takes the pinned hatchling instead of fetching another one.
define install
	@echo "installing requirements/$(1).txt ..."
	@$(PIP) --require-hashes -r requirements/$(1).txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
endef

.venv/run.stamp: requirements/run.txt pyproject.toml | .venv/python.stamp
	$(call install,run)

.venv/test.stamp: requirements/test.txt pyproject.toml | .venv/python.stamp
	$(call install,test)
	@touch .venv/run.stamp

.venv/bench.stamp: requirements/bench.txt pyproject.toml | .venv/python.stamp
	$(call install,bench)
	@touch .venv/run.stamp .venv/test.stamp
