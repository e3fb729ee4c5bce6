"""Waits with a deadline that say what they last saw."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def until(
    look: Callable[[], Awaitable[T]], wanted: Callable[[T], bool], *, within_s: float, every_s: float = 0.05
) -> T:
    """The first value of `look()` that is `wanted`; AssertionError with the last one seen otherwise."""
    deadline = time.monotonic() + within_s
    while True:
        seen = await look()
        if wanted(seen):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s; last seen: {seen!r}")
        await anyio.sleep(every_s)


def until_sync(look: Callable[[], T], wanted: Callable[[T], bool], *, within_s: float, every_s: float = 0.05) -> T:
    deadline = time.monotonic() + within_s
    while True:
        seen = look()
        if wanted(seen):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s; last seen: {seen!r}")
        time.sleep(every_s)
