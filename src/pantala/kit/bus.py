"""The bus as its users see it: publish, request, serve. NATS in production (`kit/bus_nats.py`), in memory in tests."""

from __future__ import annotations

from typing import Protocol


class Handler(Protocol):
    """Takes a message; bytes returned are the answer to a request."""

    async def __call__(self, subject: str, payload: bytes) -> bytes | None: ...


class Bus(Protocol):
    async def publish(self, subject: str, payload: bytes) -> None: ...

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Raises NodeUnreachable when nobody serves the subject or answers in time."""
        ...

    async def serve(self, subject: str, handler: Handler) -> None:
        """Call `handler` for each message on a subject (`*` and `>` as in NATS) until the bus closes.

        Handlers run concurrently, at most `HANDLERS_MAX` at once a subject; more wait in order.
        """
        ...


HANDLERS_MAX = 256
