"""The first admin, their org and a token: `python -m pantala.server.bootstrap --settings FILE --email … --org …`.

Also makes the keys and certificates that other programs need before the server runs. Prints one JSON document; safe to
repeat (each time with a new token), also while the server runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import anyio
import msgspec

from pantala.client.node import NodeClient
from pantala.control.access import Access
from pantala.control.accounts import Accounts
from pantala.control.certificates import Authority
from pantala.control.context import Context
from pantala.control.keys import ClusterKey
from pantala.control.registry_tokens import ISSUER, SERVICE, RegistryTokens
from pantala.errors import NodeUnreachable, PantalaError
from pantala.kit import ids
from pantala.kit.bus import Handler
from pantala.kit.clock import SystemClock
from pantala.kit.sealing import Signer, ensure_key
from pantala.server import settings as read_settings
from pantala.store.database import open_database
from pantala.wire.server import Bootstrapped, ServerSettings


class _NoBus:
    """Bootstrapping asks no node."""

    async def publish(self, subject: str, payload: bytes) -> None:
        raise NodeUnreachable("there is no bus yet")

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        raise NodeUnreachable("there is no bus yet")

    async def serve(self, subject: str, handler: Handler) -> None:
        raise NodeUnreachable("there is no bus yet")


async def bootstrap(settings: ServerSettings, *, email: str, org: str) -> Bootstrapped:
    clock, state_dir = SystemClock(), Path(settings.state_dir)
    key = ClusterKey.load(read_settings.cluster_key_path(settings))
    db = open_database(read_settings.database_path(settings))
    try:
        context = Context(
            db=db,
            nodes=NodeClient(_NoBus()),
            clock=clock,
            key=key,
            settings=read_settings.control_settings(settings),
            boot=ids.ulid(),
        )
        made = await Accounts(context, Access(context)).bootstrap(email=email, org=org)
    finally:
        db.close()
    authority = Authority(state_dir / "ca", clock, domains=(settings.app_domain, settings.platform_domain))
    tokens = RegistryTokens(state_dir / "registry", clock)
    return Bootstrapped(
        token=made.token,
        expires_at=made.expires_at,
        email=email,
        org=org,
        ca=str(authority.certificate_path),
        verify_key=Signer(ensure_key(read_settings.signing_key_path(settings))).verify_key,
        registry_bundle=str(tokens.bundle),
        registry_service=SERVICE,
        registry_issuer=ISSUER,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pantala.server.bootstrap", description="Make the first admin.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of ServerSettings")
    parser.add_argument("--email", required=True)
    parser.add_argument("--org", required=True)
    chosen = parser.parse_args(arguments)
    try:
        settings = read_settings.read(chosen.settings)
        made = anyio.run(lambda: bootstrap(settings, email=chosen.email, org=chosen.org))
    except PantalaError as error:
        sys.stderr.write(f"pantala server bootstrap: {error.sentence()}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(made).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
