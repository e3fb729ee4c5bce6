"""A server over a memory bus with fake agents, asked through HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from pantala.testing.platform import TestPlatform, running


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncGenerator[TestPlatform]:
    async with running(tmp_path) as made:
        yield made
