"""Who may say what on the bus: NATS decentralised JWTs (an operator, a system account, one account, a user per node).

Hubs check users by the operator's and the accounts' JWTs alone, so control need not run for a host to connect. The
seeds are kept in `folder`, mode 0600; the server's own user is the credentials file `folder/control.creds`.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from pantala.kit.clock import Clock
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey, credentials_text
from pantala.wire.hosts import CONTROL_CALL

NAME = "pantala"
UNLIMITED = -1
INBOX = "_INBOX"


def node_permissions(node: str, region: str) -> dict[str, Any]:
    """A node speaks as itself only. It may ask any holder for rows (they are signed) and answer whoever asked it:
    inboxes are random, and each node may listen on its own alone."""
    return {
        "pub": {
            "allow": [
                f"pantala.cat.{node}.>",
                "pantala.cat.*.fetch",
                "pantala.cat.*.outrun",
                "pantala.cat.hold.*.rows",
                "pantala.cat.hold.*.have",
                CONTROL_CALL,
                f"logs.*.{region}.*",
                f"{INBOX}.>",
            ]
        },
        "sub": {"allow": ["pantala.cat.>", f"pantala.node.{node}.>", f"{INBOX}.{node}.>"]},
    }


class BusAccounts:
    def __init__(self, folder: Path, clock: Clock) -> None:
        self._clock = clock
        self._operator = NKey.ensure("operator", folder / "operator.seed")
        self._system = NKey.ensure("account", folder / "system.seed")
        self._account = NKey.ensure("account", folder / "account.seed")
        self._control = NKey.ensure("user", folder / "control.seed")
        self.credentials = folder / "control.creds"
        self.system_account = self._system.public
        if not self.credentials.exists():
            user_jwt = self._user_jwt(self._control.public, "control", permissions={}, expires_at_s=0)
            write_private(self.credentials, credentials_text(user_jwt, self._control).encode())

    def operator_jwt(self) -> str:
        return self._operator.jwt(
            subject=self._operator.public,
            name=NAME,
            issued_at_s=self._now_s(),
            nats={"type": "operator", "version": 2, "system_account": self._system.public},
        )

    def accounts(self, revoked: list[str]) -> dict[str, str]:
        """Public key to JWT. `revoked`: users that no hub may let in any more."""
        return {
            self._system.public: self._account_jwt(self._system.public, "SYS", []),
            self._account.public: self._account_jwt(self._account.public, NAME, revoked),
        }

    def node_jwt(self, *, bus_key: str, node: str, region: str, lives: timedelta) -> str:
        expires_at_s = self._now_s() + int(lives.total_seconds())
        return self._user_jwt(bus_key, node, permissions=node_permissions(node, region), expires_at_s=expires_at_s)

    def _user_jwt(self, public: str, name: str, *, permissions: dict[str, Any], expires_at_s: int) -> str:
        nats: dict[str, Any] = {"pub": {}, "sub": {}, "subs": UNLIMITED, "data": UNLIMITED, "payload": UNLIMITED}
        nats |= permissions | {"type": "user", "version": 2}
        return self._account.jwt(
            subject=public, name=name, issued_at_s=self._now_s(), expires_at_s=expires_at_s, nats=nats
        )

    def _account_jwt(self, public: str, name: str, revoked: list[str]) -> str:
        limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), UNLIMITED)
        nats: dict[str, Any] = {
            "limits": limits | {"wildcards": True},
            "default_permissions": {"pub": {}, "sub": {}},
            "type": "account",
            "version": 2,
        }
        if revoked:
            nats["revocations"] = dict.fromkeys(revoked, self._now_s())
        return self._operator.jwt(subject=public, name=name, issued_at_s=self._now_s(), nats=nats)

    def _now_s(self) -> int:
        return int(self._clock.now().timestamp())
