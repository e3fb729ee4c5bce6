"""The public API as typed calls. Errors come back as the `PantalaError` that the server raised.

Nothing is retried but a connection that could not be made. Each mutating call carries an `Idempotency-Key` all the
same, so that a proxy in between may repeat it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import msgspec

from pantala import errors
from pantala.kit.ids import ulid
from pantala.kit.secret import Secret
from pantala.wire import api, audit, escape, hosts, ssh
from pantala.wire.addresses import AllocateRequest, Assignment, Assignments
from pantala.wire.certificates import (
    AddAcmeRequest,
    AddCustomRequest,
    CertificateDetail,
    CertificateList,
    CertificateSummary,
)
from pantala.wire.machine import Event, Machine
from pantala.wire.platform import PlacementsRequest, PlacementsResponse
from pantala.wire.secret_keys import (
    ListSecretKeysResponse,
    SecretKeyInfo,
    SetSecretKeyRequest,
    SetSecretKeyResponse,
)
from pantala.wire.statics import PushStaticsRequest, StaticsCleaned, StaticsFinished, StaticsPush
from pantala.wire.trace import RequestTrace

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 75.0
ERROR_TEXT_MAX = 2_000
CERTIFICATES_PAGE = 500
STATICS_TIMEOUT_S = 600.0
"""Copying and removing thousands of objects takes the store its time."""

_BY_STATUS: dict[str, type[errors.PantalaError]] = {
    "insufficient_capacity": errors.CapacityError,
    "disk_full": errors.DiskFull,
    "name_taken": errors.NameTaken,
    "lease_held": errors.LeaseHeld,
    "wrong_state": errors.WrongState,
}
_BY_CODE: dict[int, type[errors.PantalaError]] = {
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.RequestTimeout,
    409: errors.Conflict,
    412: errors.WrongState,
}


class ApiClient:
    """Made by `connect`. `app` parameters are app names."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    # -- accounts and apps -------------------------------------------------------------------------------------------

    async def user(self) -> api.User:
        return await self._call("GET", "/v1/user", api.User)

    async def replay_rules(self, org: str) -> api.ReplayRules:
        return await self._call("GET", f"/v1/orgs/{org}/replays", api.ReplayRules)

    async def update_replay_rules(self, org: str, request: api.UpdateReplayRules) -> api.ReplayRules:
        return await self._call("POST", f"/v1/orgs/{org}/replays", api.ReplayRules, body=request)

    async def apps(self, org: str) -> list[api.App]:
        return (await self._call("GET", "/v1/apps", api.ListAppsResponse, params={"org_slug": org})).apps

    async def app(self, name: str) -> api.App:
        return await self._call("GET", f"/v1/apps/{name}", api.App)

    async def create_app(self, name: str, org: str) -> api.App:
        return await self._call("POST", "/v1/apps", api.App, body=api.CreateAppRequest(app_name=name, org_slug=org))

    async def delete_app(self, name: str) -> None:
        await self._call("DELETE", f"/v1/apps/{name}", None)

    async def create_token(self, request: api.CreateTokenRequest) -> api.CreateTokenResponse:
        return await self._call("POST", "/v1/tokens", api.CreateTokenResponse, body=request)

    async def tokens(self) -> list[api.TokenInfo]:
        return await self._call("GET", "/v1/tokens", list[api.TokenInfo])

    async def revoke_token(self, token_id: str) -> None:
        await self._call("DELETE", f"/v1/tokens/{quote(token_id, safe='')}", None)

    async def regions(self) -> api.RegionsResponse:
        return await self._call("GET", "/v1/platform/regions", api.RegionsResponse)

    async def audit(self, *, app: str, org: str, since_s: float, limit: int, cursor: str) -> audit.AuditPage:
        """One page, newest first."""
        given = {"app": app, "org_slug": org, "since": f"{since_s:g}s" if since_s else "", "cursor": cursor}
        params = {name: value for name, value in given.items() if value} | {"limit": limit}
        return await self._call("GET", "/v1/audit", audit.AuditPage, params=params)

    # -- hosts -------------------------------------------------------------------------------------------------------

    async def create_host_token(self, request: hosts.CreateHostTokenRequest) -> hosts.HostToken:
        return await self._call("POST", "/v1/hosts/tokens", hosts.HostToken, body=request)

    async def join_host(self, request: hosts.JoinRequest) -> hosts.Joined:
        """Needs no login: the token in the request is all it takes."""
        return await self._call("POST", "/v1/hosts/join", hosts.Joined, body=request)

    async def hosts(self) -> list[hosts.HostView]:
        return await self._call("GET", "/v1/hosts", list[hosts.HostView])

    async def drain_host(self, host: str, *, undo: bool = False) -> hosts.HostDeparture:
        body = hosts.DrainHostRequest(undo=undo)
        return await self._call("POST", f"/v1/hosts/{host}/drain", hosts.HostDeparture, body=body)

    async def host_departure(self, host: str) -> hosts.HostDeparture:
        return await self._call("GET", f"/v1/hosts/{host}/drain", hosts.HostDeparture)

    async def lose_host(self, host: str) -> hosts.HostDeparture:
        return await self._call("POST", f"/v1/hosts/{host}/lost", hosts.HostDeparture)

    async def escape_suite(self, host: str, *, run: bool) -> escape.EscapeReport:
        """The last one of a host, or a new one."""
        return await self._call("POST" if run else "GET", f"/v1/hosts/{host}/escape-suite", escape.EscapeReport)

    async def remove_host(self, host: str, *, force: bool = False) -> hosts.HostDeparture:
        params = {"force": "true"} if force else {}
        return await self._call("DELETE", f"/v1/hosts/{host}", hosts.HostDeparture, params=params)

    # -- ssh ---------------------------------------------------------------------------------------------------------

    async def ssh_certificate(self, app: str, request: ssh.CertificateRequest) -> ssh.Certificate:
        return await self._call("POST", f"/v1/apps/{app}/ssh_certificates", ssh.Certificate, body=request)

    # -- machines ----------------------------------------------------------------------------------------------------

    async def machines(self, app: str) -> list[Machine]:
        """Without the destroyed ones."""
        machines = await self._call("GET", f"/v1/apps/{app}/machines", list[Machine])
        return [machine for machine in machines if machine.state != "destroyed"]

    async def machine(self, app: str, machine_id: str) -> Machine:
        return await self._call("GET", self._machine(app, machine_id), Machine)

    async def create_machine(self, app: str, request: api.LaunchMachineRequest) -> Machine:
        return await self._call("POST", f"/v1/apps/{app}/machines", Machine, body=request)

    async def update_machine(
        self, app: str, machine_id: str, request: api.LaunchMachineRequest, *, nonce: str = ""
    ) -> Machine:
        return await self._call("POST", self._machine(app, machine_id), Machine, body=request, nonce=nonce)

    async def start(self, app: str, machine_id: str, *, nonce: str = "") -> None:
        await self._call("POST", self._machine(app, machine_id, "start"), None, nonce=nonce)

    async def suspend(self, app: str, machine_id: str, *, nonce: str = "") -> None:
        await self._call("POST", self._machine(app, machine_id, "suspend"), None, nonce=nonce)

    async def cordon(self, app: str, machine_id: str, *, nonce: str = "") -> None:
        await self._call("POST", self._machine(app, machine_id, "cordon"), None, nonce=nonce)

    async def uncordon(self, app: str, machine_id: str, *, nonce: str = "") -> None:
        await self._call("POST", self._machine(app, machine_id, "uncordon"), None, nonce=nonce)

    async def signal(self, app: str, machine_id: str, signal: str, *, nonce: str = "") -> None:
        body = api.SignalRequest(signal=signal)
        await self._call("POST", self._machine(app, machine_id, "signal"), None, body=body, nonce=nonce)

    async def run_command(self, app: str, machine_id: str, request: api.ExecRequest) -> api.ExecResponse:
        """Raises RequestTimeout when the command did not end within `request.timeout` seconds."""
        timeout_s = CALL_TIMEOUT_S + (request.timeout or 0)
        path = self._machine(app, machine_id, "exec")
        return await self._call("POST", path, api.ExecResponse, body=request, timeout_s=timeout_s)

    async def versions(self, app: str, machine_id: str) -> list[api.MachineVersion]:
        return await self._call("GET", self._machine(app, machine_id, "versions"), list[api.MachineVersion])

    async def stop(
        self, app: str, machine_id: str, *, signal: str | None = None, timeout: str | None = None, nonce: str = ""
    ) -> None:
        body = api.StopRequest(signal=signal, timeout=timeout)
        await self._call("POST", self._machine(app, machine_id, "stop"), None, body=body, nonce=nonce)

    async def restart(
        self,
        app: str,
        machine_id: str,
        *,
        signal: str | None = None,
        timeout: str | None = None,
        force_stop: bool = False,
        nonce: str = "",
    ) -> None:
        given = {"signal": signal, "timeout": timeout, "force_stop": "true" if force_stop else None}
        params = {name: value for name, value in given.items() if value}
        await self._call("POST", self._machine(app, machine_id, "restart"), None, params=params, nonce=nonce)

    async def destroy(self, app: str, machine_id: str, *, force: bool = False, nonce: str = "") -> None:
        params = {"force": "true" if force else "false"}
        await self._call("DELETE", self._machine(app, machine_id), None, params=params, nonce=nonce)

    async def wait(
        self, app: str, machine_id: str, *, states: list[str], timeout_s: int = 60, version: str | None = None
    ) -> None:
        """Raises RequestTimeout when none of `states` is reached. `timeout_s` 1 to 60."""
        params: dict[str, Any] = {"state": states, "timeout": timeout_s}
        if version:
            params["version"] = version
        await self._call("GET", self._machine(app, machine_id, "wait"), None, params=params)

    async def events(self, app: str, machine_id: str) -> list[Event]:
        return await self._call("GET", self._machine(app, machine_id, "events"), list[Event])

    async def processes(self, app: str, machine_id: str) -> list[api.ProcessStat]:
        return await self._call("GET", self._machine(app, machine_id, "ps"), list[api.ProcessStat])

    async def acquire_lease(self, app: str, machine_id: str, *, ttl_s: int, description: str) -> api.Lease:
        body = api.LeaseRequest(ttl=ttl_s, description=description)
        path = self._machine(app, machine_id, "lease")
        return (await self._call("POST", path, api.LeaseResponse, body=body, params={"ttl": ttl_s})).data

    async def lease(self, app: str, machine_id: str) -> api.Lease:
        """Raises NotFound when nobody holds the machine."""
        return (await self._call("GET", self._machine(app, machine_id, "lease"), api.LeaseResponse)).data

    async def refresh_lease(self, app: str, machine_id: str, *, ttl_s: int, nonce: str) -> api.Lease:
        path = self._machine(app, machine_id, "lease")
        body = api.LeaseRequest(ttl=ttl_s)
        return (await self._call("POST", path, api.LeaseResponse, body=body, params={"ttl": ttl_s}, nonce=nonce)).data

    async def release_lease(self, app: str, machine_id: str, *, nonce: str) -> None:
        await self._call("DELETE", self._machine(app, machine_id, "lease"), None, nonce=nonce)

    async def placements(self, request: PlacementsRequest) -> PlacementsResponse:
        return await self._call("POST", "/v1/platform/placements", PlacementsResponse, body=request)

    # -- secrets, releases -------------------------------------------------------------------------------------------

    async def secret_keys(self, app: str) -> list[SecretKeyInfo]:
        return (await self._call("GET", f"/v1/apps/{app}/secretkeys", ListSecretKeysResponse)).secret_keys

    async def set_secret_key(self, app: str, name: str, request: SetSecretKeyRequest) -> SetSecretKeyResponse:
        """Without a value one is made."""
        path = f"/v1/apps/{app}/secretkeys/{quote(name, safe='')}" + ("" if request.value is not None else "/generate")
        return await self._call("POST", path, SetSecretKeyResponse, body=request)

    async def delete_secret_key(self, app: str, name: str) -> None:
        await self._call("DELETE", f"/v1/apps/{app}/secretkeys/{quote(name, safe='')}", None)

    async def secrets(self, app: str) -> list[api.SecretInfo]:
        return (await self._call("GET", f"/v1/apps/{app}/secrets", _SecretList)).secrets

    async def set_secrets(self, app: str, values: dict[str, str | None]) -> api.SecretsResponse:
        body = api.SetSecretsRequest(values=values)
        return await self._call("POST", f"/v1/apps/{app}/secrets", api.SecretsResponse, body=body)

    async def releases(self, app: str) -> list[api.Release]:
        return (await self._call("GET", f"/v1/apps/{app}/releases", api.ListReleasesResponse)).releases

    async def create_release(self, app: str, request: api.CreateReleaseRequest) -> api.Release:
        return await self._call("POST", f"/v1/apps/{app}/releases", api.Release, body=request)

    async def update_release(self, app: str, release_id: str, request: api.UpdateReleaseRequest) -> api.Release:
        return await self._call("PATCH", f"/v1/apps/{app}/releases/{release_id}", api.Release, body=request)

    async def withdraw_release(self, app: str, release_id: str) -> None:
        """Of a deploy that changed nothing."""
        await self._call("DELETE", f"/v1/apps/{app}/releases/{release_id}", None)

    # -- certificates ------------------------------------------------------------------------------------------------

    async def certificates(self, app: str) -> list[CertificateSummary]:
        """All pages."""
        found: list[CertificateSummary] = []
        params: dict[str, Any] = {"limit": CERTIFICATES_PAGE}
        while True:
            page = await self._call("GET", f"/v1/apps/{app}/certificates", CertificateList, params=params)
            found += page.certificates
            if page.next_cursor is None:
                return found
            params["cursor"] = page.next_cursor

    async def add_certificate(self, app: str, hostname: str) -> CertificateDetail:
        body = AddAcmeRequest(hostname=hostname)
        return await self._call("POST", f"/v1/apps/{app}/certificates/acme", CertificateDetail, body=body)

    async def import_certificate(self, app: str, request: AddCustomRequest) -> CertificateDetail:
        return await self._call("POST", f"/v1/apps/{app}/certificates/custom", CertificateDetail, body=request)

    async def certificate(self, app: str, hostname: str) -> CertificateDetail:
        return await self._call("GET", self._certificate(app, hostname), CertificateDetail)

    async def check_certificate(self, app: str, hostname: str) -> CertificateDetail:
        return await self._call("POST", f"{self._certificate(app, hostname)}/check", CertificateDetail)

    async def remove_certificate(self, app: str, hostname: str) -> None:
        await self._call("DELETE", self._certificate(app, hostname), None)

    @staticmethod
    def _certificate(app: str, hostname: str) -> str:
        return f"/v1/apps/{app}/certificates/{quote(hostname, safe='')}"

    # -- addresses ---------------------------------------------------------------------------------------------------

    async def addresses(self, app: str) -> list[Assignment]:
        return (await self._call("GET", f"/v1/apps/{app}/ip_assignments", Assignments)).ips

    async def allocate_address(self, app: str, request: AllocateRequest) -> Assignment:
        return await self._call("POST", f"/v1/apps/{app}/ip_assignments", Assignment, body=request)

    async def release_address(self, app: str, address: str) -> None:
        await self._call("DELETE", f"/v1/apps/{app}/ip_assignments/{quote(address, safe=':')}", None)

    # -- logs, builds ------------------------------------------------------------------------------------------------

    async def logs(
        self, app: str, *, machine_id: str | None = None, next_token: str = "", limit: int = 100
    ) -> api.LogsResponse:
        params: dict[str, Any] = {"limit": limit}
        if machine_id:
            params["instance"] = machine_id
        if next_token:
            params["next_token"] = next_token
        return await self._call("GET", f"/v1/apps/{app}/logs", api.LogsResponse, params=params)

    async def follow_logs(
        self, app: str, *, machine_id: str | None = None, next_token: str = ""
    ) -> AsyncGenerator[api.LogLine]:
        """Lines after `next_token` as they are written, until the caller stops."""
        params = {"follow": "true"} | ({"instance": machine_id} if machine_id else {})
        if next_token:
            params["next_token"] = next_token
        async with self._stream("GET", f"/v1/apps/{app}/logs", params=params) as lines:
            async for line in lines:
                yield msgspec.json.decode(line, type=api.LogLine)

    async def trace(self, request_id: str) -> RequestTrace:
        return await self._call("GET", f"/v1/traces/{quote(request_id, safe='')}", RequestTrace)

    async def build(self, app: str, context: Path, options: api.BuildOptions) -> AsyncGenerator[api.BuildEvent]:
        """Upload a context (tar.gz) and follow its build."""
        headers = {
            "content-type": "application/gzip",
            "pantala-build-options": msgspec.json.encode(options).decode("ascii"),
        }
        async with self._stream(
            "POST", f"/v1/apps/{app}/builds", headers=headers, content=_file_chunks(context)
        ) as lines:
            async for line in lines:
                yield msgspec.json.decode(line, type=api.BuildEvent)

    # -- files in buckets --------------------------------------------------------------------------------------------

    async def begin_statics(self, app: str, request: PushStaticsRequest) -> StaticsPush:
        return await self._call("POST", f"/v1/apps/{app}/statics", StaticsPush, body=request)

    async def upload_static(self, app: str, push: StaticsPush, path: str, file: Path) -> None:
        """Whole, and as it was announced."""
        address = f"/v1/apps/{app}/statics/{push.id}/files"
        params = {"bucket": push.bucket, "path": path}
        headers = {"content-type": "application/octet-stream"}
        async with self._stream("PUT", address, params=params, headers=headers, content=_file_chunks(file)) as lines:
            async for _ in lines:
                pass

    async def finish_statics(self, app: str, push: StaticsPush) -> StaticsFinished:
        path, params = f"/v1/apps/{app}/statics/{push.id}/finish", {"bucket": push.bucket}
        return await self._call("POST", path, StaticsFinished, params=params, timeout_s=STATICS_TIMEOUT_S)

    async def abandon_statics(self, app: str, push: StaticsPush) -> None:
        path, params = f"/v1/apps/{app}/statics/{push.id}", {"bucket": push.bucket}
        await self._call("DELETE", path, None, params=params, timeout_s=STATICS_TIMEOUT_S)

    async def clean_statics(self, app: str) -> StaticsCleaned:
        return await self._call("POST", f"/v1/apps/{app}/statics/clean", StaticsCleaned, timeout_s=STATICS_TIMEOUT_S)

    # -- requests ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _machine(app: str, machine_id: str, action: str = "") -> str:
        return f"/v1/apps/{app}/machines/{machine_id}" + (f"/{action}" if action else "")

    async def _call(
        self,
        method: str,
        path: str,
        answer: type[T] | None,
        *,
        body: msgspec.Struct | None = None,
        params: dict[str, Any] | None = None,
        nonce: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> T:
        headers = {"fly-machine-lease-nonce": nonce} if nonce else {}
        if method != "GET":
            headers["idempotency-key"] = ulid()
        content = None
        if body is not None:
            content = msgspec.json.encode(body)
            headers["content-type"] = "application/json"
        try:
            response = await self._http.request(
                method,
                path,
                params=params,
                headers=headers,
                content=content,
                timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )
        except httpx2.HTTPError as error:
            raise _unreachable(self._http, error) from error
        if response.status_code > 299:
            raise error_of(response.status_code, response.content, response.headers.get("fly-request-id", ""))
        if answer is None:
            return None  # pyright: ignore[reportReturnType] - callers without an answer type ignore it
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.DecodeError as error:
            raise errors.InternalError(f"{method} {path} answered something else than expected: {error}") from error

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        content: AsyncGenerator[bytes] | None = None,
    ) -> AsyncGenerator[AsyncGenerator[str]]:
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)  # the caller's scope ends a stream
        try:
            async with self._http.stream(
                method, path, params=params, headers=headers, content=content, timeout=timeout
            ) as response:
                if response.status_code > 299:
                    text = await response.aread()
                    raise error_of(response.status_code, text, response.headers.get("fly-request-id", ""))
                yield (line async for line in response.aiter_lines() if line)
        except httpx2.HTTPError as error:
            raise _unreachable(self._http, error) from error


class _SecretList(msgspec.Struct, frozen=True):
    secrets: list[api.SecretInfo]


@asynccontextmanager
async def connect(base_url: str, token: Secret, *, user_agent: str = "pantala") -> AsyncGenerator[ApiClient]:
    headers = {"user-agent": user_agent}
    if token.reveal():
        headers["authorization"] = f"Bearer {token.reveal()}"
    timeout = httpx2.Timeout(CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    transport = httpx2.AsyncHTTPTransport(retries=2)  # only connections that were never made
    async with httpx2.AsyncClient(base_url=base_url, headers=headers, timeout=timeout, transport=transport) as http:
        yield ApiClient(http)


def error_of(code: int, content: bytes, request_id: str) -> errors.PantalaError:
    """The error that the server raised, from its code and body."""
    try:
        body = msgspec.json.decode(content, type=api.ErrorBody)
        message, status = body.error, body.status
    except msgspec.DecodeError:
        message, status = content.decode(errors="replace")[:ERROR_TEXT_MAX] or f"the API answered {code}", "unknown"
    if code == 429:
        return errors.RateLimited(message, retry_after_s=1.0)
    if code >= 500:
        return errors.InternalError(f"{message} (request {request_id})" if request_id else message)
    kind = _BY_STATUS.get(status) or _BY_CODE.get(code) or errors.UserError
    return kind(message, status=status) if kind is not errors.CapacityError else errors.CapacityError(message)


def _unreachable(http: httpx2.AsyncClient, error: Exception) -> errors.TransientError:
    return errors.TransientError(
        f"the API at {http.base_url} does not answer: {error or type(error).__name__}",
        hint="is the platform running? `pantala doctor` looks",
    )


async def _file_chunks(path: Path) -> AsyncGenerator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk
