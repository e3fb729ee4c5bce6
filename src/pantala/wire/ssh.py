"""Bodies of `/v1/apps/{app}/ssh_certificates`, and how `/v1/apps/{app}/machines/{machine}/ssh` ends.

The second is a WebSocket whose binary messages are the bytes of a connection to the machine's SSH port, in both
directions. It is closed with 1000 when the machine has ended the connection, with `CLOSE_ERROR` + HTTP code when it
was refused, or the right to it taken back; the reason is a sentence.
"""

from __future__ import annotations

import msgspec

HOURS_MAX = 24
LOGINS_MAX = 8
CLOSE_ERROR = 4000
CLOSE_REASON_BYTES_MAX = 120


class CertificateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`public_key` is an OpenSSH ed25519 key. `principals` are the users of the machines to log in as."""

    public_key: str
    principals: list[str] = msgspec.field(default_factory=lambda: ["root"])
    hours: int = 1


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """`certificate` is a line of a `-cert.pub` file; it opens the machines of this app only."""

    certificate: str
    key_id: str
    serial: str
    principals: list[str]
    valid_until: str
