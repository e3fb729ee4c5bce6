"""SIGKILLs at any moment: what serves goes on, what was acknowledged is there, nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from probe_rig import (
    GREETING,
    SteadyClient,
    api_of,
    asked,
    await_back,
    deploy_probe,
    image_of,
    kill,
    steady_client,
)

from pantala.testing.box import BoxRig
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

APP = "survivor"
SEED = 20261121
KILLS = 20
KILL_WITHIN_S = 1.2
AGENT = "agent-iad-1"


@pytest.fixture(scope="module")
def survivor(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    deploy_probe(box, tmp_path_factory.mktemp("survivor"), APP)
    yield APP
    box.pantala("apps", "destroy", APP, "--yes")


class Side:
    """Machines beside those that serve. What the API acknowledged is noted, and what may be after an error."""

    def __init__(self, api: httpx2.Client, image: str, choices: random.Random) -> None:
        self._api = api
        self._image = image
        self._choices = choices
        self.wanted: dict[str, set[str]] = {}
        """States that each machine may settle in: one when the last call was acknowledged."""
        self.notes: dict[str, set[str]] = {}
        """The values that the variable NOTE may have, likewise."""
        self.calls: list[str] = []
        self.acknowledged: list[str] = []
        """The calls among them that were answered with a 2xx."""

    def step(self, number: int) -> None:
        """One change, ended by an answer or by the kill."""
        present = sorted(name for name, states in self.wanted.items() if "destroyed" not in states)
        verbs = ["create"] if len(present) < 3 else ["update", "stop", "start", "destroy", "restart"]
        verb = self._choices.choice(verbs)
        if verb == "create":
            self._create(number)
        else:
            getattr(self, f"_{verb}")(self._choices.choice(present), number)

    def _create(self, number: int) -> None:
        answer = self._call("create", "POST", "", {"config": self._config(number), "region": "iad"})
        if answer is not None:
            self.wanted[answer["id"]], self.notes[answer["id"]] = {"started"}, {str(number)}

    def _update(self, machine_id: str, number: int) -> None:
        done = self._call("update", "POST", f"/{machine_id}", {"config": self._config(number)}) is not None
        self._note(machine_id, "started", done=done)
        self.notes[machine_id] = {str(number)} if done else self.notes[machine_id] | {str(number)}

    def _stop(self, machine_id: str, number: int) -> None:
        del number
        self._note(machine_id, "stopped", done=self._call("stop", "POST", f"/{machine_id}/stop", {}) is not None)

    def _start(self, machine_id: str, number: int) -> None:
        del number
        self._note(machine_id, "started", done=self._call("start", "POST", f"/{machine_id}/start", {}) is not None)

    def _restart(self, machine_id: str, number: int) -> None:
        del number
        self._note(machine_id, "started", done=self._call("restart", "POST", f"/{machine_id}/restart", {}) is not None)

    def _destroy(self, machine_id: str, number: int) -> None:
        del number
        done = self._call("destroy", "DELETE", f"/{machine_id}?force=true", None) is not None
        self._note(machine_id, "destroyed", done=done)

    def _note(self, machine_id: str, state: str, *, done: bool) -> None:
        self.wanted[machine_id] = {state} if done else self.wanted[machine_id] | {state}

    def _call(self, what: str, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The answer; None when there was none or it was an error."""
        try:
            answer = self._api.request(method, f"/v1/apps/{APP}/machines{path}", json=body)
        except httpx2.HTTPError as error:
            self.calls.append(f"{what} {path}: {error!r}")
            return None
        self.calls.append(f"{what} {path}: {answer.status_code} {answer.text[:120] if answer.is_error else ''}")
        if not answer.is_success:
            return None
        self.acknowledged.append(f"{what} {path}")
        return answer.json() if answer.content else {}

    def _config(self, number: int) -> dict[str, Any]:
        """No service: these never get a request, so those that serve are known."""
        return {
            "image": self._image,
            "env": {"NOTE": str(number)},
            "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256},
            "restart": {"policy": "always"},
        }

    def settled(self) -> list[str]:
        """What is not as acknowledged; empty when all is."""
        found = {m["id"]: m for m in self._api.get(f"/v1/apps/{APP}/machines").json()}
        wrong: list[str] = []
        for machine_id, states in self.wanted.items():
            machine = found.get(machine_id)
            state = machine["state"] if machine else "destroyed"
            if state not in states:
                wrong.append(f"{machine_id} is {state}, not {sorted(states)}")
            elif machine and state != "destroyed" and machine["config"]["env"]["NOTE"] not in self.notes[machine_id]:
                wrong.append(f"{machine_id} has note {machine['config']['env']}, not {self.notes[machine_id]}")
        return wrong


def serving(client: SteadyClient) -> None:
    client.await_more(5)
    assert client.answers().failures == []


def test_an_agent_killed_twenty_times_loses_and_leaks_nothing(box: BoxRig, survivor: str, tmp_path: Path) -> None:
    choices = random.Random(SEED)
    before = {machine["id"]: machine["instance_id"] for machine in box.machines(survivor)}
    url = f"https://{survivor}.apps.pantala.test/"
    with api_of(box) as api, steady_client(box, tmp_path, url) as client:
        side = Side(api, image_of(box, survivor), choices)
        for number in range(KILLS):
            change = threading.Thread(target=side.step, args=(number,))
            change.start()
            time.sleep(choices.uniform(0, KILL_WITHIN_S))  # the moment of the kill is the thing tried, nothing waits
            killed = kill(box, AGENT)
            change.join(timeout=60)
            assert not change.is_alive(), side.calls
            await_back(box, AGENT, killed)
        serving(client)
        until_sync(side.settled, lambda wrong: not wrong, within_s=60, every_s=0.5)
        now = {m["id"]: (m["instance_id"], m["state"]) for m in box.machines(survivor)}
        assert {name: now[name] for name in before} == {name: (at, "started") for name, at in before.items()}
        assert len(side.acknowledged) >= KILLS // 4, side.calls
        until_sync(lambda: box.pantala("audit", "leaks", check=False), lambda seen: seen.code == 0, within_s=30)
        for machine_id in side.wanted:
            api.request("DELETE", f"/v1/apps/{survivor}/machines/{machine_id}?force=true")
        until_sync(lambda: {m["id"] for m in box.machines(survivor)}, lambda ids: ids == set(before), within_s=60)
        until_sync(lambda: box.pantala("audit", "leaks", check=False), lambda seen: seen.code == 0, within_s=30)
        assert client.answers().failures == []


@pytest.mark.parametrize("name", ["server", "nats-iad-1"])
def test_what_serves_goes_on_without_control_plane_or_bus(
    box: BoxRig, survivor: str, tmp_path: Path, name: str
) -> None:
    box.pantala("secrets", "set", "--stage", f"KEPT_BY_{name.upper().replace('-', '_')}=acknowledged", "-a", survivor)
    before = acknowledged(box, survivor)
    with steady_client(box, tmp_path, f"https://{survivor}.apps.pantala.test/") as client:
        client.await_more(5)
        killed = kill(box, name)
        serving(client)
        await_back(box, name, killed)
        until_sync(lambda: acknowledged(box, survivor), lambda now: now == before, within_s=30, every_s=0.5)
        machine_id = box.machines(survivor)[0]["id"]
        box.pantala("machine", "stop", machine_id, "-a", survivor)
        box.pantala("machine", "start", machine_id, "-a", survivor)
        serving(client)


def test_a_killed_proxy_serves_new_connections_again_at_once(box: BoxRig, survivor: str, tmp_path: Path) -> None:
    before = acknowledged(box, survivor)
    with steady_client(box, tmp_path, f"https://{survivor}.apps.pantala.test/") as client:
        client.await_more(5)
        kill(box, "proxy-iad-1")
        begun = time.monotonic()
        until_sync(
            lambda: box.at("curl", "-sS", "--max-time", "5", f"https://{survivor}.apps.pantala.test/", check=False),
            lambda seen: seen.stdout == GREETING,
            within_s=15,
        )
        assert time.monotonic() - begun < 5
        client.await_more(5)
    assert asked(box, survivor, "/") == GREETING
    assert acknowledged(box, survivor) == before


def acknowledged(box: BoxRig, app: str) -> Any:
    """What the API said before and must say after; nothing while it does not answer."""
    seen = (
        box.pantala("apps", "list", "--json", check=False),
        box.pantala("machine", "list", "-a", app, "-q", check=False),
    )
    secrets = box.pantala("secrets", "list", "-a", app, "--json", check=False)
    releases = box.pantala("releases", "-a", app, "--json", check=False)
    return [done.stdout if done.code == 0 else None for done in (*seen, secrets, releases)]
