"""The cluster's own authority: it says which host is which, to other hosts only.

Another one than the edges' (`certificates.py`): laptops trust that one, and a host's certificate must not open a web
site nor the other way round. It may sign only under `node.pantala.internal`.
"""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from pantala.control.signing_authority import SigningAuthority
from pantala.errors import InvalidRequest
from pantala.kit.clock import Clock
from pantala.wire.hosts import NODE_DOMAIN

NODE_LIVES = timedelta(days=30)
CSR_BYTES_MAX = 16 * 1024


class ClusterAuthority:
    def __init__(self, folder: Path, clock: Clock) -> None:
        self._authority = SigningAuthority(folder, clock, name="Pantala cluster authority", domains=[NODE_DOMAIN])
        self.certificate_pem = self._authority.certificate_pem

    def sign(self, csr_pem: str, node: str, address: str) -> tuple[str, int]:
        """The node's certificate for the key of this request, and when it ends in Unix ms. Nothing but the key is
        taken from the request. It also names the address, by which the bus's servers find one another. Raises
        InvalidRequest."""
        return self._authority.sign(
            public_key_of(csr_pem),
            subject=node,
            names=[x509.DNSName(f"{node}.{NODE_DOMAIN}"), x509.IPAddress(ipaddress.ip_address(address))],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            lives=NODE_LIVES,
        )


def public_key_of(csr_pem: str) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    """The key that signed this request. Raises InvalidRequest for anything but P-256 or Ed25519, or a wrong
    signature (then nobody proved to have the key)."""
    if len(csr_pem) > CSR_BYTES_MAX:
        raise InvalidRequest(f"may have {CSR_BYTES_MAX} bytes", field="csr_pem")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        valid = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InvalidRequest(f"is not a certificate request in PEM: {error}", field="csr_pem") from error
    if not valid:
        raise InvalidRequest("is not signed by the key it is for", field="csr_pem")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise InvalidRequest("must be for an ECDSA P-256 or an Ed25519 key", field="csr_pem")
