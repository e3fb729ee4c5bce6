"""How buildkitd is started: its configuration, the wrapped runc, the environment. Pure but for `write`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import msgspec

from pantala.builds import runc_wrapper
from pantala.kit import binaries

LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
INDEX_VARIABLES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "npm_config_registry",
    "GOPROXY",
    "GONOSUMDB",
    "CARGO_REGISTRIES_CRATES_IO_PROTOCOL",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)


class BuildDaemon(msgspec.Struct, frozen=True, kw_only=True):
    """`registry`: `host:port` of the platform's registry over plain HTTP. `mirrored`: names of registries that are
    not in reach from here and whose images are looked for in the platform's registry instead."""

    root: Path
    socket: Path
    registry: str
    mirrored: tuple[str, ...] = ("docker.io",)
    parallel_steps: int = 2
    cache_mib: int = 10_240

    def command(self) -> list[str]:
        return [str(binaries.find("buildkitd")), "--config", str(self.root / "buildkitd.toml")]

    def environment(self) -> dict[str, str]:
        """What buildkitd runs with; the wrapper reads the operator's authorities and indexes from it."""
        authorities = any(LOCAL_AUTHORITIES.glob("**/*.crt")) if LOCAL_AUTHORITIES.is_dir() else False
        indexes = {name: os.environ[name] for name in INDEX_VARIABLES if os.environ.get(name)}
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root),
            "PANTALA_BUILD_CA": str(SYSTEM_BUNDLE) if authorities else "",
            "PANTALA_BUILD_ENV": json.dumps(indexes),
            "PANTALA_RUNC": shutil.which("runc") or "/usr/sbin/runc",
        }

    def write(self) -> None:
        """Write the configuration and the wrapper into `root`."""
        self.root.mkdir(parents=True, exist_ok=True)
        wrapper = self.root / "runc"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(runc_wrapper.__file__)} "$@"\n')
        wrapper.chmod(0o755)
        (self.root / "buildkitd.toml").write_text(config(self, wrapper))


def config(daemon: BuildDaemon, wrapper: Path) -> str:
    mirrors = "".join(f'[registry."{name}"]\n  mirrors = ["{daemon.registry}"]\n' for name in daemon.mirrored)
    return (
        f'root = "{daemon.root / "state"}"\n'
        "[grpc]\n"
        f'  address = ["unix://{daemon.socket}"]\n'
        "[worker.containerd]\n"
        "  enabled = false\n"
        "[worker.oci]\n"
        "  enabled = true\n"
        '  snapshotter = "overlayfs"\n'
        f'  binary = "{wrapper}"\n'
        # "host" is the namespace that buildkitd itself was put into, with nothing in it but the way out.
        '  networkMode = "host"\n'
        f"  max-parallelism = {daemon.parallel_steps}\n"
        "  gc = true\n"
        f"  gckeepstorage = {daemon.cache_mib}\n"
        f"{mirrors}"
        f'[registry."{daemon.registry}"]\n'
        "  http = true\n"
    )
