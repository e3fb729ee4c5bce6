"""A client of the box that lives as long as a benchmark: one process in the network namespace of a region's clients,
told over a pipe what to ask. Each request has a connection of its own; its time runs from the end of the TLS handshake
to the first byte, measured where the request is made, so that neither spawns nor pipes count.

`python -m benchmarks.client EDGE CA_FILE` reads and writes one JSON object a line.
"""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pantala.testing.box import BoxRig

TIMEOUT_S = 40.0
HEAD_BYTES_MAX = 64 * 1024


class Client:
    """`first_byte_ms` asks a certain machine of an app; it is woken when it sleeps."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def first_byte_ms(self, host: str, machine: str, body: str) -> float:
        said = self._ask({"host": host, "machine": machine})
        if said["status"] != 200 or said["body"].strip() != body:
            raise AssertionError(f"{host} answered {said['status']} {said['body'][:200]!r}")
        return said["ms"]

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("the client has no pipes")
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the client ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def client_of(box: BoxRig) -> Generator[Client]:
    settings = json.loads(Path(box.environment["PANTALA_CONFIG_DIR"], "config.json").read_text())
    inside = ["nsenter", f"--net=/run/netns/{box.namespace(f'at-{box.region}')}", "--"]
    command = [*inside, sys.executable, "-m", "benchmarks.client", settings["edge"], settings["ca_file"]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Client(process)
    finally:
        process.kill()
        process.communicate()


# -- the process itself ------------------------------------------------------------------------------------------------


def _serve(edge: str, ca_file: str) -> None:
    context = ssl.create_default_context(cafile=ca_file)
    for line in sys.stdin:
        question = json.loads(line)
        answer = _request(edge, context, question["host"], question["machine"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _request(edge: str, context: ssl.SSLContext, host: str, machine: str) -> dict[str, Any]:
    head = f"GET /index.html HTTP/1.1\r\nHost: {host}\r\nfly-force-instance-id: {machine}\r\nConnection: close\r\n\r\n"
    with (
        socket.create_connection((edge, 443), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
    ):
        begun = time.perf_counter()
        stream.sendall(head.encode())
        answer = stream.recv(HEAD_BYTES_MAX)
        took_s = time.perf_counter() - begun
        while len(answer) < HEAD_BYTES_MAX and (more := stream.recv(HEAD_BYTES_MAX)):
            answer += more
    first, _, body = answer.partition(b"\r\n\r\n")
    words = first.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return {"ms": took_s * 1000, "status": status, "body": body.decode(errors="replace"), "head": first.decode()}


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
