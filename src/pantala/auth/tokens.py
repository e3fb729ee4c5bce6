"""Opaque bearer tokens: how they are made, kept and read from a request.

A token is 256 random bits behind the prefix `pantala_`, so a plain SHA-256 is enough to keep it: there is nothing to
guess. (Clients drop opaque tokens that begin with `fm1r_`, `fm1a_` or `fm2_`: `tokens/tokens.go` of superfly/fly-go.)
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from pantala.errors import Unauthenticated
from pantala.kit import ids

PREFIX = "pantala"
TOKENS_MAX = 32
TOKEN_LENGTH_MAX = 4096


def mint() -> str:
    return ids.token(PREFIX)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def from_header(header: str | None) -> list[str]:
    """The tokens of an `Authorization` header: `Bearer`, `FlyV1` or Basic (whose password holds them)."""
    if not header:
        raise Unauthenticated("no token was sent", hint="send `Authorization: Bearer <token>`")
    scheme, _, rest = header.strip().partition(" ")
    match scheme.lower():
        case "bearer" | "flyv1":
            return split(rest)
        case "basic":
            return split(_password(rest))
        case _:
            raise Unauthenticated("the Authorization header must begin with Bearer, FlyV1 or Basic")


def split(text: str) -> list[str]:
    """A token string may hold several, separated by commas, and a scheme that was left on."""
    stripped = text.strip()
    for scheme in ("FlyV1 ", "Bearer "):
        stripped = stripped.removeprefix(scheme)
    found = [piece.strip() for piece in stripped.split(",") if piece.strip()]
    if not found:
        raise Unauthenticated("the token is empty")
    if len(found) > TOKENS_MAX or any(len(piece) > TOKEN_LENGTH_MAX for piece in found):
        raise Unauthenticated(f"at most {TOKENS_MAX} tokens of {TOKEN_LENGTH_MAX} characters each are read")
    return found


def _password(encoded: str) -> str:
    try:
        user_and_password = base64.b64decode(encoded.strip(), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise Unauthenticated("the Basic credentials are not base64 text") from error
    return user_and_password.partition(":")[2]
