"""Answers that are given before a request reaches its route, so without Litestar."""

from __future__ import annotations

from collections.abc import Iterable

from litestar.types import Send


async def refuse(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """`body`: an encoded `ErrorBody`."""
    said = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": body, "more_body": False})
