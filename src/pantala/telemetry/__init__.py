"""Logging set-up of daemons: one JSON line an event on stderr."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(*, level: str = "info", program: str, **fields: str) -> None:
    """Every event of this process carries `program` and `fields` (node, region)."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program, **fields)
