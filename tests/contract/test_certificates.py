"""Certificates: what they are good for, who can open their keys, when they are issued anew."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from pantala.errors import InvalidRequest
from pantala.kit.sealing import Opener
from pantala.testing.clock import ManualClock
from pantala.testing.platform import TestPlatform, running

pytestmark = pytest.mark.anyio


async def test_an_edge_can_serve_apps_and_the_platform_s_names(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        assert len(await platform.control.certificates.ensure()) == 2
        authority = x509.load_pem_x509_certificate((tmp_path / "ca" / "ca.pem").read_bytes())
        rows = {key: row for key, row in platform.rows.rows.items() if key.startswith("cert/")}
        edge = edge_opener(platform)
        for name in ("web.apps.pantala.test", "api.pantala.test", "registry.pantala.test"):
            wildcard = "*." + name.partition(".")[2]
            row = next(row for row in rows.values() if name in row["names"] or wildcard in row["names"])
            leaf, *rest = x509.load_pem_x509_certificates(row["chain_pem"].encode())
            verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName(name))
            verifier.verify(leaf, rest)
            key = serialization.load_pem_private_key(edge.open(row["sealed_key"]), password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            assert key.public_key() == leaf.public_key()
            assert "key_pem" not in row
        assert b"PRIVATE KEY" not in (tmp_path / "control.db").read_bytes()
        assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600


def edge_opener(platform: TestPlatform) -> Opener:
    """The edge key as node-1 gets it."""
    row = platform.rows.rows["edge/node-1"]
    return Opener(platform.agents["node-1"].opener.open(row["sealed_key"]))


async def test_an_edge_that_leaves_can_open_nothing_that_comes_later(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        await platform.add_agent("node-2")
        await platform.control.certificates.ensure()
        before = edge_opener(platform)
        await platform.control.hosts.withdraw("node-2", "removed", actor="ada")
        assert len(await platform.control.certificates.ensure()) == 2
        certificates = [row for key, row in platform.rows.rows.items() if key.startswith("cert/")]
        for row in certificates:
            with pytest.raises(InvalidRequest):
                before.open(row["sealed_key"])
            assert b"PRIVATE KEY" in edge_opener(platform).open(row["sealed_key"])
        assert "edge/node-2" not in platform.rows.rows


async def test_certificates_are_kept_until_they_end_soon(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path, clock=clock) as platform:
        certificates = platform.control.certificates
        assert len(await certificates.ensure()) == 2
        assert await certificates.ensure() == []
        await clock.advance(timedelta(days=59).total_seconds())
        assert await certificates.ensure() == []
        await clock.advance(timedelta(days=2).total_seconds())
        assert len(await certificates.ensure()) == 2


async def test_everything_is_published_again_from_the_database(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        await platform.create_app("web")
        await platform.control.certificates.ensure()
        before = dict(platform.rows.rows)
        platform.rows.rows = {"app/stale": {}}
        await platform.control.publication.publish_all()
        after = platform.rows.rows
        assert before.items() <= after.items()
        assert after["host/api.pantala.test"] == {"backend": "192.0.2.1:4280"}
        assert after["host/registry.pantala.test"] == {"backend": "192.0.2.1:5000"}
        assert "app/stale" not in after
