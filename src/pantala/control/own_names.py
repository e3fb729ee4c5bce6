"""The authority for users' names where no other is set up and the operator has said `sign_names`: in a box, whose
names need not be in anybody's DNS. Called by `issuance.py`.

It may sign for every name, unlike the platform's own authority (`certificates.py`), which people trust on their
laptops; so it is another one, in `names-ca/ca.pem`, made when it is first needed.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pantala.control.signing_authority import SigningAuthority
from pantala.kit.clock import Clock

LEAF_LIVES = timedelta(days=90)
NAME = "Pantala box authority for names of users"


class OwnNames:
    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._authority: SigningAuthority | None = None

    def issue(self, hostname: str, key: ec.EllipticCurvePublicKey) -> str:
        """A chain in PEM, the certificate first. Blocks for a moment."""
        if self._authority is None:
            self._authority = SigningAuthority(self._folder, self._clock, name=NAME, domains=())
        leaf_pem, _ = self._authority.sign(
            key,
            subject=hostname[:64],  # no longer one fits
            names=[x509.DNSName(hostname)],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH],
            lives=LEAF_LIVES,
        )
        return leaf_pem + self._authority.certificate_pem
