"""The platform's account at a certificate authority: its key is made once, sealed to the cluster key and registered."""

from __future__ import annotations

import base64
from pathlib import Path

import anyio
from cryptography.hazmat.primitives.asymmetric import ec

from pantala.control.acme import Acme, Binding, Refused, load_key
from pantala.control.context import Context
from pantala.control.registry_tokens import private_pem
from pantala.store import certificates
from pantala.store.records import AcmeAccountRecord


class AcmeAccount:
    """Owns the table acme_accounts."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._clients: dict[str, Acme] = {}
        self._one_at_a_time = anyio.Lock()

    async def client(self, directory: str) -> Acme:
        """Registered. Killed before the URL was kept, the next life registers the same key again and is told the same
        account."""
        async with self._one_at_a_time:
            if directory not in self._clients:
                self._clients[directory] = await self._open(directory)
            return self._clients[directory]

    async def _open(self, directory: str) -> Acme:
        fresh = AcmeAccountRecord(
            directory=directory,
            url="",
            kept_key=self._context.key.seal(private_pem(ec.generate_private_key(ec.SECP256R1()))),
            created_at_ms=self._context.now_ms(),
        )
        record = await self._context.db.write(lambda c: certificates.ensure_account(c, fresh))
        key = load_key(self._context.key.open(record.kept_key))
        client = Acme(directory, key, ca_file=self._context.settings.acme_ca_file, url=record.url)
        if not record.url:
            url = await client.register(self._context.settings.acme_email, bound_to=self._binding())
            await self._context.db.write(lambda c: certificates.set_account_url(c, directory, url))
        return client

    def _binding(self) -> Binding | None:
        settings = self._context.settings
        if not settings.acme_eab_kid:
            return None
        path = Path(settings.acme_eab_key_file)
        try:
            key = path.read_text("ascii").strip().rstrip("=")
            base64.b64decode(key + "=" * (-len(key) % 4), altchars=b"-_", validate=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not base64url"
            raise Refused(f"the server's acme_eab_key_file {path} cannot be read: {reason}", code="binding") from error
        return Binding(settings.acme_eab_kid, key)
