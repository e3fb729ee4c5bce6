"""A real nats-server believes control's JWTs: a node speaks as itself only, also through a leaf; others not at all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from pantala.control.bus_accounts import BusAccounts
from pantala.control.cluster_authority import NODE_LIVES
from pantala.errors import NodeUnreachable
from pantala.kit.bus_nats import NatsBus, connect
from pantala.kit.clock import SystemClock
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey, credentials_text, read_credentials
from pantala.testing.poll import until, until_sync
from pantala.testing.ports import free_port
from pantala.wire.hosts import CONTROL_CALL

pytestmark = pytest.mark.anyio

NATS = Path(sys.executable).parent / "nats-server"


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Hub:
    """One hub with control's JWTs, and leaves of it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.accounts = BusAccounts(folder / "bus", SystemClock())
        self.port, self.leaf_port = free_port(), free_port()
        self.start("hub", self.port, {"leafnodes": {"listen": f"127.0.0.1:{self.leaf_port}"}})

    def start(self, name: str, port: int, more: dict[str, object], revoked: tuple[str, ...] = ()) -> None:
        conf = {
            "server_name": name,
            "listen": f"127.0.0.1:{port}",
            "operator": self.accounts.operator_jwt(),
            "system_account": self.accounts.system_account,
            "resolver": "MEMORY",
            "resolver_preload": self.accounts.accounts(list(revoked)),
        }
        path = self.folder / f"{name}.conf"
        path.write_text(json.dumps(conf | more))
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen([str(NATS), "-c", str(path)], stdout=log, stderr=log)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        until_sync(lambda: listening(port), bool, within_s=10)

    def start_leaf(self, node: str) -> int:
        port = free_port()
        account = next(key for key in self.accounts.accounts([]) if key != self.accounts.system_account)
        remote = {
            "urls": [f"nats-leaf://127.0.0.1:{self.leaf_port}"],
            "credentials": self.credentials(node),
            "account": account,
        }
        self.start(f"leaf-{node}", port, {"leafnodes": {"remotes": [remote], "reconnect": 1}})
        return port

    def credentials(self, node: str, *, issuer: BusAccounts | None = None) -> str:
        path = self.folder / f"{node}{'-false' if issuer else ''}.creds"
        if not path.exists():
            key = NKey.ensure("user", path.with_suffix(".seed"))
            user_jwt = (issuer or self.accounts).node_jwt(bus_key=key.public, node=node, region="iad", lives=NODE_LIVES)
            write_private(path, credentials_text(user_jwt, key).encode())
        return str(path)

    def node(self, node: str, *, port: int = 0) -> AbstractAsyncContextManager[NatsBus]:
        return connect(f"nats://127.0.0.1:{port or self.port}", credentials=self.credentials(node), inbox=node)

    def control(self) -> AbstractAsyncContextManager[NatsBus]:
        return connect(f"nats://127.0.0.1:{self.port}", credentials=str(self.accounts.credentials), inbox="control")


@pytest.fixture
def hub(tmp_path: Path) -> Generator[Hub]:
    with ExitStack() as stack:
        yield Hub(tmp_path, stack)


class Ear:
    """Keeps what it hears on a subject, and answers it."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    async def __call__(self, subject: str, payload: bytes) -> bytes:
        self.heard.append((subject, payload))
        return b"answer"

    async def hears(self, subject: str) -> None:
        async def look() -> list[str]:
            return [heard for heard, _ in self.heard]

        await until(look, lambda subjects: subject in subjects, within_s=10)


async def reaches(bus: NatsBus, subject: str) -> None:
    """Interest spreads through leaves a moment after it is said."""

    async def ask() -> bytes:
        try:
            return await bus.request(subject, b"?", timeout_s=2)
        except NodeUnreachable:
            return b""

    assert await until(ask, bool, within_s=10) == b"answer"


async def test_control_calls_nodes_and_nodes_call_control(hub: Hub) -> None:
    async with hub.control() as control, hub.node("iad-1") as node:
        await node.serve("pantala.node.iad-1.call", Ear())
        await control.serve(CONTROL_CALL, Ear())
        assert await control.request("pantala.node.iad-1.call", b"?", timeout_s=5) == b"answer"
        assert await node.request(CONTROL_CALL, b"?", timeout_s=5) == b"answer"


@pytest.mark.parametrize("through_a_leaf", [False, True], ids=["at the hub", "through a leaf"])
async def test_a_node_speaks_as_itself_only(hub: Hub, *, through_a_leaf: bool) -> None:
    port = await anyio.to_thread.run_sync(hub.start_leaf, "iad-2") if through_a_leaf else hub.port
    ear, own = Ear(), Ear()
    async with hub.control() as control, hub.node("iad-1") as victim, hub.node("iad-2", port=port) as node:
        await victim.serve("pantala.node.iad-1.call", ear)
        await victim.serve("pantala.cat.>", own)
        await victim.serve("pantala.cat.iad-1.fetch", ear)
        await control.serve(CONTROL_CALL, Ear())
        await node.serve("pantala.node.iad-2.call", Ear())
        await reaches(control, "pantala.node.iad-2.call")
        await reaches(node, CONTROL_CALL)
        await reaches(node, "pantala.cat.iad-1.fetch")
        ear.heard.clear()
        with pytest.raises(NodeUnreachable):
            await node.request("pantala.node.iad-1.call", b"destroy", timeout_s=1)
        await node.publish("pantala.cat.iad-1.delta", b"forged")
        await node.publish("pantala.cat.control.delta", b"forged")
        await node.publish("pantala.cat.iad-2.delta", b"own")
        await own.hears("pantala.cat.iad-2.delta")  # in order: had the others come, they would be here
        told = {subject for subject, _ in own.heard} - {"pantala.cat.iad-1.fetch"}
        assert (ear.heard, told) == ([], {"pantala.cat.iad-2.delta"})


async def test_a_node_cannot_listen_to_the_calls_and_answers_of_another(hub: Hub) -> None:
    ear = Ear()
    async with hub.control() as control, hub.node("iad-1") as victim, hub.node("iad-2") as node:
        for subject in ("pantala.node.iad-1.call", "pantala.node.>", "_INBOX.>", "_INBOX.control.>", CONTROL_CALL):
            await node.serve(subject, ear)
        await victim.serve("pantala.node.iad-1.call", Ear())
        await node.serve("pantala.cat.>", ear)
        assert await control.request("pantala.node.iad-1.call", b"secret", timeout_s=5) == b"answer"
        await control.publish("pantala.cat.control.beat", b"")
        await ear.hears("pantala.cat.control.beat")  # in order: had anything else come, it would be here
        assert [subject for subject, _ in ear.heard] == ["pantala.cat.control.beat"]


async def test_whoever_is_not_the_operators_is_refused(hub: Hub, tmp_path: Path) -> None:
    url = f"nats://127.0.0.1:{hub.port}"
    stranger = BusAccounts(tmp_path / "other", SystemClock())
    ways: list[dict[str, Any]] = [
        {"credentials": hub.credentials("iad-1", issuer=stranger)},
        {"user": "pantala", "password": "x"},
        {},
    ]
    for access in ways:
        with pytest.raises(TimeoutError):
            async with connect(url, wait_s=1, **access):
                pass


async def test_a_stolen_jwt_without_its_seed_is_refused(hub: Hub, tmp_path: Path) -> None:
    user_jwt, _ = read_credentials(Path(hub.credentials("iad-1")))
    path = tmp_path / "stolen.creds"
    write_private(path, credentials_text(user_jwt, NKey("user", b"s" * 32)).encode())
    with pytest.raises(TimeoutError):
        async with connect(f"nats://127.0.0.1:{hub.port}", credentials=str(path), wait_s=1):
            pass


async def test_a_revoked_user_is_refused(hub: Hub) -> None:
    port = free_port()
    _, key = read_credentials(Path(hub.credentials("iad-1")))
    hub.credentials("iad-2")
    await anyio.to_thread.run_sync(lambda: hub.start("second", port, {}, revoked=(key.public,)))
    async with hub.node("iad-2", port=port):
        pass
    with pytest.raises(TimeoutError):
        async with connect(f"nats://127.0.0.1:{port}", credentials=hub.credentials("iad-1"), wait_s=1):
            pass
