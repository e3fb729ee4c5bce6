"""`pantala box at REGION -- CMD`: run a command as a client whose nearest edge is that region's.

In the client's network namespace, with the box's resolver and authority: names resolve and certificates verify without
flags for curl and what else reads the usual files and variables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pantala.box.layout import EDGE_ADDRESS, Box
from pantala.errors import NotFound

SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
_INSIDE = 'mount --make-rprivate / && mount --bind "$0" /etc/resolv.conf && exec "$@"'


def client_command(box: Box, region: str, command: list[str], *, resolv_conf: Path) -> list[str]:
    """`command` in the client namespace, with a resolv.conf of its own over the machine's."""
    netns = box.client_at(region).netns
    return ["nsenter", f"--net=/run/netns/{netns}", "--", "unshare", "--mount", "sh", "-c", _INSIDE, str(resolv_conf),
            *command]  # fmt: skip


def client_environment(ca_bundle: Path) -> dict[str, str]:
    return dict(os.environ) | dict.fromkeys(CA_VARIABLES, str(ca_bundle))


def write_client_files(box: Box, ca_file: Path, folder: Path) -> tuple[Path, Path]:
    """resolv.conf and a bundle of the system's authorities and the box's. Raises NotFound when the box is not up."""
    if not ca_file.is_file():
        raise NotFound(f"there is no {ca_file}", hint="is the box up?")
    resolv_conf, bundle = folder / "resolv.conf", folder / "ca.pem"
    resolv_conf.write_text(f"nameserver {EDGE_ADDRESS}\noptions timeout:2 attempts:2\n")
    system = SYSTEM_BUNDLE.read_text() if SYSTEM_BUNDLE.is_file() else ""
    bundle.write_text(f"{ca_file.read_text()}\n{system}")
    return resolv_conf, bundle


def run_at(box: Box, region: str, ca_file: Path, command: list[str]) -> int:
    """The command's exit code."""
    with tempfile.TemporaryDirectory(prefix="pantala-client-") as scratch:
        resolv_conf, bundle = write_client_files(box, ca_file, Path(scratch))
        full = client_command(box, region, command, resolv_conf=resolv_conf)
        return subprocess.run(full, env=client_environment(bundle), check=False, stdin=sys.stdin).returncode
