"""Which processes a box has, in the order in which they start: bus, server, registry, builder, then each host's own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from pantala.box import settings
from pantala.box.layout import API_PORT, BUS_PORT, EDGE_ADDRESS, REGISTRY_PORT, Box
from pantala.box.supervisor import Process
from pantala.builds.daemon import BuildDaemon
from pantala.errors import InvalidRequest
from pantala.kit import binaries
from pantala.wire.server import Bootstrapped


def build_daemon(box: Box, *, mirrored: tuple[str, ...]) -> BuildDaemon:
    """Its cache outlives the box: it is what makes the second build fast."""
    return BuildDaemon(
        root=box.builds_dir,
        socket=box.run_dir / "buildkitd.sock",
        registry=box.registry,
        mirrored=mirrored,
    )


def plan_processes(box: Box, made: Bootstrapped, *, mirrored: tuple[str, ...]) -> list[Process]:
    """Writes their configuration and says how to start them."""
    control = box.control()
    netns, address = control.link.netns, control.link.address
    daemon = build_daemon(box, mirrored=mirrored)
    daemon.write()
    processes = [
        _process(
            box,
            "nats",
            [str(binaries.find("nats-server")), "-c", str(settings.write_bus(box))],
            netns=netns,
            ready=f"tcp:{address}:{BUS_PORT}",
        ),
        _process(
            box,
            "server",
            _python("pantala.server", settings.write_server(box)),
            netns=netns,
            ready=f"tcp:{address}:{API_PORT}",
        ),
        _process(
            box,
            "registry",
            [registry_program(), "serve", str(settings.write_registry(box, made))],
            netns=netns,
            ready=f"tcp:{address}:{REGISTRY_PORT}",
        ),
        _process(
            box,
            "buildkitd",
            daemon.command(),
            netns=box.builds().netns,
            ready=f"unix:{daemon.socket}",
            env=daemon.environment(),
        ),
    ]
    for host in box.hosts():
        files = settings.host_files(box, host)
        processes += [
            _process(
                box,
                f"agent-{host.node}",
                _python("pantala.agent", settings.write_agent(box, host, made)),
                netns=host.link.netns,
                ready=f"unix:{files.feed_socket}",
            ),
            _process(
                box,
                f"proxy-{host.node}",
                [str(binaries.find("pantala-proxy")), "--settings", str(settings.write_proxy(box, host))],
                netns=host.link.netns,
                ready=f"tcp:{EDGE_ADDRESS}:443",
            ),
        ]
    return processes


def registry_program() -> str:
    for name in ("docker-registry", "registry"):
        if found := shutil.which(name):
            return found
    raise InvalidRequest("neither docker-registry nor registry is installed", hint="apt-get install docker-registry")


def _python(module: str, settings_file: Path) -> list[str]:
    return [sys.executable, "-m", module, "--settings", str(settings_file)]


def _process(
    box: Box, name: str, command: list[str], *, netns: str, ready: str, env: dict[str, str] | None = None
) -> Process:
    return Process(
        name=name,
        command=command,
        netns=netns,
        env=env if env is not None else _environment(),
        log=str(box.logs_dir() / f"{name}.log"),
        ready=ready,
    )


def _environment() -> dict[str, str]:
    """What daemons inherit: where programs and certificates are, never a token."""
    kept = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "PANTALA_BIN_DIR", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ}
