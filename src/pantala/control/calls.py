"""Calls of nodes to control over the bus: a certificate renewed, a new epoch after a restored journal.

One subject, `pantala.control.call`; a body is a `SignedCall`, believed by the key that its node joined with, while that
node is a member. Answers are kept by `request_id`, so that a repeated or replayed call changes nothing.
"""

from __future__ import annotations

import msgspec
import structlog

from pantala.client.node import encode_error
from pantala.control.context import Context
from pantala.control.hosts import Hosts
from pantala.control.idempotency import Idempotency, KeptAnswer
from pantala.errors import Forbidden, InternalError, InvalidRequest, PantalaError
from pantala.kit.sealing import verify
from pantala.store.records import NodeRecord
from pantala.wire.hosts import CallBody, ControlRequest, Epoch, NewEpoch, RenewCertificate, Renewed, SignedCall
from pantala.wire.node import NodeReply

log = structlog.get_logger()

CLOCK_SKEW_MS_MAX = 5 * 60 * 1000
CALL_BYTES_MAX = 64 * 1024

_SIGNED = msgspec.json.Decoder(SignedCall)
_BODY = msgspec.json.Decoder(CallBody)


class Calls:
    def __init__(self, context: Context, hosts: Hosts, idempotency: Idempotency) -> None:
        self._context = context
        self._hosts = hosts
        self._idempotency = idempotency

    async def handle(self, subject: str, payload: bytes) -> bytes:
        """The bus's handler: one `NodeReply` whatever happens."""
        del subject
        try:
            node, body = await self._checked(payload)
            return await self._once(node, body)
        except PantalaError as error:
            if isinstance(error, InternalError):
                log.exception("call of a node failed", error=error.message)
            else:
                log.warning("call of a node refused", error=error.message)
            return msgspec.json.encode(NodeReply(error=encode_error(error)))

    async def _checked(self, payload: bytes) -> tuple[NodeRecord, CallBody]:
        if len(payload) > CALL_BYTES_MAX:
            raise InvalidRequest(f"may have {CALL_BYTES_MAX} bytes", field="call")
        try:
            signed = _SIGNED.decode(payload)
            body = _BODY.decode(signed.payload)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"cannot be read: {error}", field="call") from error
        node = await self._hosts.member(signed.node)
        if body.node != node.id or not verify(node.verify_key, signed.payload, signed.signature):
            raise Forbidden(f"the call is not signed by {node.id}")
        late_ms = self._context.now_ms() - body.at_ms
        if abs(late_ms) > CLOCK_SKEW_MS_MAX:
            raise Forbidden(
                f"at_ms: the call's time differs by {abs(late_ms) // 1000} s from control's, at most 300 are allowed",
                hint=f"is the clock of {node.id} right?",
            )
        return node, body

    async def _once(self, node: NodeRecord, body: CallBody) -> bytes:
        scope = f"node:{node.id}"
        # A repetition may be signed at another moment; what is asked must be the same.
        asked = msgspec.json.encode(body.request)
        kept = await self._idempotency.begin(scope=scope, key=body.request_id, request=asked)
        if kept is not None:
            return kept.body
        try:
            result = await self._carry_out(node, body.request)
        except BaseException:
            await self._idempotency.forget(scope=scope, key=body.request_id)
            raise
        answer = msgspec.json.encode(NodeReply(result=msgspec.to_builtins(result)))
        await self._idempotency.finish(
            scope=scope, key=body.request_id, answer=KeptAnswer(code=200, content_type="", body=answer)
        )
        return answer

    async def _carry_out(self, node: NodeRecord, request: ControlRequest) -> Renewed | Epoch:
        match request:
            case RenewCertificate():
                return await self._hosts.renew(node, request.csr_pem)
            case NewEpoch():
                return await self._hosts.new_epoch(node, request.above)
