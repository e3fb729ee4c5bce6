"""A certificate authority spoken to by ACME (RFC 8555): the package's calls, each in a thread, errors translated here.

Orders are resumed by their URL, so every call reads the order's present state from the authority first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import acme.client
import acme.messages
import anyio
import anyio.to_thread
import msgspec
import requests
from acme import challenges as acme_challenges
from acme import errors as acme_errors
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.b64 import b64encode
from josepy.errors import Error as JoseError
from josepy.jwa import ES256
from josepy.jwk import JWKEC

from pantala.errors import InternalError, PantalaError, TransientError

T = TypeVar("T")

TIMEOUT_S = 30
USER_AGENT = "pantala"
RATE_LIMIT_PAUSE = timedelta(hours=1)
"""How long we wait when the authority does not say."""
TEXT_MAX = 500


class Refused(PantalaError):
    """The authority said no. `code` is its own word (`unauthorized`, `dns`, `connection`, `rateLimited` …)."""

    def __init__(self, message: str, *, code: str, again_at: datetime | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.again_at = again_at


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One challenge of one authorization. `authorization`: the key authorisation, which HTTP-01 answers."""

    url: str
    status: str
    token: str
    authorization: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.authorization.encode()).digest()

    @property
    def txt(self) -> str:
        """What the TXT record of DNS-01 says."""
        return b64encode(self.digest).decode("ascii")


class Binding(NamedTuple):
    """External account binding (RFC 8555, 7.3.4). `hmac_key`: base64url, as authorities hand it out."""

    kid: str
    hmac_key: str

    def __repr__(self) -> str:
        return f"Binding({self.kid})"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: pending, ready, processing, valid, invalid. `tasks`: by kind of challenge, of the one name."""

    url: str
    status: str
    finalize: str
    certificate: str
    tasks: dict[str, Task]
    refusal: Refused | None = None


class Acme:
    """`ca_file`: PEM of authorities that sign the directory's own certificate, beside none else; empty: the usual ones.
    `url`: of the account, empty until `register`."""

    def __init__(self, directory: str, key: ec.EllipticCurvePrivateKey, *, ca_file: str = "", url: str = "") -> None:
        self._directory = directory
        self._key = JWKEC(key=key)
        self._net = _Network(key=self._key, alg=ES256, user_agent=USER_AGENT, timeout=TIMEOUT_S)
        self._net.trusted = ca_file
        self._client: acme.client.ClientV2 | None = None
        self._one_at_a_time = anyio.Lock()
        if url:
            self._net.account = _account(url)

    async def register(self, email: str, *, bound_to: Binding | None = None) -> str:
        """The URL of the account, new or known. `bound_to`: an account of another kind that the operator has there."""

        def call(client: acme.client.ClientV2) -> str:
            binding = None
            if bound_to is not None:
                binding = acme.messages.ExternalAccountBinding.from_data(
                    self._key.public_key(), bound_to.kid, bound_to.hmac_key, client.directory
                )
            new = acme.messages.NewRegistration.from_data(
                email=email or None, terms_of_service_agreed=True, external_account_binding=binding
            )
            try:
                made = client.new_account(new)
                return str(made.uri)
            except acme_errors.ConflictError as error:
                self._net.account = _account(error.location)
                return str(error.location)

        return await self._run(call)

    async def begin(self, csr_pem: bytes) -> str:
        """The URL of an order for the names in the request. An authority may answer with one that is pending still."""
        return await self._run(lambda client: str(client.new_order(csr_pem).uri))

    async def order(self, url: str) -> Order:
        return await self._run(lambda client: self._read(client, url))

    async def answer(self, task: Task) -> None:
        """Tell the authority to look now."""

        def call(client: acme.client.ClientV2) -> None:
            _post(client, task.url, acme_challenges.HTTP01Response(key_authorization=task.authorization))  # sent as {}

        await self._run(call)

    async def finalize(self, order: Order, csr_pem: bytes) -> None:
        request = acme.messages.CertificateRequest(csr=x509.load_pem_x509_csr(csr_pem))
        await self._run(lambda client: _post(client, order.finalize, request))

    async def download(self, order: Order) -> str:
        """The chain in PEM, the certificate first."""
        return await self._run(lambda client: str(_post(client, order.certificate, None).text))

    def _read(self, client: acme.client.ClientV2, url: str) -> Order:
        body = _post(client, url, None).json()
        tasks: dict[str, Task] = {}
        refusal = _problem(body.get("error"))
        for authorization in body.get("authorizations", ())[:1]:
            for found in _post(client, authorization, None).json().get("challenges", ()):
                refusal = refusal or _problem(found.get("error"))
                token = str(found.get("token", ""))
                tasks[str(found.get("type"))] = Task(
                    url=str(found.get("url")),
                    status=str(found.get("status")),
                    token=token,
                    authorization=f"{token}.{self._thumbprint()}",
                )
        return Order(
            url=url,
            status=str(body.get("status")),
            finalize=str(body.get("finalize")),
            certificate=str(body.get("certificate", "")),
            tasks=tasks,
            refusal=refusal,
        )

    def _thumbprint(self) -> str:
        return b64encode(self._key.public_key().thumbprint(hash_function=hashes.SHA256)).decode("ascii")

    async def _run(self, call: Callable[[acme.client.ClientV2], T]) -> T:
        """One call at a time: the client keeps nonces and a connection. Raises Refused or TransientError."""
        async with self._one_at_a_time:
            return await anyio.to_thread.run_sync(partial(self._blocking, call), abandon_on_cancel=True)

    def _blocking(self, call: Callable[[acme.client.ClientV2], T]) -> T:
        try:
            if self._client is None:
                directory = acme.client.ClientV2.get_directory(self._directory, self._net)
                self._client = acme.client.ClientV2(directory, self._net)
            return call(self._client)
        except acme.messages.Error as error:
            raise _refused(str(error.typ), str(error.detail or error.description or error.typ)) from error
        except requests.RequestException as error:
            raise TransientError(f"{self._directory} does not answer: {_short(error)}") from error
        except (acme_errors.Error, JoseError, ValueError, KeyError) as error:
            raise TransientError(f"{self._directory} answered oddly: {_short(error)}") from error


class _Network(acme.client.ClientNetwork):
    """Trusts the operator's authorities where some are named."""

    trusted: str = ""

    def _send_request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:
        self.verify_ssl = self.trusted or True  # pyright: ignore[reportAttributeAccessIssue] - requests takes a file too
        return super()._send_request(method, url, *args, **kwargs)


def _post(client: acme.client.ClientV2, url: str, body: Any) -> requests.Response:
    """POST, or with None POST-as-GET."""
    return client.net.post(url, body, new_nonce_url=client.directory["newNonce"])


def _account(url: str) -> acme.messages.RegistrationResource:
    return acme.messages.RegistrationResource(body=acme.messages.Registration(), uri=url)


def _problem(document: Any) -> Refused | None:
    if not isinstance(document, dict):
        return None
    return _refused(str(document.get("type", "")), str(document.get("detail", "the authority gave no reason")))


def _refused(kind: str, detail: str) -> Refused:
    code = kind.rpartition(":")[2] or "unknown"
    again_at = _again_at(detail) if code == "rateLimited" else None
    return Refused(detail[:TEXT_MAX], code=code, again_at=again_at)


def _again_at(detail: str) -> datetime:
    """Authorities write it into the sentence: `retry after 2026-01-02 03:04:05 UTC`, or with a T and a Z."""
    found = re.search(r"retry after (\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)", detail)
    if found is None:
        return datetime.now(UTC) + RATE_LIMIT_PAUSE
    return datetime.fromisoformat(f"{found[1]}T{found[2]}+00:00")


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:TEXT_MAX]


# -- what is signed --------------------------------------------------------------------------------------------------


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InternalError("a kept key is not an elliptic curve's")
    return key


def signing_request(key: ec.EllipticCurvePrivateKey, hostname: str) -> bytes:
    names = x509.SubjectAlternativeName([x509.DNSName(hostname)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def challenge_certificate(
    key: ec.EllipticCurvePrivateKey, hostname: str, digest: bytes, *, now: datetime, lives: timedelta
) -> str:
    """TLS-ALPN-01 (RFC 8737): self-signed, with the digest of the key authorisation in a critical extension."""
    name = x509.Name([])
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"), b"\x04\x20" + digest)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + lives)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(hostname)]), critical=True)
        .add_extension(extension, critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
