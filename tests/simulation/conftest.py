"""Simulations keep the platform's log quiet."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import structlog
from structlog.testing import LogCapture


@pytest.fixture(autouse=True)
def platform_log() -> Generator[LogCapture]:
    """What the platform logged, for tests that look at it."""
    capture = LogCapture()
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[capture])
    yield capture
    structlog.configure(processors=before)
