"""Machines by the API, as a client with a connection for each call asks for them; the start of the CLI would hide what
is measured. `Machines` is safe to use from several threads."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from pantala.testing.box import BoxRig

TIMEOUT_S = 75.0
WAIT_S = 60


class Machines:
    """Those of one app."""

    def __init__(self, box: BoxRig, app: str) -> None:
        settings = json.loads(Path(box.environment["PANTALA_CONFIG_DIR"], "config.json").read_text())
        self._host = settings["api_url"].removeprefix("http://")
        self._headers = {"Authorization": f"Bearer {settings['token']}", "Content-Type": "application/json"}
        self._base = f"/v1/apps/{app}/machines"

    def list(self) -> list[dict[str, Any]]:
        return self._call("GET", "")

    def create(self, config: dict[str, Any], *, skip_launch: bool = False) -> dict[str, Any]:
        return self._call("POST", "", {"config": config, "skip_launch": skip_launch})

    def like(self, machine: dict[str, Any], number: int) -> list[str]:
        """The ids of `number` machines: this one and copies of it."""
        return [machine["id"], *(self.create(machine["config"])["id"] for _ in range(number - 1))]

    def put_to_sleep(self, machine: str, verb: str, state: str) -> None:
        """`verb`: stop or suspend. Returns once its record says `state`."""
        self._call("POST", f"/{machine}/{verb}", {})
        self.wait(machine, state)

    def wait(self, machine: str, state: str) -> None:
        instance = self._call("GET", f"/{machine}")["instance_id"]
        self._call("GET", f"/{machine}/wait?state={state}&timeout={WAIT_S}&instance_id={instance}")

    def destroy(self, machine: str) -> None:
        self._call("DELETE", f"/{machine}?force=true")

    def _call(self, method: str, path: str, document: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT_S)
        try:
            body = None if document is None else json.dumps(document)
            connection.request(method, self._base + path, body, self._headers)
            response = connection.getresponse()
            said = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise AssertionError(f"{method} {self._base}{path} answered {response.status} {said[:300]!r}")
        return json.loads(said) if said else None
