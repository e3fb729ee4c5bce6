"""Logging in to machines: certificates, and the way there for users who are not in the private network.

Both are authorised like any change of the app. A certificate says who may log in, for a short time, to the machines of
one app; the way there is authorised when it opens and again every few seconds, so a user who lost the right is out
within `LOOK_AGAIN_S`, whatever certificate he holds. Sessions and certificates are in the audit log.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.machines import Machines
from pantala.control.ssh_authority import SshAuthority
from pantala.errors import InvalidRequest, NotFound, PantalaError
from pantala.kit.clock import rfc3339_ms
from pantala.store.records import AppRecord
from pantala.wire.node import CloseStream, OpenedStream, OpenSsh, ReadStream, StreamData, WriteStream
from pantala.wire.ssh import HOURS_MAX, LOGINS_MAX, Certificate, CertificateRequest

log = structlog.get_logger()

LOOK_AGAIN_S = 3.0
READ_WAIT_S = 20.0
CALL_S = 10.0
KEY_LENGTH_MAX = 512
_LOGIN = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")


class Ssh:
    def __init__(self, context: Context, access: Access, machines: Machines, authority: SshAuthority) -> None:
        self._context = context
        self._access = access
        self._machines = machines
        self._authority = authority

    async def issue(self, principal: Principal, app_name: str, request: CertificateRequest) -> Certificate:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        key = _public_key(request.public_key)
        if not 1 <= request.hours <= HOURS_MAX:
            raise InvalidRequest(f"must be 1 to {HOURS_MAX}", field="hours")
        if not 1 <= len(request.principals) <= LOGINS_MAX:
            raise InvalidRequest(f"must be 1 to {LOGINS_MAX} users", field="principals")
        for login in request.principals:
            if not _LOGIN.fullmatch(login):
                raise InvalidRequest(f"{login!r} is not the name of a user", field="principals")
        now_s = self._context.now_ms() // 1000
        until_s = now_s + request.hours * 3600
        key_id = f"{principal.email} for {app.name}"
        text, serial = self._authority.sign(
            key,
            key_id=key_id,
            principals=[f"{login}@{scope(app)}" for login in request.principals],
            now_s=now_s,
            until_s=until_s,
        )
        detail = {"serial": str(serial), "principals": request.principals, "hours": request.hours}
        await self._tell(principal, app, "ssh.certificate", f"{app.name}/ssh", detail)
        return Certificate(
            certificate=text,
            key_id=key_id,
            serial=str(serial),
            principals=request.principals,
            valid_until=rfc3339_ms(until_s * 1000),
        )

    @asynccontextmanager
    async def session(
        self, authenticate: Callable[[], Awaitable[Principal]], app_name: str, machine_id: str, *, origin: str
    ) -> AsyncGenerator[Way]:
        """The way to the machine's SSH port, for as long as the block lasts; `authenticate` says who asks, now."""
        principal = await authenticate()
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        placement = await self._machines.placement(app, machine_id)
        if placement.tombstone:
            raise NotFound("machine not found")
        opened: OpenedStream = await self._context.nodes.call(placement.node, OpenSsh(machine_id=machine_id))
        began_ms, target = self._context.now_ms(), f"{app.name}/{machine_id}"
        reason = "the connection was lost"
        try:
            await self._tell(principal, app, "ssh.begin", target, {"from": origin})

            async def still_allowed() -> None:
                now = await authenticate()
                await self._access.app(now, app_name, Action.DEPLOY)

            yield Way(self._context, placement.node, opened.stream_id, still_allowed)
            reason = "it ended"
        except PantalaError as error:
            reason = error.message
            raise
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CALL_S):
                try:
                    await self._context.nodes.call(placement.node, CloseStream(stream_id=opened.stream_id))
                except PantalaError as error:
                    log.info("the host will close the stream itself", machine=machine_id, error=error.message)
                seconds = round((self._context.now_ms() - began_ms) / 1000, 1)
                detail = {"from": origin, "seconds": seconds, "reason": reason}
                await self._tell(principal, app, "ssh.end", target, detail, outcome=reason)

    async def _tell(
        self,
        principal: Principal,
        app: AppRecord,
        action: str,
        target: str,
        detail: dict[str, Any],
        *,
        outcome: str = "accepted",
    ) -> None:
        await self._context.db.write(
            lambda c: self._context.audit(
                c,
                actor=principal.email,
                org_id=app.org_id,
                action=action,
                target=target,
                detail=detail,
                outcome=outcome,
            )
        )


class Way:
    """One end of the connection; the machine's host has the other."""

    def __init__(
        self, context: Context, node: str, stream_id: str, still_allowed: Callable[[], Awaitable[None]]
    ) -> None:
        self._context = context
        self._node = node
        self._stream_id = stream_id
        self._still_allowed = still_allowed

    async def read(self) -> bytes:
        """The next bytes; none at the end."""
        while True:
            request = ReadStream(stream_id=self._stream_id, wait_s=READ_WAIT_S)
            got: StreamData = await self._context.nodes.call(self._node, request, timeout_s=READ_WAIT_S + CALL_S)
            if got.data or got.ended:
                return got.data

    async def write(self, data: bytes, *, last: bool = False) -> None:
        request = WriteStream(stream_id=self._stream_id, data=data, last=last)
        await self._context.nodes.call(self._node, request, timeout_s=CALL_S)

    async def watch(self) -> None:
        """Raises as soon as the right to it is gone, or control cannot say."""
        while True:
            await self._context.clock.sleep(LOOK_AGAIN_S)
            await self._still_allowed()


def scope(app: AppRecord) -> str:
    """What a certificate names beside the user; with the org, so that somebody else's app of this name is another."""
    return f"{app.org_slug}/{app.name}"


def _public_key(text: str) -> Ed25519PublicKey:
    try:
        key = load_ssh_public_key(text.strip().encode()) if len(text) <= KEY_LENGTH_MAX else None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest("is not an OpenSSH public key", field="public_key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest("must be an ed25519 key: ssh-ed25519 AAAA…", field="public_key")
    return key
