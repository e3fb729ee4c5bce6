"""The app that benchmarks run where the app itself must cost next to nothing: busybox as an HTTP server."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pantala.testing.box import BoxRig
from pantala.testing.ports import free_port

BUSYBOX = "/bin/busybox"
BODY = "hello from busybox"
ANSWERS_WITHIN_S = 10.0

DOCKERFILE = """\
FROM busybox:latest
COPY index.html /www/index.html
EXPOSE 8080
CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]
"""

CONFIG = """\
app = "{name}"
primary_region = "iad"

[http_service]
internal_port = 8080
force_https = true
auto_stop_machines = "stop"
auto_start_machines = true
min_machines_running = 0
"""


def deploy_busybox(box: BoxRig, name: str) -> Path:
    """One running machine; the directory of its fly.toml."""
    folder = box.work / name
    folder.mkdir()
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "index.html").write_text(BODY)
    (folder / "fly.toml").write_text(CONFIG.format(name=name))
    box.pantala("images", "bootstrap", "busybox:latest", "--state", str(box.state), timeout_s=300)
    box.pantala("apps", "create", name)
    box.pantala("deploy", "--no-ha", "--yes", cwd=folder)
    return folder


@contextmanager
def bare_busybox(folder: Path) -> Generator[float]:
    """The same program without a platform: seconds from its spawn to the first byte of its first answer."""
    port = free_port()
    command = [BUSYBOX, "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(folder)]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield _first_byte(port) - begun
    finally:
        process.kill()
        process.wait()


def _first_byte(port: int) -> float:
    deadline = time.monotonic() + ANSWERS_WITHIN_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWERS_WITHIN_S)
        try:
            connection.request("GET", "/index.html")
            connection.getresponse()
            return time.monotonic()
        except ConnectionRefusedError:
            time.sleep(0.0001)
        finally:
            connection.close()
    raise TimeoutError(f"busybox did not answer on port {port} within {ANSWERS_WITHIN_S:g} s")
