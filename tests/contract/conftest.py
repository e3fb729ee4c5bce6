"""A server over a memory bus with fake agents, asked through HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from commands import Cli
from deploying import Deploying

from pantala.client.api import connect
from pantala.kit.secret import Secret
from pantala.testing.forks import Forks, commands
from pantala.testing.platform import TestPlatform, running, serve_http


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncGenerator[TestPlatform]:
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def deploying(platform: TestPlatform) -> AsyncGenerator[Deploying]:
    await platform.create_app("web")
    async with serve_http(platform) as url, connect(url, Secret(platform.token)) as client:
        yield Deploying(client, platform)


@pytest.fixture(scope="session")
def forks() -> Generator[Forks]:
    with commands() as made:
        yield made


@pytest.fixture
async def cli(platform: TestPlatform, tmp_path: Path, forks: Forks) -> AsyncGenerator[Cli]:
    """Commands in a project's directory."""
    folder = tmp_path / "shop"
    folder.mkdir()
    async with serve_http(platform) as url:
        yield Cli(platform, url, folder, forks)
