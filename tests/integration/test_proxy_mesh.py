"""Proxy to proxy: a request enters at one host and is served by a machine of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mesh_rig import HOST, Cluster, cluster
from proxy_rig import free_port

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr", wake_timeout_ms=10_000, queue_timeout_ms=3_000) as made:
        yield made


async def test_served_by_a_machine_of_another_host(pair: Cluster) -> None:
    here, there = pair.hosts
    port = free_port()
    backend = await there.rig.backend("one", there.machines, port)
    await pair.web(port, pair.machine(there, "m1"))
    response = await here.rig.get(HOST, "/where?x=1", via="1.1 somewhere")
    assert (response.status_code, response.text) == (200, "one")
    assert "pantala-mesh-in-flight" not in response.headers
    request = backend.requests[-1]
    assert request.path == "/where?x=1"
    assert request.header("fly-region") == "iad"
    assert request.header("fly-client-ip") == "127.0.0.1"
    assert request.header("host") == f"{HOST}:{pair.ports.http}"
    assert not [name for name, _ in request.headers if name.startswith("pantala-")]
    assert (await here.metric("pantala_proxy_mesh_requests_total"), await there.metric("pantala_proxy_mesh_served_total")) == (1, 1)
    assert await there.metric("pantala_proxy_requests_total") == 0
