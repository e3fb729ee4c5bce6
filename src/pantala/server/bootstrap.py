"""The first admin, their org and a token: `python -m pantala.server.bootstrap --settings FILE --email … --org …`.

Also makes the keys and certificates that other programs need before the server runs, and admits the first hosts
(`--hosts`). Prints one JSON document; safe to repeat (each time with a new token), also while the server runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec

from pantala.control.keys import ClusterKey
from pantala.control.registry_tokens import ISSUER, SERVICE
from pantala.control.service import Control, make_context
from pantala.errors import InvalidRequest, NodeUnreachable, PantalaError
from pantala.images.registry import RegistryClient
from pantala.kit.bus import Handler
from pantala.kit.clock import SystemClock
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer, ensure_key
from pantala.server import settings as read_settings
from pantala.server.compose import NoBuilder
from pantala.store.database import open_database
from pantala.telemetry import configure
from pantala.wire.hosts import JoinRequest
from pantala.wire.server import Bootstrapped, ServerSettings


class _NoBus:
    """Bootstrapping asks no node."""

    async def publish(self, subject: str, payload: bytes) -> None:
        raise NodeUnreachable("there is no bus yet")

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        raise NodeUnreachable("there is no bus yet")

    async def serve(self, subject: str, handler: Handler) -> None:
        raise NodeUnreachable("there is no bus yet")


class _NoRows:
    """The server publishes when it starts."""

    async def put(self, rows: Sequence[Row]) -> int:
        return 0

    async def replace_all(self, rows: Sequence[Row]) -> int:
        return 0


async def bootstrap(
    settings: ServerSettings, *, email: str, org: str, hosts: Sequence[JoinRequest] = ()
) -> Bootstrapped:
    clock, state_dir = SystemClock(), Path(settings.state_dir)
    key = ClusterKey.load(read_settings.cluster_key_path(settings))
    verify_key = Signer(ensure_key(read_settings.signing_key_path(settings))).verify_key
    db = open_database(read_settings.database_path(settings))
    registry = RegistryClient(endpoints={})
    try:
        context = make_context(
            db=db, bus=_NoBus(), clock=clock, key=key, settings=read_settings.control_settings(settings)
        )
        control = Control(
            context,
            sink=_NoRows(),
            registry=registry,
            builder=NoBuilder(),
            state_dir=state_dir,
            control_key=verify_key,
        )
        made = await control.accounts.bootstrap(email=email, org=org)
        joined = [await control.hosts.admit_first(request) for request in hosts]
    finally:
        await registry.aclose()
        db.close()
    return Bootstrapped(
        token=made.token,
        expires_at=made.expires_at,
        email=email,
        org=org,
        ca=str(control.authority.certificate_path),
        verify_key=verify_key,
        registry_bundle=str(control.registry_tokens.bundle),
        registry_service=SERVICE,
        registry_issuer=ISSUER,
        hosts=joined,
        bus_credentials=str(control.bus_accounts.credentials),
    )


def read_hosts(path: Path) -> list[JoinRequest]:
    """Raises InvalidRequest naming the file and what is wrong in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[JoinRequest])
    except OSError as error:
        raise InvalidRequest(f"cannot be read: {error.strerror}", field=str(path)) from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(str(error), field=str(path)) from error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pantala.server.bootstrap", description="Make the first admin.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of ServerSettings")
    parser.add_argument("--email", required=True)
    parser.add_argument("--org", required=True)
    parser.add_argument("--hosts", type=Path, help="JSON list of JoinRequest, each with its node id: the first hosts")
    chosen = parser.parse_args(arguments)
    configure(level="warning", program="bootstrap")
    try:
        settings = read_settings.read(chosen.settings)
        hosts = read_hosts(chosen.hosts) if chosen.hosts else []
        made = anyio.run(lambda: bootstrap(settings, email=chosen.email, org=chosen.org, hosts=hosts))
    except PantalaError as error:
        sys.stderr.write(f"pantala server bootstrap: {error.sentence()}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(made).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
