"""`pantala trace` as a user runs it: the tree, JSON, what is said when there is nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import Cli

from pantala.kit import ids
from pantala.wire.feed import TraceRecord

pytestmark = pytest.mark.anyio

AT_US = 1_732_222_222_222_000


async def put(cli: Cli) -> str:
    """A request that one machine abroad refused and the next one answered after a wake; returns its id."""
    await cli.platform.create_app("web")
    there = await cli.platform.add_agent("node-lhr", region="lhr")
    request_id = ids.ulid(cli.platform.control.context.now_ms())
    abroad: dict[str, Any] = {"app": "web", "node": "node-lhr", "region": "lhr", "machine": "d8d9510a295118"}
    cli.agent.traces[request_id] = [
        TraceRecord(
            role="edge", outcome="turned", reason="full", code="PR04", status=503, began_us=AT_US, attempt=1,
            choose_us=300, answer_us=71_000, **abroad,
        ),
        TraceRecord(
            role="edge", outcome="answered", status=200, began_us=AT_US, attempt=2, from_us=71_300, choose_us=3_200,
            waited_us={"queue": 3_100}, answer_us=300_000, body_us=4_000, **abroad,
        ),
    ]  # fmt: skip
    there.traces[request_id] = [
        TraceRecord(role="worker", outcome="turned", reason="full", began_us=AT_US + 35_000, attempt=1, choose_us=20,
                    **abroad),
        TraceRecord(
            role="worker", outcome="answered", status=200, began_us=AT_US + 110_000, attempt=1, choose_us=210_050,
            waited_us={"cold": 210_000}, connect_us=150, answer_us=18_800, body_us=None, **abroad,
        ),
    ]  # fmt: skip
    return f"{request_id}-iad"


async def test_a_request_is_told_as_a_tree(cli: Cli) -> None:
    request_id = await put(cli)
    machine = "web machine d8d9510a295118 in lhr on host node-lhr"
    assert (
        await cli.ok("trace", request_id)
        == f"""{request_id}
edge iad host node-1 at 2024-11-21T20:50:22.222Z
  try 1: {machine}: not taken by its host PR04 (full) after 71.3 ms
    edge 0.3 ms
    mesh 71.0 ms
    worker lhr host node-lhr at 2024-11-21T20:50:22.257Z
      try 1: {machine}: not taken by its host (full) after 0.0 ms
        worker 0.0 ms
  try 2: {machine}: answered 200 after 374.5 ms
    edge 0.1 ms
    queue 3.1 ms
    mesh 71.0 ms
    worker lhr host node-lhr at 2024-11-21T20:50:22.332Z
      try 1: {machine}: answered 200 after 229.0 ms
        worker 0.1 ms
        wake 210.0 ms (cold)
        connect 0.1 ms
        app 18.8 ms
        body under way
    body 4.0 ms
"""
    )
    document = json.loads(await cli.ok("trace", request_id, "--json"))
    assert [part["host"] for part in document["parts"]] == ["node-1", "node-lhr"]


async def test_a_host_that_is_silent_leaves_a_gap_that_is_named(cli: Cli) -> None:
    request_id = await put(cli)
    cli.platform.agents["node-lhr"].silent = True
    ended = await cli.run("trace", request_id)
    assert ended.code == 0
    assert "mesh, and all beyond it, 300.0 ms" in ended.out
    assert "Not heard: node-lhr" in ended.err
    cli.platform.agents["node-lhr"].silent, cli.agent.silent = False, True
    ended = await cli.run("trace", request_id)
    assert "worker lhr host node-lhr" in ended.out
    assert "Not heard: node-1" in ended.err


async def test_ids_that_lead_nowhere_are_refused(cli: Cli) -> None:
    assert "is not a request id" in await cli.refused("trace", "nonsense")
    assert "is not a request id" in await cli.refused("trace", "a/b?c")
    known = ids.ulid(cli.platform.control.context.now_ms())
    assert "no request with this id is known" in await cli.refused("trace", known)
