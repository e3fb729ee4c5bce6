"""The relay of a box with distances: its settings, its process, and questions to it while it runs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec

from pantala.box.layout import ROUTER, Box
from pantala.box.router import relay_settings
from pantala.errors import InternalError
from pantala.host.supervisor import Process
from pantala.kit import binaries

ANSWERS_WITHIN_S = 2.0


def plan_relay(box: Box) -> list[Process]:
    """Writes its settings and says how to start it, before the hosts. None in a box without distances."""
    if not box.distances:
        return []
    return [
        Process(
            name="relay",
            command=[str(binaries.find("pantala-relay")), "--settings", str(write(box))],
            netns=ROUTER,
            env={},
            log=str(box.logs_dir() / "relay.log"),
            ready=f"unix:{control_socket(box)}",
        )
    ]


def write(box: Box, *, loss: float = 0.0) -> Path:
    path = box.run_dir / "relay.json"
    path.write_bytes(relay_settings(box, loss=loss))
    return path


def control_socket(box: Box) -> Path:
    return box.run_dir / "relay.sock"


def reload(box: Box, *, loss: float) -> None:
    """Regions, hosts and loss as they are now. Nothing where no relay runs."""
    if control_socket(box).exists():
        write(box, loss=loss)
        ask(box, "reload")


def ask(box: Box, words: str) -> dict[str, Any]:
    """`stats` or `reload`: packets, lost, under_way, devices. Raises InternalError when it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWERS_WITHIN_S)
            connection.connect(str(control_socket(box)))
            connection.sendall(words.encode())
            with connection.makefile("rb") as stream:
                answer = msgspec.json.decode(stream.read(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InternalError(f"the relay does not answer: {error}") from error
    if "error" in answer:
        raise InternalError(f"the relay refused: {answer['error']}")
    return answer
