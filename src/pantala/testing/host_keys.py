"""The keys of a host that joins, as a real one makes them, in memory."""

from __future__ import annotations

import os

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pantala.kit.nkeys import NKey
from pantala.kit.sealing import Opener, Signer
from pantala.wire.hosts import JoinRequest


def csr_of(key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pantala host")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


class HostKeys:
    def __init__(self, *, sealing: Opener | None = None) -> None:
        self.sealing = sealing or Opener(os.urandom(32))
        self.signer = Signer(os.urandom(32))
        self.bus = NKey("user", os.urandom(32))
        self.tls = ec.generate_private_key(ec.SECP256R1())

    def request(
        self, *, region: str = "iad", address: str = "10.0.0.9", token: str = "", node: str = "", zone: str = ""
    ) -> JoinRequest:
        return JoinRequest(
            token=token,
            node=node,
            region=region,
            zone=zone,
            address=address,
            verify_key=self.signer.verify_key,
            sealing_key=self.sealing.public_key,
            csr_pem=csr_of(self.tls),
            bus_key=self.bus.public,
        )
