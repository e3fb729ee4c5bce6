"""The CLI as a user runs it, a process of its own, against the real API with fake agents: for the tests of commands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pantala.testing.forks import Ended, Forks
from pantala.testing.platform import TestPlatform


class Cli:
    """Runs `pantala` in `folder`; logged in by its own configuration file."""

    def __init__(self, platform: TestPlatform, url: str, folder: Path, forks: Forks) -> None:
        self.platform = platform
        self.forks = forks
        self.agent = platform.agents["node-1"]
        self.url = url
        self.folder = folder
        self.config_dir = folder.parent / "config"
        self.config_dir.mkdir()
        self.log_in(platform.token)

    def log_in(self, token: str) -> None:
        document = {"api_url": self.url, "token": token, "org": "acme"}
        (self.config_dir / "config.json").write_text(json.dumps(document))

    async def run(self, *arguments: str, stdin: str = "", **environment: str) -> Ended:
        env = {key: value for key, value in os.environ.items() if not key.startswith("FLY_")}
        env |= {"PANTALA_CONFIG_DIR": str(self.config_dir)} | environment
        return await self.forks.run(*arguments, env=env, folder=self.folder, stdin=stdin)

    async def run_many(self, *lines: Sequence[str]) -> list[Ended]:
        return [await self.run(*line) for line in lines]

    async def ok(self, *arguments: str, **more: str) -> str:
        ended = await self.run(*arguments, **more)
        assert ended.code == 0, ended.err
        return ended.out

    async def refused(self, *arguments: str, **more: str) -> str:
        """The message of a command that must fail: one error, no traceback, nothing on standard output."""
        ended = await self.run(*arguments, **more)
        assert ended.code in (1, 2), (ended.code, ended.err)
        assert "Traceback" not in ended.err
        assert re.search(r"^Error: ", ended.err, re.MULTILINE), ended.err
        assert ended.out == ""
        return ended.err

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
