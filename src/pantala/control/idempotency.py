"""Answers kept by `Idempotency-Key`: the same key and body get the same answer, for 24 hours.

Keys belong to who sent them. An answer is sealed before it is stored (it may hold a token), a body leaves only a keyed
digest. 5xx answers are not kept: trying again is what the caller should do.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.errors import Conflict, InvalidRequest
from pantala.store import ledger

KEY_LENGTH_MAX = 255


class KeyReused(Conflict):
    """The same key with another body."""

    http_code = 422
    status = "idempotency_key_reused"


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    code: int
    content_type: str
    body: bytes


class Idempotency:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def begin(self, *, scope: str, key: str, request: bytes) -> KeptAnswer | None:
        """The answer of an earlier request, or None: this one is to be carried out, then `finish`ed or `forget`ten."""
        if len(key) > KEY_LENGTH_MAX:
            raise InvalidRequest(f"may have {KEY_LENGTH_MAX} characters", field="Idempotency-Key")
        digest = self._context.key.digest(request, purpose="request")
        boot, now_ms = self._context.boot, self._context.now_ms()

        def claim(connection: Connection) -> str | None:
            known = ledger.find_answer(connection, scope=scope, key=key)
            if known is not None and known.digest != digest:
                raise KeyReused("Idempotency-Key: was used for another request", hint="make a new key")
            if known is not None and known.sealed_answer is not None:
                return known.sealed_answer
            if known is not None and known.boot == boot:
                raise Conflict("the first request with this Idempotency-Key is still being carried out")
            ledger.claim_key(connection, scope=scope, key=key, digest=digest, boot=boot, now_ms=now_ms)
            return None

        sealed = await self._context.db.write(claim)
        return None if sealed is None else msgspec.msgpack.decode(self._context.key.open(sealed), type=KeptAnswer)

    async def finish(self, *, scope: str, key: str, answer: KeptAnswer) -> None:
        if answer.code >= 500:
            await self.forget(scope=scope, key=key)
            return
        sealed = self._context.key.seal(msgspec.msgpack.encode(answer))
        await self._context.db.write(
            lambda c: ledger.keep_key(c, scope=scope, key=key, code=answer.code, sealed_answer=sealed)
        )

    async def forget(self, *, scope: str, key: str) -> None:
        await self._context.db.write(lambda c: ledger.forget_key(c, scope=scope, key=key))
