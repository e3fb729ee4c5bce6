"""What the agent asks of the parts it composes. `images` and `net` implement these; tests bring fakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pantala.domain.policies import Allowed
from pantala.domain.runtime import ListenSocket, NetworkHandle, NetworkPlan, UnpackedImage
from pantala.kit.clock import Clock
from pantala.wire.machine import ImageRef


class ImageStore(Protocol):
    async def ensure(self, image: ImageRef, *, pull_token: str) -> UnpackedImage:
        """Pull and unpack unless it is there; once per digest and host however many ask.

        Raises NotFound (no such image), InvalidRequest (an image that must not be unpacked, with the reason),
        TransientError (registry not reachable).
        """
        ...

    async def find(self, digest: str) -> UnpackedImage | None:
        """What `ensure` made earlier; never asks a registry."""
        ...

    async def prune(self, keep: set[str]) -> list[str]:
        """Remove images whose digest is not in `keep`; returns the digests removed."""
        ...

    async def run(self, clock: Clock) -> None:
        """What the store does behind everybody's back, until cancelled."""
        ...


class Network(Protocol):
    async def setup(self) -> None:
        """Tables, sets and addresses of the host itself; repeats safely."""
        ...

    async def ensure(self, plan: NetworkPlan) -> NetworkHandle:
        """Namespace, link, addresses, routes and set elements of one machine; repeats safely."""
        ...

    async def police(self, wanted: Mapping[str, Allowed]) -> None:
        """What network policies leave machines from now on, by id, in one step. Some may not be there."""
        ...

    async def remove(self, machine_id: str) -> None: ...

    async def teardown(self) -> None:
        """For a host that is none any more: every machine's part, and the host's own."""
        ...

    async def list(self) -> list[str]:
        """Machine ids that own a namespace, link or set element."""
        ...

    async def listening(self, machine_id: str) -> list[ListenSocket]:
        """Listening sockets inside the machine's namespace."""
        ...
