"""Health checks of a container over HTTPS: which certificates are good, and what is said of one that is not."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from containers_rig import MACHINE, WITHIN_S, ContainersRig
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pantala.testing.driver_harness import ContainerHarness, container_harness
from pantala.testing.poll import until
from pantala.wire.guest import CheckState
from pantala.wire.machine import Container, Healthcheck, HTTPHealth

pytestmark = [pytest.mark.anyio, pytest.mark.root]
PORT = 8443
NAME = "app.example.com"
SERVER = """
import http.server, ssl, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/well" else 503)
        self.end_headers()
    def log_message(self, *_): pass
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Answers)
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"""


def self_signed(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
    """With a server in the machine's network, as if one of its containers were it."""
    folder = tmp_path_factory.mktemp("tls")
    with container_harness(folder / "host") as made:
        inside = ["nsenter", f"--net={made.netns}", "--"]
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        command = [*inside, sys.executable, "-c", SERVER, str(self_signed(folder / "server.pem")), str(PORT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "ready\n"
                yield made
            finally:
                server.kill()


@pytest.fixture
async def rig(harness: ContainerHarness) -> AsyncIterator[ContainersRig]:
    made = ContainersRig(harness)
    yield made
    await made.driver.destroy(MACHINE)


@pytest.mark.parametrize(
    ("asked", "good", "says"),
    [
        pytest.param({"tls_skip_verify": True}, True, "HTTP/1.0 200", id="anyone"),
        pytest.param({"tls_skip_verify": True, "tls_server_name": NAME}, True, "HTTP/1.0 200", id="anyone by name"),
        pytest.param({"tls_skip_verify": True, "path": "/ill"}, False, "HTTP/1.0 503", id="a bad answer"),
        pytest.param({"tls_server_name": NAME}, False, "invalid peer certificate", id="one nobody vouches for"),
    ],
)
async def test_a_check_through_tls(rig: ContainersRig, asked: dict[str, object], good: bool, says: str) -> None:
    http = HTTPHealth(**{"port": PORT, "path": "/well", "scheme": "https", **asked})  # type: ignore[arg-type]  # named by the cases
    check = Healthcheck(name="up", interval=1, timeout=10, http=http)
    await rig.start(Container(name="web", image="a", exec=["sleep", "1000"], healthchecks=[check]))

    async def seen() -> CheckState:
        (state,) = (await rig.state("web")).checks
        return state

    state = await until(seen, lambda state: says in state.output, within_s=WITHIN_S)
    assert state.passing is good
