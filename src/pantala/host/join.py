"""The side of joining that runs on the new host: token, proof of who answers, request, answer.

A token says where the API is and which authority its certificate must come from, so nothing has to be trusted or
resolved beforehand: the chain that the API shows is read first without belief, the authority in it is compared with
the token's fingerprint, and only then is a connection made whose certificate must verify against that authority alone.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import socket
import ssl
from urllib.parse import urlsplit

import msgspec

from pantala.client.api import error_of
from pantala.errors import Forbidden, InternalError, InvalidRequest, NodeUnreachable, PantalaError
from pantala.wire.hosts import Joined, JoinRequest, TokenText

PREFIX = "pjt_"
WITHIN_S = 20.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
OTHERS_ANSWER = "this is not the platform that made the token, or somebody is in between"


def decode_token(token: str) -> TokenText:
    """Raises InvalidRequest for what is no join token."""
    body = token.strip().removeprefix(PREFIX)
    try:
        text = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=TokenText)
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidRequest(
            "is not a join token", field="TOKEN", hint="`pantala host token` on the platform's side prints one"
        ) from error
    url = urlsplit(text.api)
    if url.scheme not in ("http", "https") or not url.hostname or not text.address.rpartition(":")[2].isdigit():
        raise InvalidRequest("names no API", field="TOKEN")
    if url.scheme == "https" and not text.authority:
        raise InvalidRequest("names no authority for an API over TLS", field="TOKEN")
    return text


def ask(text: TokenText, request: JoinRequest) -> Joined:
    """Redeem the token. Raises NodeUnreachable, Forbidden (another authority, a used or expired token) or what the
    platform refuses the host for."""
    url = urlsplit(text.api)
    context = trust(text) if url.scheme == "https" else None
    connection = _Connection(text.address, server_name=url.hostname or "", context=context)
    try:
        headers = {"content-type": "application/json", "host": url.netloc}
        connection.request("POST", "/v1/hosts/join", body=msgspec.json.encode(request), headers=headers)
        answer = connection.getresponse()
        body = answer.read(ANSWER_BYTES_MAX)
    except ssl.SSLError as error:
        raise Forbidden(f"the certificate of {text.api} does not verify: {error.reason}", hint=OTHERS_ANSWER) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(text, error) from error
    finally:
        connection.close()
    if answer.status not in (200, 201):
        raise error_of(answer.status, body, answer.headers.get("x-request-id", ""))
    try:
        return msgspec.json.decode(body, type=Joined)
    except msgspec.DecodeError as error:
        raise InternalError(f"the platform's answer cannot be read: {error}") from error


def trust(text: TokenText) -> ssl.SSLContext:
    """Verifies against the token's authority and nothing else; that is in the chain which the API shows."""
    server_name = urlsplit(text.api).hostname or ""
    for der in _shown_chain(text, server_name):
        if hashlib.sha256(der).hexdigest() == text.authority.lower():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=der)
            return context
    raise Forbidden(
        f"the API at {text.address} shows a certificate of another authority than the token's", hint=OTHERS_ANSWER
    )


def _shown_chain(text: TokenText, server_name: str) -> list[bytes]:
    """What the server sends, unverified: nothing is sent to it but the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            _connect(text.address) as plain,
            context.wrap_socket(plain, server_hostname=server_name) as wrapped,
        ):
            return unverified_chain(wrapped)
    except OSError as error:
        raise _unreachable(text, error) from error


def unverified_chain(wrapped: ssl.SSLSocket) -> list[bytes]:
    """DER of each certificate. Public since Python 3.13; before that the same is one attribute further down."""
    public = getattr(wrapped, "get_unverified_chain", None)
    if public is not None:
        return list(public())
    inner = getattr(wrapped, "_sslobj", None)
    return [ssl.PEM_cert_to_DER_cert(shown.public_bytes()) for shown in inner.get_unverified_chain()] if inner else []


class _Connection(http.client.HTTPConnection):
    """To an address, whatever the URL's host resolves to here."""

    def __init__(self, address: str, *, server_name: str, context: ssl.SSLContext | None) -> None:
        super().__init__(server_name, timeout=WITHIN_S)
        self._address, self._server_name, self._tls = address, server_name, context

    def connect(self) -> None:
        plain = _connect(self._address)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self._server_name) if self._tls else plain


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=WITHIN_S)


def _unreachable(text: TokenText, error: Exception) -> PantalaError:
    return NodeUnreachable(
        f"the API does not answer at {text.address}: {error or type(error).__name__}",
        hint="this host must reach that address; the token is still good",
    )


def own_address(towards: str) -> str:
    """The address of this machine on the way to `host:port`; nothing is sent."""
    host, _, port = towards.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host.strip("[]"), int(port)))
        except OSError as error:
            raise NodeUnreachable(
                f"there is no way to {host}: {error}", hint="--address says which one to use"
            ) from error
        return str(probe.getsockname()[0])
