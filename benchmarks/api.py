"""The API over 100,000 machines on 300 hosts (`benchmarks/fleet/plan.py` says what is real): 20 requests a second, then
ten and twenty-five times as many.

Requests leave at their time and count from then, whatever happened to those before them.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec

from benchmarks.figures import Figure, figure, percentile
from benchmarks.fleet import plan
from benchmarks.fleet.client import LIMIT_S, Answer, Client, at_rate
from benchmarks.fleet.cluster import Cluster, running
from benchmarks.load import memory_kib

PER_S, SECONDS = 20, float(os.environ.get("PANTALA_BENCH_SECONDS", "75"))
OVERLOADS = ((200, 10.0), (500, 10.0))
SETTLED_WITHIN_S = 180.0
IDLE_S = 10.0


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="pantala-bench-") as scratch, running(Path(scratch)) as cluster:
        return anyio.run(_measure, cluster)


async def _measure(cluster: Cluster) -> list[Figure]:
    client = Client("127.0.0.1", cluster.port, cluster.token)
    mix = _Mix(client)
    settled_s = await _settle(cluster, mix)
    idle = await _idle(cluster)
    await mix.learn()
    before = {name: cpu_s(pid) for name, pid in cluster.pids.items()}
    answers = await at_rate(PER_S, SECONDS, mix.ask)
    used = {name: (cpu_s(pid) - before[name]) / SECONDS for name, pid in cluster.pids.items()}
    _all_good(answers)
    figures = [*_latencies(answers), *_costs(cluster, used, len(answers), idle, settled_s)]
    for per_s, seconds in OVERLOADS:
        figures += await _overload(cluster, mix, per_s, seconds)
    await client.close()
    return figures


def cpu_s(pid: int) -> float:
    """Of all its threads, also those that have ended: workers of a pool come and go."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- what is asked -----------------------------------------------------------------------------------------------------


class _Mix:
    """Of ten requests four get a machine, three list an app, and three in twenty each create and destroy one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._dice = random.Random(1)
        self._known: list[tuple[str, str]] = []
        self._made: list[tuple[str, str]] = []
        self._typical = plan.typical_apps()

    async def learn(self) -> None:
        """Machines to ask for: half of them on the host whose agent is real."""
        dice = random.Random(2)
        for app in [*dice.sample(plan.local_apps(), 10), *dice.sample(self._typical, 10)]:
            answer = await self._client.ask("list", "GET", f"/v1/apps/{app}/machines")
            if answer.code != 200:
                raise AssertionError(f"{app} is not listed: {answer}")
            self._known += [(app, machine["id"]) for machine in msgspec.json.decode(answer.body)]

    async def ask(self, number: int, due: float) -> Answer:
        del number
        kind = self._dice.choices(("get", "list", "create", "destroy"), (40, 30, 15, 15))[0]
        if kind == "destroy" and not self._made:
            kind = "create"
        return await getattr(self, f"_{kind}")(due)

    async def create(self, region: str) -> Answer:
        return await self._create(time.monotonic(), region)

    async def _get(self, due: float) -> Answer:
        app, machine = self._dice.choice(self._known)
        return await self._client.ask("get", "GET", f"/v1/apps/{app}/machines/{machine}", due=due)

    async def _list(self, due: float) -> Answer:
        kind = self._dice.choice(("wide", "typical", "local"))
        app = {
            "wide": plan.WIDE_APP,
            "typical": self._dice.choice(self._typical),
            "local": self._dice.choice(plan.local_apps()),
        }[kind]
        return await self._client.ask(f"list {kind}", "GET", f"/v1/apps/{app}/machines", due=due)

    async def _create(self, due: float, region: str = "") -> Answer:
        region = region or self._dice.choice((plan.REAL_REGION, self._dice.choice(plan.REGIONS)))
        app = self._dice.choice(self._typical)
        guest = {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256}
        body = {"region": region, "config": {"image": f"{plan.REGISTRY}/{app}:v1", "guest": guest}}
        answer = await self._client.ask(
            "create", "POST", f"/v1/apps/{app}/machines", msgspec.json.encode(body), due=due
        )
        if answer.code == 200:
            self._made.append((app, msgspec.json.decode(answer.body)["id"]))
        return answer

    async def _destroy(self, due: float) -> Answer:
        app, machine = self._made.pop(0)
        return await self._client.ask("destroy", "DELETE", f"/v1/apps/{app}/machines/{machine}?force=true", due=due)


# -- before ------------------------------------------------------------------------------------------------------------


async def _settle(cluster: Cluster, mix: _Mix) -> float:
    """Seconds from the server's start until it places machines in every region and has read what all hosts say."""
    begun = time.monotonic()
    for region in (*plan.REGIONS, plan.REAL_REGION):
        while (await mix.create(region)).code != 200:
            if time.monotonic() - begun > SETTLED_WITHIN_S:
                raise AssertionError(f"no machine can be created in {region}: {(await mix.create(region)).body!r}")
            await anyio.sleep(0.5)
    while True:  # until it has nothing more to catch up with
        before = cpu_s(cluster.pids["server"]), time.monotonic()
        await anyio.sleep(2)
        if (cpu_s(cluster.pids["server"]) - before[0]) / 2 < 0.5 or before[1] - begun > SETTLED_WITHIN_S:
            return cluster.started_s + before[1] - begun


async def _idle(cluster: Cluster) -> dict[str, float]:
    before = {name: cpu_s(pid) for name, pid in cluster.pids.items()}
    await anyio.sleep(IDLE_S)
    return {name: (cpu_s(pid) - before[name]) / IDLE_S for name, pid in cluster.pids.items()}


# -- figures -----------------------------------------------------------------------------------------------------------


def _all_good(answers: Sequence[Answer]) -> None:
    bad = Counter((answer.kind, answer.code, answer.body[:200]) for answer in answers if answer.code not in (200, 204))
    if bad:
        raise AssertionError(f"requests failed: {bad.most_common(5)}")


def _latencies(answers: Sequence[Answer]) -> list[Figure]:
    found: list[Figure] = []
    for kind, meaning in (
        ("get", "one machine, half of them on the host with the real agent"),
        ("create", "a machine, half of them on that host; journaled there and answered"),
        ("destroy", "with force"),
        ("list", "machines of one app, the next three together"),
        ("list local", f"an app with {plan.LOCAL_EACH} machines on the real agent's host of 1,000"),
        ("list typical", f"an app with {plan.EACH} machines on {plan.EACH} hosts"),
        ("list wide", f"an app with {plan.WIDE} machines on {plan.WIDE} hosts"),
        ("", f"all, at {PER_S} requests/s over {plan.MACHINES} machines"),
    ):
        took = [answer.late_ms for answer in answers if answer.kind.startswith(kind)]
        name = f"api.{kind.replace(' ', '_') or 'all'}"
        for percent in (50, 95, 99):
            found.append(figure(f"{name}_p{percent}", percentile(took, percent), "ms", n=len(took), meaning=meaning))
    return found


def _costs(cluster: Cluster, used: dict[str, float], n: int, idle: dict[str, float], settled_s: float) -> list[Figure]:
    found = [
        figure("api.server_listens", cluster.started_s, "s", n=1, meaning="from its start until it answers"),
        figure("api.server_settled", settled_s, "s", n=1, meaning="until it has read the rows of all hosts"),
    ]
    for name in ("server", "agent", "bus"):
        memory_mb = memory_kib(cluster.pids[name]) * 1024 / 1e6
        found += [
            figure(f"api.{name}_idle", idle[name], "cores", n=1, meaning=f"CPU of the {name}, nothing asked"),
            figure(f"api.{name}_cpu", used[name], "cores", n=n, meaning=f"CPU of the {name} under that load"),
            figure(f"api.{name}_memory", memory_mb, "MB", n=1, meaning=f"resident, the {name}"),
        ]
    return found


async def _overload(cluster: Cluster, mix: _Mix, per_s: int, seconds: float) -> list[Figure]:
    memory_mb = memory_kib(cluster.pids["server"]) * 1024 / 1e6
    answers = await at_rate(per_s, seconds, mix.ask)
    grown_mb = memory_kib(cluster.pids["server"]) * 1024 / 1e6 - memory_mb
    codes = Counter(answer.code for answer in answers)
    sys.stderr.write(f"    {per_s}/s: {dict(codes)}\n")
    accepted = [answer for answer in answers if answer.code in (200, 204)]
    refused = [answer for answer in answers if answer.code == 429]
    lost = len(answers) - len(accepted) - len(refused) + sum(not answer.retry_after for answer in refused)
    after = await at_rate(PER_S, 5.0, mix.ask)
    name, n = f"api.at_{per_s}", len(answers)
    took, worst = [answer.late_ms for answer in accepted], max(answer.late_ms for answer in answers)
    told = [answer.late_ms for answer in refused] or [0.0]
    again = [answer.late_ms for answer in after if answer.code in (200, 204)]
    return [
        figure(f"{name}_accepted", len(accepted) / seconds, "/s", n=n, meaning=f"answered, of {per_s} requests/s"),
        figure(f"{name}_refused", len(refused) / seconds, "/s", n=n, meaning="429 with Retry-After"),
        figure(f"{name}_lost", lost, "requests", n=n, meaning=f"5xx, or no answer within {LIMIT_S:g} s"),
        figure(f"{name}_accepted_p99", percentile(took, 99), "ms", n=len(took), meaning="those answered"),
        figure(f"{name}_refused_p99", percentile(told, 99), "ms", n=len(refused), meaning="those refused"),
        figure(f"{name}_worst", worst, "ms", n=n, meaning="the slowest answer of all"),
        figure(f"{name}_memory_grown", grown_mb, "MB", n=1, meaning="the server, by that load"),
        figure(f"{name}_after_p99", percentile(again, 99), "ms", n=len(again), meaning=f"{PER_S}/s right after it"),
    ]
