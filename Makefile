# make demo and make test are the two commands of the README; the rest are chores.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV_RUN := uv run --quiet --frozen --no-sync

.PHONY: help
help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: schemas
schemas:   ## write schemas/ from the wire types
	$(UV_RUN) python -m pantala.wire.schemas schemas

.PHONY: lint
lint:      ## ruff, basedpyright strict, import-linter, schemas, rustfmt, clippy
	$(UV_RUN) ruff format --check .
	$(UV_RUN) ruff check .
	$(UV_RUN) basedpyright
	$(UV_RUN) lint-imports
	$(UV_RUN) python -m pantala.wire.schemas --check schemas
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
