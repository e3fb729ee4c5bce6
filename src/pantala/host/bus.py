"""The configuration of a host's nats-server: hubs form a cluster and take leaves, other hosts are leaves of the hubs.

Both check users themselves, by the operator's and the accounts' JWTs, so a process of the host must be one of the
bus's users also on a leaf. Between hosts: TLS with the nodes' certificates, verified on both sides.
"""

from __future__ import annotations

import json

from pantala.errors import InvalidRequest
from pantala.host.place import BUS_PORT, Place
from pantala.wire.hosts import Joined

MAX_PAYLOAD = 8 * 1024 * 1024
COMPRESSION = "off"
"""By itself nats-server compresses what goes further than 10 ms, with buffers that weigh more than all else it
holds (12 MB a host); frames are small and mostly signatures."""


def configuration(place: Place, joined: Joined) -> str:
    """The text of nats.conf; JSON is one of its dialects. Raises InvalidRequest when control's word makes no sense."""
    bus = joined.bus
    tls = {
        "cert_file": str(place.identity("node.pem")),
        "key_file": str(place.key("node.key")),
        "ca_file": str(place.identity("authority.pem")),
        "verify": True,
        "timeout": 5,
    }
    conf: dict[str, object] = {
        "server_name": joined.node,
        "listen": f"{place.address}:{BUS_PORT}",
        "max_payload": MAX_PAYLOAD,
        "operator": bus.operator_jwt,
        "system_account": bus.system_account,
        "resolver": "MEMORY",
        "resolver_preload": bus.accounts,
        "write_deadline": "5s",
        "ping_interval": "1s",
        "ping_max": 2,
    }
    if bus.hub:
        routes = [route for route in bus.routes if not route.startswith(f"{place.address}:")]
        conf["cluster"] = {
            "name": "pantala",
            "listen": _own(place, bus.routes, "routes"),
            "tls": tls,
            "routes": [f"nats://{route}" for route in routes],
            "pool_size": -1,
            "compression": COMPRESSION,
        }
        conf["leafnodes"] = {"listen": _own(place, bus.hubs, "hubs"), "tls": tls, "compression": COMPRESSION}
    else:
        if not bus.hubs:
            raise InvalidRequest("control named no hub of the bus", field="bus.hubs")
        remote = {
            "urls": [f"tls://{hub}" for hub in bus.hubs],
            "credentials": str(place.identity("bus.creds")),
            "account": _account(joined),
            "tls": tls,
            "compression": COMPRESSION,
        }
        conf["leafnodes"] = {"remotes": [remote], "reconnect": 1}
    return json.dumps(conf, indent=2) + "\n"


def _own(place: Place, listeners: list[str], field: str) -> str:
    """This hub's own listener among those of all hubs."""
    for listener in listeners:
        if listener.rpartition(":")[0] == place.address:
            return listener
    raise InvalidRequest(f"this host is a hub but its address {place.address} is not among them", field=f"bus.{field}")


def _account(joined: Joined) -> str:
    """The account that hosts meet in: the one that is not the system's."""
    others = [key for key in joined.bus.accounts if key != joined.bus.system_account]
    if len(others) != 1:
        raise InvalidRequest("control must name one account beside the system's", field="bus.accounts")
    return others[0]
