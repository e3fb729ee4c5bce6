"""More requests than can be served: those on top are refused at once with 429, the others are answered, no 5xx."""

from __future__ import annotations

from collections import Counter

import anyio
import httpx2
import pytest

from pantala.client.node import AT_ONCE_MAX, IN_LINE_MAX, WAITS_AT_ONCE_MAX
from pantala.server.app import make_app
from pantala.server.limits import RateLimits
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.platform import TestPlatform
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

MANY = 40


def slow_down(platform: TestPlatform, node: str) -> FakeAgent:
    """It takes what it is asked, and answers once its `hold` is set."""
    agent = platform.agents[node]
    agent.hold = anyio.Event()
    agent.calls.clear()
    return agent


def release(agent: FakeAgent) -> None:
    assert agent.hold is not None
    agent.hold.set()


def client(platform: TestPlatform, *, at_once: int, waits: int = 100) -> httpx2.AsyncClient:
    limits = RateLimits(platform.control.context.clock, per_s=1000, burst=10_000)
    app = make_app(platform.control, limits, at_once=at_once, waits=waits)
    transport = httpx2.ASGITransport(app=app)  # pyright: ignore[reportArgumentType]
    return httpx2.AsyncClient(transport=transport, base_url="http://api.pantala.test", headers=platform.auth)


class Asked:
    """Answers of requests that are under way together, in the order in which they came."""

    def __init__(self) -> None:
        self.answers: list[httpx2.Response] = []

    async def get(self, http: httpx2.AsyncClient, path: str) -> None:
        self.answers.append(await http.get(path))

    async def codes(self) -> Counter[int]:
        return Counter(answer.status_code for answer in self.answers)


async def test_what_the_server_cannot_take_is_refused_at_once_and_the_rest_answered(platform: TestPlatform) -> None:
    await platform.create_app("web")
    machine = f"/v1/apps/web/machines/{(await platform.create_machine('web'))['id']}"
    slow, asked = slow_down(platform, "node-1"), Asked()
    async with client(platform, at_once=8) as http:
        async with anyio.create_task_group() as tasks:
            for _ in range(MANY):
                tasks.start_soon(asked.get, http, machine)
            await until(asked.codes, lambda codes: codes[429] == MANY - 8, within_s=15)
            assert await asked.codes() == {429: MANY - 8}  # told while the others wait still
            release(slow)
        assert await asked.codes() == {429: MANY - 8, 200: 8}
        refused = next(answer for answer in asked.answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["status"] == "rate_limited"
        assert refused.headers["fly-request-id"]
        assert (await http.get(machine)).status_code == 200  # and it goes on as before


async def test_a_slow_host_holds_up_nobody_who_asks_another(platform: TestPlatform) -> None:
    await platform.create_app("web")
    here = f"/v1/apps/web/machines/{(await platform.create_machine('web'))['id']}"
    await platform.add_agent("node-2", region="lhr")
    there = f"/v1/apps/web/machines/{(await platform.create_machine('web', region='lhr'))['id']}"
    slow, asked = slow_down(platform, "node-1"), Asked()
    held = AT_ONCE_MAX + IN_LINE_MAX
    async with client(platform, at_once=200) as http:
        async with anyio.create_task_group() as tasks:
            for _ in range(held + 5):
                tasks.start_soon(asked.get, http, here)
            await until(asked.codes, lambda codes: codes[429] >= 5, within_s=15)
            assert (await http.get(there)).status_code == 200
            await until(asked.codes, lambda codes: codes[429] == 5 + IN_LINE_MAX, within_s=15)
            assert len(slow.calls) == AT_ONCE_MAX
            release(slow)
        assert await asked.codes() == {200: AT_ONCE_MAX, 429: IN_LINE_MAX + 5}
        assert all("retry-after" in answer.headers for answer in asked.answers if answer.status_code == 429)


async def test_requests_that_wait_leave_room_for_those_that_do_not(platform: TestPlatform) -> None:
    await platform.create_app("web")
    machine = f"/v1/apps/web/machines/{(await platform.create_machine('web'))['id']}"
    asked = Asked()
    async with client(platform, at_once=2, waits=3) as http:
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(asked.get, http, f"{machine}/wait?state=stopped&timeout=30")
            await until(asked.codes, lambda codes: codes[429] == 2, within_s=15)
            assert (await http.get(machine)).status_code == 200
            assert (await http.post(f"{machine}/stop")).status_code == 200
        assert await asked.codes() == {429: 2, 200: 3}


async def test_more_waits_than_one_host_takes_are_refused_and_its_other_work_goes_on(platform: TestPlatform) -> None:
    await platform.create_app("web")
    machine = f"/v1/apps/web/machines/{(await platform.create_machine('web'))['id']}"
    asked = Asked()
    async with client(platform, at_once=200, waits=1000) as http:
        async with anyio.create_task_group() as tasks:
            for _ in range(WAITS_AT_ONCE_MAX + 5):
                tasks.start_soon(asked.get, http, f"{machine}/wait?state=stopped&timeout=30")
            await until(asked.codes, lambda codes: codes[429] == 5, within_s=10)
            assert (await http.get(machine)).status_code == 200
            assert (await http.post(f"{machine}/stop")).status_code == 200
        assert await asked.codes() == {429: 5, 200: WAITS_AT_ONCE_MAX}
        assert all("retry-after" in answer.headers for answer in asked.answers if answer.status_code == 429)
