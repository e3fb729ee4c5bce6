"""A host keeps its identity fresh by itself: in time, whatever fails meanwhile, never half."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import anyio
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pantala.agent.identity import ControlClient, Identity, Renewal
from pantala.kit.nkeys import NKey, claims_of, read_credentials
from pantala.kit.sealing import Signer
from pantala.testing.clock import ManualClock
from pantala.testing.host_keys import HostKeys
from pantala.testing.platform import TestPlatform, running
from pantala.wire.hosts import Renewed

pytestmark = pytest.mark.anyio

DAY_S = timedelta(days=1).total_seconds()


async def joined(platform: TestPlatform, folder: Path) -> tuple[Identity, Signer]:
    """A host as `host join` leaves it: keys of its own, and what control gave."""
    keys, identity = HostKeys(), Identity(folder / "identity", folder / "keys")
    bus_key = NKey.ensure("user", folder / "keys" / "bus.seed").public
    request = msgspec.structs.replace(keys.request(node="iad-1"), csr_pem=identity.request(), bus_key=bus_key)
    host = await platform.control.hosts.admit_first(request)
    identity.keep(
        Renewed(certificate_pem=host.certificate_pem, authority_pem=host.authority_pem, user_jwt=host.bus.user_jwt)
    )
    return identity, keys.signer


def renewal(platform: TestPlatform, clock: ManualClock, identity: Identity, signer: Signer) -> Renewal:
    control = ControlClient(platform.bus, signer, clock, node="iad-1")
    return Renewal(identity, control, clock, before_s=10 * DAY_S, every_s=3600)


async def test_it_is_renewed_ten_days_before_it_ends(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path / "control", clock=clock) as platform:
        identity, signer = await joined(platform, tmp_path / "host")
        renewing = renewal(platform, clock, identity, signer)
        first = identity.ends_at()
        await clock.advance(20 * DAY_S - 60)
        assert not await renewing.once()
        await clock.advance(120)
        assert await renewing.once()
        assert identity.ends_at() - first > timedelta(days=19)
        leaf = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
        key = load_pem_private_key((tmp_path / "host" / "keys" / "node.key").read_bytes(), password=None)
        assert leaf.public_key() == key.public_key()
        user_jwt, bus_key = read_credentials(identity.credentials)
        assert claims_of(user_jwt)["sub"] == bus_key.public
        for path in (identity.certificate, identity.credentials, tmp_path / "host" / "keys" / "node.key"):
            assert path.stat().st_mode & 0o777 == 0o600


async def test_a_silent_control_is_asked_again_for_as_long_as_it_takes(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running(tmp_path / "control", clock=clock) as platform:
        identity, signer = await joined(platform, tmp_path / "host")
        first = identity.ends_at()
        platform.bus.down = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(renewal(platform, clock, identity, signer).run)
            await anyio.wait_all_tasks_blocked()
            await clock.advance(25 * DAY_S)
            assert identity.ends_at() == first
            platform.bus.down = False
            await clock.advance(300)  # the longest pause between attempts
            with anyio.fail_after(10):
                while identity.ends_at() == first:  # signing is a thread's work
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
