"""What a user has to write into DNS for a name of an app, and which addresses lead to that app."""

from __future__ import annotations

from pantala.control.context import Context
from pantala.control.dns_lookup import ownership_name
from pantala.domain.hostnames import LENGTH_MAX, base
from pantala.planner.certificates import challenge_name
from pantala.store import addresses
from pantala.store.records import AppRecord
from pantala.wire.certificates import ChallengeName, DnsRequirements, Ownership


class NameRecords:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def requirements(self, app: AppRecord, hostname: str) -> DnsRequirements:
        public = await self._public(app)
        return DnsRequirements(
            a=sorted(ip for ip in public if ":" not in ip),
            aaaa=sorted(ip for ip in public if ":" in ip),
            cname=f"{app.name}.{self._context.settings.app_domain}",
            acme_challenge=ChallengeName(name=challenge_name(hostname), target=self.challenge_target(app.id, hostname)),
            ownership=Ownership(
                name=ownership_name(hostname),
                app_value=f"app-{self._digest(f'app {app.id}')}",
                org_value=f"org-{self._digest(f'org {app.org_id}')}",
            ),
        )

    async def ours(self, app: AppRecord) -> frozenset[str]:
        """Whatever leads to the app: its own addresses, and those at which edges find it by name."""
        settings = self._context.settings
        return await self._public(app) | {*settings.edge_addresses, *settings.pools.shared_v4}

    async def _public(self, app: AppRecord) -> frozenset[str]:
        """The app's addresses; the edges' where it has no IPv4."""
        given = await self._context.db.read(lambda c: addresses.list_addresses(c, app_id=app.id))
        public = {record.address for record in given if record.kind != "private_v6"}
        if any(":" not in ip for ip in public):
            return frozenset(public)
        return frozenset(public | {ip for ip in self._context.settings.edge_addresses if ":" not in ip})

    def challenge_target(self, app_id: int, hostname: str) -> str:
        """A name of ours, where edges answer the TXT records of DNS-01."""
        zone = f"{self._digest(f'app {app_id}')}.acme.{self._context.settings.platform_domain}"
        target = f"{base(hostname)}.{zone}"
        return target if len(target) <= LENGTH_MAX else f"{self._digest(base(hostname))}.{zone}"

    def _digest(self, text: str) -> str:
        return self._context.key.digest(text.encode(), purpose="hostname")
