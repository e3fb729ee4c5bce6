"""Several processes in one machine, by the real `pantala-init`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from init_rig import Init

from pantala.drivers import guest, ring
from pantala.testing.poll import until_sync
from pantala.wire.guest import ExitRecord, Failed, GuestProcess, GuestReply, Ok, Start, Started, Stop

pytestmark = [pytest.mark.anyio, pytest.mark.root]

ENV = {"PATH": "/usr/bin:/bin"}
WITHIN_S = 20.0


@pytest.fixture
def init(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Init]:
    made = Init(tmp_path_factory.mktemp("i"), ring.RING_CAPACITY_MIN)
    yield made
    made.process.kill()
    made.process.wait()


async def start(init: Init, *scripts: str) -> GuestReply:
    app, *others = (["/bin/sh", "-c", script] for script in scripts)
    beside = [GuestProcess(argv=argv, env=ENV) for argv in others]
    return await guest.call(init.socket, Start(argv=app, env=ENV, processes=beside))


def record(init: Init) -> ExitRecord:
    return msgspec.json.decode(init.record.read_bytes(), type=ExitRecord)


def lines(init: Init) -> set[str]:
    return {one.text.decode() for one in ring.read(init.ring, 0).records}


async def test_all_run_and_their_words_are_the_machines(init: Init) -> None:
    assert isinstance(await start(init, "echo web; sleep 1000", "echo worker; sleep 1000"), Started)
    until_sync(lambda: lines(init), lambda said: said == {"web", "worker"}, within_s=WITHIN_S)


@pytest.mark.parametrize("which", ["the app", "the other"])
async def test_the_first_that_ends_ends_the_machine_and_the_others_may_clean_up(init: Init, which: str) -> None:
    ready = init.ring.with_name("ready")
    stays = f"trap 'echo cleaned; exit 0' TERM; touch {ready}; while :; do sleep 0.05; done"
    goes = f"while [ ! -e {ready} ]; do sleep 0.01; done; exit 9"
    assert isinstance(await start(init, *((goes, stays) if which == "the app" else (stays, goes))), Started)
    assert await init.code() == 9
    assert "cleaned" in lines(init)
    assert (record(init).exit_code, record(init).requested_stop) == (9, False)
    assert record(init).reason == ("" if which == "the app" else "a process beside the app ended")


async def test_one_that_does_not_heed_is_killed_in_the_end(init: Init) -> None:
    await start(init, "sleep 0.2; exit 4", "trap '' TERM; while :; do sleep 0.05; done")
    assert await init.code() == 4


async def test_a_stop_reaches_all_and_waits_for_all(init: Init) -> None:
    slow = "trap 'sleep 0.5; echo bye; exit 0' INT; echo up; while :; do sleep 0.05; done"
    await start(init, "trap 'exit 0' INT; echo up; while :; do sleep 0.05; done", slow)
    until_sync(lambda: len(ring.read(init.ring, 0).records), lambda said: said == 2, within_s=WITHIN_S)
    assert isinstance(await guest.call(init.socket, Stop(signal=2, grace_ms=10_000)), Ok)
    assert await init.code() == 0
    assert "bye" in lines(init)
    assert record(init).requested_stop


async def test_one_that_cannot_run_ends_the_machine_with_its_reason(init: Init) -> None:
    start_both = Start(argv=["/bin/sleep", "1000"], env=ENV, processes=[GuestProcess(argv=["/no/such"], env=ENV)])
    reply = await guest.call(init.socket, start_both)
    assert isinstance(reply, Failed)
    assert "/no/such" in reply.reason
    assert await init.code() == 127
