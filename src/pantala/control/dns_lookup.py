"""What public DNS says about a host name, asked from the operator's resolvers (`resolvers` of the server's settings;
those of this machine when none are named). Nothing is cached: who checks has just changed something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import anyio
import dns.asyncresolver
import dns.exception
import dns.inet
import dns.nameserver
import dns.resolver

from pantala.domain.hostnames import base
from pantala.errors import InvalidRequest, TransientError
from pantala.planner.certificates import challenge_name
from pantala.wire.certificates import DnsRecords

TIMEOUT_S = 3.0
PORT = 53


class Lookup(Protocol):
    async def records(self, hostname: str) -> DnsRecords:
        """Raises TransientError when no resolver answers."""
        ...


def ownership_name(hostname: str) -> str:
    return f"_fly-ownership.{base(hostname)}"


class DnsLookup:
    """`resolvers`: `address` or `address:port`."""

    def __init__(self, resolvers: Sequence[str]) -> None:
        self._resolver = dns.asyncresolver.Resolver(configure=not resolvers)
        if resolvers:
            self._resolver.nameservers = [nameserver(text) for text in resolvers]
        self._resolver.lifetime = TIMEOUT_S

    async def records(self, hostname: str) -> DnsRecords:
        found: dict[str, list[str]] = {}

        async def ask(key: str, name: str, kind: str) -> None:
            found[key] = await self._ask(name, kind)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "a", hostname, "A")
            tasks.start_soon(ask, "aaaa", hostname, "AAAA")
            tasks.start_soon(ask, "cname", hostname, "CNAME")
            tasks.start_soon(ask, "soa", base(hostname), "SOA")
            tasks.start_soon(ask, "challenge", challenge_name(hostname), "CNAME")
            tasks.start_soon(ask, "ownership", ownership_name(hostname), "TXT")
        resolved = sorted({*found["a"], *found["aaaa"]})
        behind_cname = bool(found["cname"])
        return DnsRecords(
            a=[] if behind_cname else found["a"],
            aaaa=[] if behind_cname else found["aaaa"],
            cname=found["cname"],
            resolved_addresses=resolved,
            soa=next(iter(found["soa"]), ""),
            acme_challenge_cname=next(iter(found["challenge"]), ""),
            ownership_txt=found["ownership"],
        )

    async def _ask(self, name: str, kind: str) -> list[str]:
        try:
            answer = await self._resolver.resolve(name, kind, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer, dns.resolver.YXDOMAIN):
            return []
        except (dns.exception.DNSException, OSError) as error:
            raise TransientError(
                f"DNS could not be asked for {name} {kind}: {_short(error)}",
                hint="`resolvers` in the server's settings",
            ) from error
        return sorted(_text(record, kind) for record in answer)


def _text(record: object, kind: str) -> str:
    if kind == "TXT":
        return b"".join(getattr(record, "strings", ())).decode(errors="replace")
    if kind == "CNAME":
        return str(getattr(record, "target", "")).rstrip(".").lower()
    if kind == "SOA":
        return str(getattr(record, "mname", "")).rstrip(".").lower()
    return str(record)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def nameserver(text: str) -> dns.nameserver.Nameserver:
    """Raises InvalidRequest for what is no address."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, str(PORT)
    host = host.strip("[]")
    if not dns.inet.is_address(host) or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidRequest(f"{text!r} is not an address or address:port", field="resolvers")
    return dns.nameserver.Do53Nameserver(host, int(port))
