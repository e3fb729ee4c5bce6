"""Tells an edge's BIRD whether its proxy takes requests: `python -m pantala.box.announcer HEALTH_URL SOCKET MS`.

One process beside each BIRD, started by the supervisor after the proxy. Every MS milliseconds it asks the proxy's
`/healthz`; an answer other than 200, or none, withdraws the edge address, so that the router sends new connections to
the next edge. SIGTERM withdraws too: an edge that goes down is left before its proxy is told to end.

Standard library only, because there is one for every edge.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from io import BufferedRWPair
from types import FrameType

PROTOCOL = "edge"
"""What the names of the static routes of the edge's BIRD begin with; they are enabled while it is announced."""
ANSWER_WITHIN_S = 0.5
ANSWER_BYTES_MAX = 4096
SAY_AGAIN_S = 1.0
"""A BIRD that was started anew announces nothing until it is told to."""
HEARD_WITHIN_S = 0.1
"""What a router needs to learn of a withdrawal."""
BIRD_ANSWERS_WITHIN_S = 2.0


class Bird:
    """The control socket of one BIRD: words in, lines out, the last of which begins with a number and a space."""

    def __init__(self, path: str) -> None:
        self._path = path

    def tell(self, words: str) -> str:
        """Raises OSError when BIRD is not there."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(BIRD_ANSWERS_WITHIN_S)
            connection.connect(self._path)
            with connection.makefile("rwb") as stream:
                _reply(stream)  # its greeting
                stream.write(f"{words}\n".encode())
                stream.flush()
                return _reply(stream)

    def announce(self, wanted: bool) -> bool:
        """Repeats safely. False when BIRD does not listen; then it announces nothing."""
        try:
            self.tell(f'{"enable" if wanted else "disable"} "{PROTOCOL}*"')
        except OSError:
            return False
        return wanted


def _reply(stream: BufferedRWPair) -> str:
    lines: list[str] = []
    while line := stream.readline().decode(errors="replace"):
        lines.append(line)
        if line[:4].isdigit() and line[4:5] == " ":
            return "".join(lines)
    raise OSError("BIRD closed the connection")


def is_healthy(url: str) -> bool:
    """Without an HTTP library, which is most of what this process would weigh."""
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN_S) as connection:
            connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as stream:
                words = stream.read(ANSWER_BYTES_MAX).split()
    except OSError:
        return False
    return words[1:2] == [b"200"]


def main(arguments: list[str]) -> int:
    url, path, every_ms = arguments
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    bird = Bird(path)
    announced, said_at = False, 0.0
    try:
        while True:
            healthy = is_healthy(url)
            if healthy is not announced or time.monotonic() - said_at >= SAY_AGAIN_S:
                before, announced, said_at = announced, bird.announce(healthy), time.monotonic()
                if announced is not before:
                    print("edge announced" if announced else "edge withdrawn", flush=True)
            time.sleep(int(every_ms) / 1000)
    finally:
        bird.announce(False)
        time.sleep(HEARD_WITHIN_S)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
