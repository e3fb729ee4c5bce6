"""Apps that answer with `fly-replay`, and what tests read of it. For the files test_proxy_replay*.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from proxy_rig import Backend, Handler, Request, Rig, answer, machine_row, row, say_name, service_row

from pantala.testing.ports import free_port
from pantala.wire.feed import AppRow, HostRow

JSON = "Content-Type: application/vnd.fly.replay+json"


def replay(value: str, *headers: str) -> bytes:
    return answer(b"not for the client", "307 Temporary Redirect", f"Fly-Replay: {value}", *headers)


def replay_json(**said: Any) -> bytes:
    return answer(json.dumps(said).encode(), "200 OK", JSON)


def always(what: bytes) -> Handler:
    async def handle(backend: Backend, request: Request) -> bytes:
        return what

    return handle


def once(first: bytes, then: Handler = say_name) -> Handler:
    """Replays what comes from a client, answers what was replayed to it."""

    async def handle(backend: Backend, request: Request) -> bytes:
        told = request.header("fly-replay-src") or request.header("fly-replay-failed")
        return await then(backend, request) if told else first

    return handle


def by(choose: Callable[[Request], bytes]) -> Handler:
    async def handle(backend: Backend, request: Request) -> bytes:
        return choose(request)

    return handle


def fields(text: str | None) -> dict[str, str]:
    """Of `fly-replay-src` and `fly-replay-failed`."""
    assert text is not None
    return dict(part.split("=", 1) for part in text.split(";"))


@dataclass
class Apps:
    """Apps of one rig, each with a host name, its own internal port and machines on addresses of their own."""

    rig: Rig
    ports: dict[str, int] = field(default_factory=dict[str, int])
    backends: dict[str, Backend] = field(default_factory=dict[str, Backend])

    async def app(self, name: str, *, org: str = "acme", network: int = 1, **service: Any) -> None:
        self.ports[name] = free_port()
        await self.rig.agent.rows(
            row("routes", f"app/{name}", AppRow(app=name, org=org, network=network)),
            row("routes", f"host/{name}.test", HostRow(app=name)),
            service_row(self.rig.ports, name, self.ports[name], **service),
        )

    async def machine(self, app: str, machine: str, last: int, handler: Handler = say_name, **changes: Any) -> Backend:
        ip4 = f"127.0.2.{last}"
        backend = await self.rig.backend(machine, ip4, self.ports[app], handler)
        self.backends[machine] = backend
        await self.rig.agent.rows(machine_row(app, machine, ip4, **changes))
        return backend

    def asked(self, machine: str) -> int:
        return len(self.backends[machine].requests)

    def last(self, machine: str) -> Request:
        return self.backends[machine].requests[-1]

    async def logged(self, code: str) -> Any:
        def wanted(frames: list[Any]) -> bool:
            return any(frame.code == code for frame in frames)

        return next(f for f in await self.rig.agent.frames_of("ProxyLog", wanted) if f.code == code)
