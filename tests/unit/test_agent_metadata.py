"""Metadata of several keys, guarded by the version; leases in documents: the agent's side of the node API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pantala.testing.agent import NodeFailure, World, config
from pantala.wire import node
from pantala.wire.api import Lease
from pantala.wire.machine import LeaseView

pytestmark = pytest.mark.anyio


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_several_keys_change_at_once_and_make_no_new_version(world: World) -> None:
    async with world.agent() as agent:
        made = await agent.create(config=config(metadata={"a": "1", "b": "2"}))
        await agent.do(node.PatchMetadata, metadata={"a": None, "c": "3"}, version=made.instance_id)
        machine = await agent.get()
        assert machine.config is not None
        assert machine.config.metadata == {"b": "2", "c": "3"}
        assert machine.instance_id == made.instance_id


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"metadata": {"a": "2"}, "version": "01J00000000000000000000000"}, 412, "machine_version"),
        ({"metadata": {"a": "2", "b": "x" * 4097}}, 400, "metadata.b"),
        ({"metadata": {str(number): "" for number in range(101)}}, 400, "metadata"),
    ],
    ids=["stale", "long", "many"],
)
async def test_all_keys_or_none(world: World, change: dict[str, Any], code: int, told: str) -> None:
    async with world.agent() as agent:
        await agent.create(config=config(metadata={"a": "1"}))
        with pytest.raises(NodeFailure) as refused:
            await agent.do(node.PatchMetadata, **change)
        assert (refused.value.error.http_code, refused.value.error.message.partition(":")[0]) == (code, told)
        machine = await agent.get()
        assert machine.config is not None
        assert machine.config.metadata == {"a": "1"}


async def test_a_held_machine_says_who_holds_it_but_not_the_nonce(world: World) -> None:
    async with world.agent() as agent:
        await agent.create()
        assert (await agent.get()).lease is None
        lease: Lease = await agent.do(node.AcquireLease, ttl_s=60, owner="ann@example.test", description="a deploy")
        shown = await agent.get()
        assert shown.lease == LeaseView(description="a deploy", expires_at=lease.expires_at, owner="ann@example.test")
        assert shown.nonce is None
        with pytest.raises(NodeFailure, match="lease currently held"):
            await agent.do(node.PatchMetadata, metadata={"a": "1"})


async def test_an_update_of_an_older_version_is_412(world: World) -> None:
    async with world.agent() as agent:
        made = await agent.create()
        with pytest.raises(NodeFailure, match="current_version") as refused:
            await agent.do(
                node.UpdateMachine, config=config(), image=made.image_ref, current_version="01J00000000000000000000000"
            )
        assert refused.value.error.http_code == 412
