"""The hosts of a box as `pantala.host` sees them: where each is, where the control plane is, what is tuned."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.box.layout import (
    API_PORT,
    APP_DOMAIN,
    CGROUP,
    EDGE_ADDRESS,
    PLATFORM_DOMAIN,
    POOL,
    REGISTRY_PORT,
    SUBNET,
    Box,
    Host,
)
from pantala.box.links import agent_links
from pantala.builds.daemon import BuildDaemon
from pantala.errors import InvalidRequest
from pantala.host.control import Platform
from pantala.host.identity import join_request
from pantala.host.outside import resolvers
from pantala.host.place import Place
from pantala.host.settings import Tuning
from pantala.wire.hosts import JoinRequest
from pantala.wire.server import AddressPools

HUBS = 3
"""So many hosts are hubs of the bus; the others are leaves of theirs."""
HOSTS_AT_EASE = 3
"""So many hosts ping each other and repeat their proofs as often as servers would; more share what the machine can
do, which would grow with the square of their number."""
BEAT_S = 1.0
PING_INTERVAL_MS, PING_TIMEOUT_MS = 250, 750
DRAIN_MAX_MS = 5_000
"""`down` does not wait for long-lived connections."""
TUNABLE = ("agent", "proxy", "mesh", "server")


def place(box: Box, host: Host) -> Place:
    return Place(
        state=str(box.state_dir / "hosts" / host.node),
        run=str(box.run_dir / host.node),
        logs=str(box.logs_dir()),
        address=host.link.address,
        listen=[EDGE_ADDRESS] if host.edge else [],
        netns=host.link.netns,
        suffix=f"-{host.node}",
        cgroup_root=f"{CGROUP}/{host.node}",
        agent=msgspec.to_builtins(agent_links(box, host)),
    )


def request(box: Box, host: Host) -> JoinRequest:
    """Hosts of a box say their ids: `up` again finds the same ones."""
    return join_request(place(box, host), node=host.node, region=host.region)


def platform(box: Box) -> Platform:
    control = box.control().link.address
    return Platform(
        state=str(box.state_dir / "control"),
        registry_state=str(box.state_dir / "registry"),
        api=f"{control}:{API_PORT}",
        registry=f"{control}:{REGISTRY_PORT}",
        bus_url=box.bus_url,
        builder=str(box.run_dir / "buildkitd.sock"),
        builder_state=str(box.builds_dir),
        app_domain=APP_DOMAIN,
        platform_domain=PLATFORM_DOMAIN,
        regions=box.regions,
        hubs=[host.link.address for host in box.hosts()[:HUBS]],
        edge_addresses=[EDGE_ADDRESS],
        closed_addresses=[f"{SUBNET}.0.0/16"],
        pools=AddressPools(shared_v4=[EDGE_ADDRESS], v4=[POOL], v6=[box.pool6] if box.pool6 else []),
        shared_kernel=True,
    )


def builder(box: Box, *, mirrored: tuple[str, ...]) -> BuildDaemon:
    """Its cache outlives the box: it is what makes the second build fast."""
    return BuildDaemon(
        root=box.builds_dir,
        socket=box.run_dir / "buildkitd.sock",
        registry=box.registry,
        mirrored=mirrored,
    )


def tuning(box: Box) -> Tuning:
    """For all hosts of the box alike."""
    crowd = max(1.0, len(box.regions) / HOSTS_AT_EASE)
    mesh: dict[str, Any] = {
        "ping_interval_ms": int(PING_INTERVAL_MS * crowd),
        "ping_timeout_ms": int(PING_TIMEOUT_MS * crowd),
    }
    made = Tuning(
        idle_window_s=box.idle_window_s,
        drain_max_ms=DRAIN_MAX_MS,
        resolvers=resolvers(),
        agent={"beat_s": BEAT_S * crowd, "gossip_s": BEAT_S * crowd},
        proxy={"lame_duck_ms": box.lame_duck_ms} if len(box.hosts()) > 1 else {},
        mesh=mesh,
    )
    made = tuned(made, box.tuning)
    # Control must not take a host for silent whose beats it was told to make slower.
    return msgspec.structs.replace(made, server={"beat_s": made.agent["beat_s"], "sign_names": True} | made.server)


def tuned(tuning: Tuning, given: dict[str, str]) -> Tuning:
    """Fields of the processes' settings, as in `agent.drain_s`, to JSON values. Raises InvalidRequest."""
    document = msgspec.to_builtins(tuning)
    for name, text in given.items():
        part, _, field = name.partition(".")
        if part not in TUNABLE or not field:
            raise InvalidRequest(
                f"{name!r} is not one of {', '.join(TUNABLE)} with a field, as in agent.drain_s=5", field="--settings"
            )
        try:
            document[part][field] = msgspec.json.decode(text.encode())
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{name}: {text!r} is not a JSON value", field="--settings") from error
    return msgspec.convert(document, Tuning)
