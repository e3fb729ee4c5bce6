"""Tables of endpoints, a file for each kind of thing."""

from __future__ import annotations

from pantala.server.endpoint import Endpoint
from pantala.server.routes import (
    accounts,
    addresses,
    apps,
    audit,
    builds,
    certificates,
    hosts,
    later,
    machines,
    network_policies,
    platform,
    releases,
    secrets,
    ssh,
    statics,
    traces,
)


def all_endpoints() -> list[Endpoint]:
    return [
        *accounts.ENDPOINTS,
        *apps.ENDPOINTS,
        *machines.ENDPOINTS,
        *secrets.ENDPOINTS,
        *releases.ENDPOINTS,
        *certificates.ENDPOINTS,
        *addresses.ENDPOINTS,
        *network_policies.ENDPOINTS,
        *builds.ENDPOINTS,
        *statics.ENDPOINTS,
        *traces.ENDPOINTS,
        *audit.ENDPOINTS,
        *hosts.ENDPOINTS,
        *platform.ENDPOINTS,
        *later.ENDPOINTS,
        *ssh.ENDPOINTS,
    ]
