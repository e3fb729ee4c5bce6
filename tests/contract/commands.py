"""The CLI as a user runs it, a process of its own, against the real API with fake agents: for the tests of commands."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from pantala.testing.platform import TestPlatform


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    out: str
    err: str


MANY = """
import contextlib, io, json, sys
from pantala.cli.main import main

lines, ended = json.load(sys.stdin), []
sys.stdin = io.StringIO()
for words in lines:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as exit:
            code = exit.code or 0
    ended.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
json.dump(ended, sys.stdout)
"""


class Cli:
    """Runs `pantala` in `folder`; logged in by its own configuration file."""

    def __init__(self, platform: TestPlatform, url: str, folder: Path) -> None:
        self.platform = platform
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
        return await self._python("-m", "pantala.cli.main", *arguments, stdin=stdin, environment=environment)

    async def run_many(self, *lines: Sequence[str]) -> list[Ended]:
        """One after the other in one process, without a terminal: much quicker where there are many."""
        done = await self._python("-c", MANY, stdin=json.dumps(lines), environment={})
        assert done.code == 0, done.err
        return [Ended(**one) for one in json.loads(done.out)]

    async def _python(self, *arguments: str, stdin: str, environment: Mapping[str, str]) -> Ended:
        env = {key: value for key, value in os.environ.items() if not key.startswith("FLY_")}
        env |= {"PANTALA_CONFIG_DIR": str(self.config_dir)} | dict(environment)
        with anyio.fail_after(60):
            done = await anyio.run_process(
                [sys.executable, *arguments], input=stdin.encode(), cwd=self.folder, env=env, check=False
            )
        return Ended(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())

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
