"""`python -m pantala.agent --settings FILE`: one agent until SIGTERM or SIGINT, which leave its machines running."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import anyio
import structlog

from pantala.agent.run import run
from pantala.agent.settings import AgentSettings, load
from pantala.errors import PantalaError
from pantala.kit import lean
from pantala.telemetry import configure

log = structlog.get_logger()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pantala.agent", description="Run this host's machines.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of AgentSettings")
    options = parser.parse_args(arguments)
    failures: list[PantalaError] = []
    try:
        settings = load(options.settings)
        configure(level=settings.log_level, program="agent", region=settings.region)
        if sys.version_info < (3, 12):
            # No thread for each process that is waited for. Later versions do so themselves, and deprecate this call.
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())  # pyright: ignore[reportDeprecated]
        anyio.run(_main, settings)
    except* PantalaError as errors:
        failures = _leaves(errors)
    for error in failures:
        sys.stderr.write(f"error: {error.sentence()}\n")
    return 1 if failures else 0


async def _main(settings: AgentSettings) -> None:
    lean.collect_rarely()
    async with anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            tasks.start_soon(_run, settings, tasks.cancel_scope)
            async for received in signals:
                log.info("agent stops; its machines go on", signal=received.name)
                tasks.cancel_scope.cancel()


async def _run(settings: AgentSettings, scope: anyio.CancelScope) -> None:
    async with anyio.create_task_group() as tasks:
        host = await tasks.start(run, settings)
        log.info("agent ready", node=settings.node, machines=len(host.machines), socket=str(settings.socket))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
    scope.cancel()


def _leaves(group: BaseExceptionGroup[PantalaError]) -> list[PantalaError]:
    found: list[PantalaError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
