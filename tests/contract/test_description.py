"""The API does what its description says: schemathesis asks for what `/openapi.json` allows, and for what it does not.

Seeded, over loopback, against the application with a fake agent. Each operation gets an app, a machine and a key of its
own as path parameters, so that requests reach more than a 404. Operations that are documented as not offered are asked
for in `test_api_platform.py`. That bad requests are refused is not asked here: an empty query parameter counts as none,
and unknown ones are not read, as clients of the original need it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pantala.server import openapi
from pantala.testing.platform import TestPlatform, running, serve_http

EXAMPLES = 6
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
STEADY = {"follow": "false", "timeout": "1", "state": "started"}
"""Of operations that would wait: what keeps them short."""
POLICY = {
    "name": "known",
    "selector": {"all": True},
    "rules": [{"action": "allow", "direction": "egress", "ports": [{"protocol": "tcp", "port": 443}]}],
}


@schemathesis.serializer("application/gzip")
def as_it_is(ctx: schemathesis.SerializationContext, value: Any) -> bytes:
    """A context that is uploaded: whatever bytes were made up."""
    del ctx
    return value if isinstance(value, bytes) else str(value).encode()


def described() -> schemathesis.BaseSchema:
    document = openapi.document()
    document["paths"] = {
        path: {method: one for method, one in methods.items() if not one.get("x-not-offered")}
        for path, methods in document["paths"].items()
    }
    return schemathesis.openapi.from_dict(document)


OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for found in described().get_all_operations()
    if (operation := found.ok() if isinstance(found, Ok) else None) is not None
}


class Described:
    """A platform behind a URL, run in a thread of its own."""

    def __init__(self, platform: TestPlatform, url: str, call: Any) -> None:
        self.url = url
        self.auth = platform.auth
        self._platform = platform
        self._call = call
        self._apps = 0

    def things(self) -> dict[str, str]:
        """Path parameters of what exists."""
        self._apps += 1
        return self._call(self._make, f"app-{self._apps}")

    async def _make(self, app: str) -> dict[str, str]:
        await self._platform.create_app(app)
        machine = await self._platform.create_machine(app, config={"image": f"registry.pantala.test/{app}:v1"})
        body = {"type": "nacl_sign" if self._apps % 2 else "xaes256gcm"}
        path = f"/v1/apps/{app}/secretkeys/known/generate"
        (await self._platform.http.post(path, json=body, headers=self.auth)).raise_for_status()
        made = await self._platform.http.post(f"/v1/apps/{app}/network_policies", json=POLICY, headers=self.auth)
        found = {"app": app, "machine": machine["id"], "org": "acme", "name": "known", "key": "role"}
        return found | {"policy": made.raise_for_status().json()["id"]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Generator[Described]:
    @asynccontextmanager
    async def serving(folder: Path) -> AsyncGenerator[tuple[TestPlatform, str]]:
        async with running(folder) as platform, serve_http(platform) as url:
            platform.agents["node-1"].memory_mib = 1 << 20
            yield platform, url

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serving(tmp_path_factory.mktemp("api"))) as (platform, url),
    ):
        yield Described(platform, url, portal.call)


@pytest.mark.parametrize("name", OPERATIONS)
def test_answers_are_as_described(api: Described, name: str) -> None:
    operation = OPERATIONS[name]
    things = api.things()
    modes = [GenerationMode.POSITIVE]
    if operation.query or operation.body:
        modes.append(GenerationMode.NEGATIVE)

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.explicit, Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def ask(case: Case[Any]) -> None:
        case.path_parameters = {
            **(case.path_parameters or {}),
            **{k: v for k, v in things.items() if f"{{{k}}}" in name},
        }
        steady = {
            key: value for key, value in STEADY.items() if operation.query.get(key) and key in ("follow", "timeout")
        }
        case.query = {**(case.query or {}), **steady}
        response = case.call(base_url=api.url, headers=api.auth)
        checks = [check for check in CHECKS if check is not not_a_server_error or response.status_code != 501]
        case.validate_response(response, checks=checks)

    ask()
