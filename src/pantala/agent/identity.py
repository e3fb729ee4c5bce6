"""Who this host is to the others: its certificate, the authority's, its bus user; renewed by asking control.

The folder `identity` holds what control gave (`node.pem`, `authority.pem`, `bus.creds`), written when the host joined
and replaced here, each file whole or not at all: the proxy and the bus look again when a file changes. The private
halves (`node.key`, `bus.seed` in `keys`) stay as they are, so certificate and key always match.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from pantala.client.node import decode_error
from pantala.errors import InternalError, InvalidRequest, NodeUnreachable, PantalaError
from pantala.kit import ids
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock, rfc3339, unix_ms
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey, credentials_text
from pantala.kit.sealing import Signer
from pantala.wire.hosts import (
    CONTROL_CALL,
    CONTROL_RESULTS,
    CallBody,
    ControlRequest,
    Epoch,
    NewEpoch,
    RenewCertificate,
    Renewed,
    SignedCall,
)
from pantala.wire.node import NodeReply

log = structlog.get_logger()

CALL_TIMEOUT_S = 10.0
ATTEMPTS_MAX = 3
RETRY_FIRST_S = 1.0
RETRY_MOST_S = 300.0

_REPLY = msgspec.json.Decoder(NodeReply)


class ControlClient:
    """Asks control over the bus, in this node's name."""

    def __init__(self, bus: Bus, signer: Signer, clock: Clock, *, node: str) -> None:
        self._bus = bus
        self._signer = signer
        self._clock = clock
        self._node = node

    async def renew(self, csr_pem: str) -> Renewed:
        return await self._call(RenewCertificate(csr_pem=csr_pem))

    async def new_epoch(self, above: int) -> int:
        """For a node whose journal was restored: an epoch that nobody has heard of it."""
        answer: Epoch = await self._call(NewEpoch(above=above))
        return answer.epoch

    async def _call(self, request: ControlRequest) -> Any:
        """Raises what control raised, or NodeUnreachable. Sent again with the same id, so it is done once."""
        request_id = ids.ulid()
        for attempt in range(1, ATTEMPTS_MAX + 1):
            body = msgspec.json.encode(
                CallBody(node=self._node, at_ms=unix_ms(self._clock.now()), request_id=request_id, request=request)
            )
            call = SignedCall(node=self._node, payload=body, signature=self._signer.sign(body))
            try:
                answer = await self._bus.request(CONTROL_CALL, msgspec.json.encode(call), timeout_s=CALL_TIMEOUT_S)
                break
            except NodeUnreachable as error:
                if attempt == ATTEMPTS_MAX:
                    raise NodeUnreachable("control does not answer") from error
        else:
            raise AssertionError("the loop above breaks or raises")
        try:
            reply = _REPLY.decode(answer)
            if reply.error is None:
                return msgspec.convert(reply.result, type=CONTROL_RESULTS[type(request)])
        except msgspec.MsgspecError as error:
            raise InternalError(f"the answer of control cannot be read: {error}") from error
        raise decode_error(reply.error)


class Identity:
    def __init__(self, folder: Path, keys: Path) -> None:
        self.certificate = folder / "node.pem"
        self.authority = folder / "authority.pem"
        self.credentials = folder / "bus.creds"
        self._key_path = keys / "node.key"
        self._seed_path = keys / "bus.seed"

    @property
    def exists(self) -> bool:
        """Whether this host has joined; tests and hosts of before have no certificate."""
        return self.certificate.exists() and self._key_path.exists()

    def ends_at(self) -> datetime:
        """Raises InvalidRequest when the certificate cannot be read."""
        try:
            return x509.load_pem_x509_certificate(self.certificate.read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"cannot be read: {error}", field=str(self.certificate)) from error

    def request(self) -> str:
        """What control signs: a request for the key that the host has."""
        loaded = self._key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pantala host")])
        builder = x509.CertificateSigningRequestBuilder().subject_name(name)
        if isinstance(loaded, ed25519.Ed25519PrivateKey):
            made = builder.sign(loaded, None)
        else:
            made = builder.sign(loaded, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()

    def _key(self) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
        """Made on first use."""
        if not self._key_path.exists():
            self._key_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            made = ec.generate_private_key(ec.SECP256R1())
            pem = made.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_private(self._key_path, pem)
        loaded = serialization.load_pem_private_key(self._key_path.read_bytes(), password=None)
        if isinstance(loaded, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
            return loaded
        raise InvalidRequest("holds neither an ECDSA nor an Ed25519 key", field=str(self._key_path))

    def keep(self, renewed: Renewed) -> None:
        """The authority first: whoever sees the new certificate can check it."""
        self.certificate.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self.authority, renewed.authority_pem.encode())
        if self._seed_path.exists():
            user = NKey.ensure("user", self._seed_path)
            write_private(self.credentials, credentials_text(renewed.user_jwt, user).encode())
        write_private(self.certificate, renewed.certificate_pem.encode())


class Renewal:
    """Keeps the identity fresh for ever: renews when less than `before_s` remains, looks every `every_s`."""

    def __init__(
        self, identity: Identity, control: ControlClient, clock: Clock, *, before_s: float, every_s: float
    ) -> None:
        self._identity = identity
        self._control = control
        self._clock = clock
        self._before_s = before_s
        self._every_s = every_s

    async def run(self) -> None:
        """A failure is tried again after a second, then two, four …, at most five minutes (or `every_s`) apart."""
        most_s = min(RETRY_MOST_S, self._every_s)
        wait_s = pause_s = min(RETRY_FIRST_S, most_s)
        while True:
            try:
                await self.once()
                wait_s, pause_s = self._every_s, min(RETRY_FIRST_S, most_s)
            except (PantalaError, OSError, ValueError) as error:
                log.warning("certificate not renewed; tried again", error=str(error), again_in_s=pause_s)
                wait_s, pause_s = pause_s, min(pause_s * 2, most_s)
            await self._clock.sleep(wait_s)

    async def once(self) -> bool:
        """Whether it was renewed."""
        ends_at = self._identity.ends_at()
        if (ends_at - self._clock.now()).total_seconds() > self._before_s:
            return False
        self._identity.keep(await self._control.renew(self._identity.request()))
        log.info("certificate renewed", ended_at=rfc3339(ends_at), ends_at=rfc3339(self._identity.ends_at()))
        return True
