# `make demo` and `make test` are the README's two commands; the rest are chores.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.cache/uv/bin:$(HOME)/.cargo/bin:/usr/local/go/bin:$(PATH)
# Where it is set, each process that a test starts reads all of its Python anew: seconds of a CPU.
unexport PYTHONDONTWRITEBYTECODE
RUN := .venv/bin
PYTEST := $(RUN)/python -m pytest -q

.PHONY: help
help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: demo
demo:  ## install, start a box and do the main job; KEEP=1 leaves the box
	@scripts/install
	@$(if $(filter 0,$(shell id -u)),,sudo -E) $(RUN)/python scripts/demo.py

.PHONY: test
test: install-tests lint test-rust  ## everything: lint and all tiers
	@$(MAKE) --no-print-directory -j2 --output-sync=line test-quick test-integration
	@$(MAKE) --no-print-directory -j2 --output-sync=line test-one-box test-boxes

.PHONY: install-tests
install-tests:
	@scripts/install --tests

.PHONY: lint
lint:  ## ruff, basedpyright strict, import-linter, schemas, rustfmt, clippy
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/basedpyright
	$(RUN)/lint-imports
	$(RUN)/python -m pantala.wire.schemas --check schemas
	$(RUN)/python -m pantala.server.openapi --check
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings

.PHONY: test-rust
test-rust:
	cargo test --quiet --workspace --locked

# Of the integration tier what stays on loopback and in folders of its own.
BESIDE := tests/integration/test_image_corpus.py \
  $(filter-out %_network.py,$(wildcard tests/integration/test_proxy_*.py))
.PHONY: test-quick
test-quick:  ## what leaves the machine's network alone, and so runs beside test-integration
	$(PYTEST) tests/unit
	$(PYTEST) tests/contract
	$(PYTEST) tests/simulation
	$(PYTEST) $(BESIDE)

.PHONY: test-unit
test-unit:  ## pure code, in seconds
	$(PYTEST) tests/unit

.PHONY: test-contract
test-contract:
	$(PYTEST) tests/contract

.PHONY: test-simulation
test-simulation:  ## the control plane over fake hosts, seeded faults
	$(PYTEST) tests/simulation

.PHONY: test-integration
test-integration:
	$(PYTEST) tests/integration $(addprefix --ignore=,$(BESIDE))

.PHONY: test-e2e
test-e2e: test-one-box test-boxes  ## real boxes; needs root

OWN_BOXES := $(addprefix tests/e2e/test_,full_disk.py host_joins.py regions.py three_regions.py)
.PHONY: test-one-box test-boxes
test-one-box:  ## the box that most end-to-end tests share
	$(PYTEST) --durations=12 --durations-min=10 tests/e2e $(addprefix --ignore=,$(OWN_BOXES))
test-boxes:  ## boxes that tests have for themselves
	$(PYTEST) --durations=12 --durations-min=10 $(OWN_BOXES)

.PHONY: schemas
schemas:  ## write schemas/ from the wire types and the API
	$(RUN)/python -m pantala.wire.schemas schemas
	$(RUN)/python -m pantala.server.openapi

.PHONY: format
format:
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .
	cargo fmt

.PHONY: soak
soak: install-tests  ## long runs with full counts, about half an hour; needs root
	@$(if $(filter 0,$(shell id -u)),,sudo -E) $(PYTEST) -s tests/soak

.PHONY: clean
clean:  ## remove what was built; .cache (bases, BuildKit) stays
	rm -rf .venv target dist

.PHONY: bench
bench: install-tests  ## measure what SPECIFICATION.md publishes; NAME=wake, create, deploy, cli, memory, catalogue, mesh, placement, proxy, routes, regions, trace; all without NAME
	@$(if $(NAME),$(if $(filter proxy,$(NAME)),scripts/install --bench,:),scripts/install --bench)
	@$(if $(filter 0,$(shell id -u)),,sudo -E) $(RUN)/python -m benchmarks $(NAME)

.PHONY: reference
reference:  ## write docs/reference/cli.md and api.md from the commands and the endpoints
	$(RUN)/python scripts/cli_reference.py
	$(RUN)/python scripts/api_reference.py
