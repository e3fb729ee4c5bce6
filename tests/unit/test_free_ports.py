"""Ports for servers of tests: nothing else takes one between its choice and the server's start."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pantala.testing.ports import free_port


def test_no_outgoing_connection_can_take_a_port_that_was_handed_out() -> None:
    first_of_the_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_port() < first_of_the_kernel


def test_nobody_is_handed_the_port_of_another() -> None:
    with ThreadPoolExecutor(8) as askers:
        asked = [askers.submit(free_port) for _ in range(200)]
        ports = [one.result() for one in asked]
    assert len(set(ports)) == 200
