"""`/v1/hosts/{host}/escape-suite` and `pantala host escape-suite`: who may ask, what is told, what the code says."""

from __future__ import annotations

import json

import msgspec
import pytest
from commands import Cli

from pantala.errors import Conflict
from pantala.wire import node as wire
from pantala.wire.escape import EscapeAttempt, EscapeReport, EscapeSuite

pytestmark = pytest.mark.anyio

PATH = "/v1/hosts/node-1/escape-suite"


def report(*through: str) -> EscapeReport:
    held = EscapeAttempt(name="mount-proc", outcome="held", detail="mount: EPERM")
    got = [EscapeAttempt(name=name, outcome="through", detail="it was made") for name in through]
    suite = EscapeSuite(
        ran_at="2026-01-01T00:00:00.000Z",
        version="0.1.0",
        attempts=1 + len(got),
        held=1,
        not_applicable=0,
        through=list(through),
        unclear=[],
        outdated=[],
    )
    return EscapeReport(host="node-1", suite=suite, attempts=[held, *got])


async def test_the_operator_runs_it_and_sees_the_last_one(cli: Cli) -> None:
    platform = cli.platform
    never = await platform.http.get(PATH, headers=platform.auth)
    assert never.json() == {"host": "node-1", "suite": None, "attempts": []}
    cli.agent.escapes = report("raw-socket")
    ran = await platform.http.post(PATH, headers=platform.auth)
    assert (ran.status_code, ran.json()) == (200, msgspec.to_builtins(cli.agent.escapes))
    assert isinstance(cli.agent.calls[-1], wire.RunEscapeSuite)
    last = await platform.http.get(PATH, headers=platform.auth)
    assert last.json() == ran.json()
    assert isinstance(cli.agent.calls[-1], wire.GetEscapeSuite)


async def test_others_and_unknown_hosts_are_refused_and_nothing_runs(cli: Cli) -> None:
    platform = cli.platform
    stranger = await platform.admin("eve@example.com", "evil")
    for method in ("GET", "POST"):
        assert (await platform.http.request(method, PATH, headers=stranger)).status_code == 404
        unknown = await platform.http.request(method, "/v1/hosts/iad-9/escape-suite", headers=platform.auth)
        assert unknown.status_code == 404
    assert not any(isinstance(call, wire.RunEscapeSuite) for call in cli.agent.calls)
    cli.agent.fail_next[wire.RunEscapeSuite] = Conflict("the escape suite runs on node-1 already")
    busy = await platform.http.post(PATH, headers=platform.auth)
    assert (busy.status_code, "already" in busy.text) == (409, True)


async def test_the_command_says_what_got_through_and_ends_with_1(cli: Cli) -> None:
    never, *_ = await cli.run_many(["host", "escape-suite", "--last"])
    assert (never.code, "never run on this host" in never.out) == (0, True)
    cli.agent.escapes = report()
    well, verbose = await cli.run_many(["host", "escape-suite"], ["host", "escape-suite", "node-1", "--last", "-v"])
    assert (well.code, verbose.code) == (0, 0), (well, verbose)
    assert "node-1: 2026-01-01T00:00:00.000Z (pantala 0.1.0): 1 attempts held" in well.out
    assert "mount: EPERM" not in well.out
    assert "mount: EPERM" in verbose.out
    cli.agent.escapes = report("raw-socket")
    bad, machine = await cli.run_many(["host", "escape-suite", "node-1"], ["host", "escape-suite", "--last", "--json"])
    assert (bad.code, machine.code) == (1, 1)
    assert "raw-socket got through, 1 attempts held" in bad.out
    assert json.loads(machine.out) == [msgspec.to_builtins(cli.agent.escapes)]
