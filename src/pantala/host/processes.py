"""Which processes one host has: bus, agent, proxy; and on the first host also control's: server, registry, builder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pantala.builds.daemon import BuildDaemon
from pantala.errors import InvalidRequest
from pantala.host import settings
from pantala.host.control import Platform
from pantala.host.place import ADMIN_PORT, BUS_PORT, Place
from pantala.host.supervisor import Process
from pantala.kit import binaries
from pantala.wire.hosts import Joined


def host_processes(place: Place, joined: Joined, tuning: settings.Tuning) -> list[Process]:
    """Writes their settings and says how to start them."""
    bus, agent, proxy = (f"{name}{place.suffix}" for name in ("nats", "agent", "proxy"))
    renewed = [str(place.identity(name)) for name in ("node.pem", "authority.pem", "bus.creds")]
    return [
        _process(
            place,
            bus,
            [str(binaries.find("nats-server")), "-c", str(settings.write_bus(place, joined))],
            ready=f"tcp:{place.address}:{BUS_PORT}",
            reload_on=renewed,
        ),
        _process(
            place,
            agent,
            _python("pantala.agent", settings.write_agent(place, joined, tuning)),
            ready=f"unix:{place.feed_socket}",
            after=[bus],
        ),
        _process(
            place,
            proxy,
            [str(binaries.find("pantala-proxy")), "--settings", str(settings.write_proxy(place, joined, tuning))],
            ready=f"tcp:{place.address}:{ADMIN_PORT}",
            after=[agent],
            replace=str(place.state_dir / "proxy" / "replace.sock"),
        ),
    ]


def control_processes(place: Place, platform: Platform, *, builder: BuildDaemon, builds_netns: str) -> list[Process]:
    """Of the first host; bootstrapping has written the settings of server and registry."""
    builder.write()
    return [
        _process(
            place,
            "server",
            _python("pantala.server", platform.server_settings),
            ready=f"tcp:{platform.api}",
            after=[f"nats{place.suffix}"],
        ),
        _process(
            place,
            "registry",
            [registry_program(), "serve", str(platform.registry_settings)],
            ready=f"tcp:{platform.registry}",
        ),
        Process(
            name="buildkitd",
            command=builder.command(),
            netns=builds_netns,
            env=builder.environment(),
            log=str(place.logs_dir / "buildkitd.log"),
            ready=f"unix:{builder.socket}",
        ),
    ]


def registry_program() -> str:
    for name in ("docker-registry", "registry"):
        if found := shutil.which(name):
            return found
    raise InvalidRequest("neither docker-registry nor registry is installed", hint="apt-get install docker-registry")


def _python(module: str, settings_file: Path) -> list[str]:
    return [sys.executable, "-m", module, "--settings", str(settings_file)]


def _process(
    place: Place,
    name: str,
    command: list[str],
    *,
    ready: str,
    after: list[str] | None = None,
    reload_on: list[str] | None = None,
    replace: str = "",
) -> Process:
    return Process(
        name=name,
        command=command,
        netns=place.netns,
        env=environment(),
        log=str(place.logs_dir / f"{name}.log"),
        ready=ready,
        after=after or [],
        reload_on=reload_on or [],
        replace=replace,
    )


def environment() -> dict[str, str]:
    """What daemons inherit: where programs and certificates are, never a token."""
    kept = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "PANTALA_BIN_DIR", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ}
