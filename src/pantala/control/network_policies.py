"""Network policies of apps: what their machines may exchange directly. Owns the table network_policies; the hosts learn
them from the rows `policy/<app>/<id>/<part>`, and apply them at once.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.policy_rows import PolicyDocument, policy_rows, read
from pantala.control.publication import Publication
from pantala.domain import policies
from pantala.errors import InvalidRequest, NameTaken, NotFound
from pantala.kit import ids
from pantala.kit.clock import rfc3339_ms
from pantala.store import network_policies
from pantala.store.records import AppRecord, NetworkPolicyRecord
from pantala.wire.network_policies import NetworkPolicy, PutNetworkPolicy

OF_AN_APP_MAX = 64
RULES_MAX, PORTS_MAX, MACHINES_MAX, ROWS_MAX = 64, 256, 128, 64
METADATA_BYTES_MAX = 128


class NetworkPolicies:
    def __init__(self, context: Context, access: Access, publication: Publication) -> None:
        self._context = context
        self._access = access
        self._publication = publication

    async def list_policies(self, principal: Principal, app_name: str) -> list[NetworkPolicy]:
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self._context.db.read(lambda c: network_policies.list_policies(c, app_id=app.id))
        return [_answer(record) for record in found]

    async def get(self, principal: Principal, app_name: str, policy_id: str) -> NetworkPolicy:
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self._context.db.read(lambda c: network_policies.find_policy(c, app.id, policy_id))
        if found is None:
            raise _not_found(app, policy_id)
        return _answer(found)

    async def put(self, principal: Principal, app_name: str, request: PutNetworkPolicy) -> NetworkPolicy:
        """Repeating it changes nothing. Raises NameTaken when another policy of the app has the name."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        _check(request)
        document = msgspec.json.encode(PolicyDocument(selector=request.selector, rules=request.rules)).decode()
        now_ms = self._context.now_ms()

        def write(connection: Connection) -> tuple[NetworkPolicyRecord | None, NetworkPolicyRecord]:
            known = network_policies.list_policies(connection, app_id=app.id)
            named = next((record for record in known if record.name == request.name), None)
            before = next((record for record in known if record.id == request.id), None) if request.id else named
            if request.id and before is None:
                raise _not_found(app, request.id)
            if named is not None and named is not before:
                raise NameTaken(f"the policy {named.id} of {app.name} has the name {request.name}", hint="send its id")
            if before is None and len(known) >= OF_AN_APP_MAX:
                raise InvalidRequest(f"an app may have {OF_AN_APP_MAX} network policies", field="name")
            if before is not None and (before.name, before.document) == (request.name, document):
                return before, before
            made = network_policies.put_policy(
                connection,
                before.id if before is not None else ids.ulid(now_ms),
                app_id=app.id,
                name=request.name,
                document=document,
                now_ms=now_ms,
            )
            self._context.audit_app(connection, principal, app, "network_policy.put", made.id)
            return before, made

        before, made = await self._context.db.write(write)
        await self._publication.publish_policy(made, before=policy_rows([before] if before is not None else []))
        return _answer(made)

    async def delete(self, principal: Principal, app_name: str, policy_id: str) -> None:
        app = await self._access.app(principal, app_name, Action.DEPLOY)

        def remove(connection: Connection) -> NetworkPolicyRecord:
            found = network_policies.find_policy(connection, app.id, policy_id)
            if found is None or not network_policies.delete_policy(connection, app.id, policy_id):
                raise _not_found(app, policy_id)
            self._context.audit_app(connection, principal, app, "network_policy.delete", policy_id)
            return found

        removed = await self._context.db.write(remove)
        await self._publication.publish_policy(removed, before=policy_rows([removed]))


def _check(request: PutNetworkPolicy) -> None:
    selector, rules = request.selector, request.rules
    if not (selector.all or selector.machines or selector.metadata):
        raise InvalidRequest('name the machines: {"all": true}, machines by id, or metadata', field="selector")
    if not rules:
        raise InvalidRequest("is empty; a policy without a rule allows and closes nothing", field="rules")
    if len(rules) > RULES_MAX:
        raise InvalidRequest(f"at most {RULES_MAX}", field="rules")
    if len(selector.machines) > MACHINES_MAX:
        raise InvalidRequest(f"at most {MACHINES_MAX}; select by metadata instead", field="selector.machines")
    if len(msgspec.json.encode(selector.metadata)) > METADATA_BYTES_MAX:
        raise InvalidRequest(f"at most {METADATA_BYTES_MAX} bytes as JSON", field="selector.metadata")
    if len({(rule.direction, port) for rule in rules for port in rule.ports}) > PORTS_MAX:
        raise InvalidRequest(f"at most {PORTS_MAX} ports in a policy; several policies add up", field="rules")
    if len(policies.rows("", selector, rules)) > ROWS_MAX:
        raise InvalidRequest(
            "so many machines with so many ports are too much for one policy; several policies add up", field="rules"
        )


def _not_found(app: AppRecord, policy_id: str) -> NotFound:
    return NotFound(f"{app.name} has no network policy {policy_id}")


def _answer(record: NetworkPolicyRecord) -> NetworkPolicy:
    document = read(record)
    return NetworkPolicy(
        id=record.id,
        name=record.name,
        selector=document.selector,
        rules=document.rules,
        created_at=rfc3339_ms(record.created_at_ms),
        updated_at=rfc3339_ms(record.updated_at_ms),
    )
