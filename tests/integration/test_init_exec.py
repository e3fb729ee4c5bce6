"""Commands beside the app, by the real `pantala-init`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from init_rig import Init

from pantala.drivers import guest, ring
from pantala.testing.poll import until
from pantala.wire.guest import Exec, Executed, Failed, Start, Started, Status

pytestmark = [pytest.mark.anyio, pytest.mark.root]

WITHIN_S = 20.0


@pytest.fixture
def init(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Init]:
    made = Init(tmp_path_factory.mktemp("i"), ring.RING_CAPACITY_MIN)
    yield made
    made.process.kill()
    made.process.wait()


async def run(init: Init, script: str, stdin: bytes = b"", **more: Any) -> Executed:
    wanted = Exec(argv=["/bin/sh", "-c", script], stdin_base64=base64.b64encode(stdin).decode(), **more)
    reply = await guest.call(init.socket, wanted, deadline_s=WITHIN_S)
    assert isinstance(reply, Executed), reply
    return reply


def text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


async def test_a_command_has_the_environment_and_the_folder_of_the_app(init: Init, tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "COLOUR": "blue", "HOME": "/nowhere"}
    start = Start(argv=["/bin/sleep", "1000"], env=env, cwd=str(tmp_path))
    assert isinstance(await guest.call(init.socket, start), Started)
    ended = await run(init, "echo $COLOUR $MOOD $HOME; pwd; id -u", env={"MOOD": "calm"})
    assert text(ended.stdout_base64).split() == ["blue", "calm", "/root", str(tmp_path), "0"]
    assert text((await run(init, "id -u", user="nobody")).stdout_base64).strip() == "65534"
    refused = await guest.call(init.socket, Exec(argv=["id"], user="nobody-at-all"))
    assert isinstance(refused, Failed)
    assert "nobody-at-all" in refused.reason


async def test_input_of_any_length_arrives_whole_and_ends(init: Init) -> None:
    await init.start("sleep 1000")
    assert text((await run(init, "wc -c", b"x" * 1_000_000)).stdout_base64).strip() == "1000000"
    assert text((await run(init, "wc -c")).stdout_base64).strip() == "0"
    assert (await run(init, "exec <&-; exit 4", b"x" * 1_000_000)).exit_code == 4, "nobody reads it"


async def test_output_beyond_the_bound_is_dropped_and_said(init: Init) -> None:
    await init.start("sleep 1000")
    ended = await run(init, "head -c 5000000 /dev/zero; echo done >&2", output_bytes_max=1000)
    assert (len(base64.b64decode(ended.stdout_base64)), ended.truncated) == (1000, True)
    assert (ended.exit_code, text(ended.stderr_base64)) == (0, "done\n")


async def test_what_a_command_leaves_in_the_background_delays_no_answer(init: Init) -> None:
    await init.start("sleep 1000")
    with anyio.fail_after(WITHIN_S):
        ended = await run(init, "sleep 1000 & echo begun")
    assert (ended.exit_code, text(ended.stdout_base64)) == (0, "begun\n")


async def test_a_command_ends_with_its_time_and_with_its_caller(init: Init, tmp_path: Path) -> None:
    await init.start("sleep 1000")
    ended = await run(init, "sleep 1000 & echo $$; wait", timeout_ms=200)
    assert (ended.exit_code, ended.signal, ended.timed_out) == (137, 9, True)

    pid = tmp_path / "pid"
    with anyio.move_on_after(WITHIN_S):
        async with anyio.create_task_group() as callers:
            callers.start_soon(run, init, f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 1000")
            await until(lambda: anyio.Path(pid).exists(), bool, within_s=WITHIN_S)
            callers.cancel_scope.cancel()
    script = f"kill -0 $(cat {pid}) && echo alive || echo gone"

    async def look() -> str:
        return text((await run(init, script)).stdout_base64).strip()

    assert await until(look, lambda said: said == "gone", within_s=WITHIN_S)


async def test_many_commands_at_once_have_a_bound(init: Init) -> None:
    await init.start("sleep 1000")
    replies: list[str] = []

    async def one() -> None:
        reply = await guest.call(init.socket, Exec(argv=["/bin/sleep", "0.3"]), deadline_s=WITHIN_S)
        replies.append(type(reply).__name__)

    async with anyio.create_task_group() as callers:
        for _ in range(15):
            callers.start_soon(one)
    assert replies == ["Executed"] * 15


async def test_the_end_of_the_app_ends_its_commands(init: Init) -> None:
    await init.start("sleep 1; exit 6")
    with pytest.raises(guest.GuestGone):
        await run(init, "sleep 1000")
    assert await init.code() == 6


async def test_the_loop_rests_while_a_command_runs(init: Init) -> None:
    """PID 1 takes next to no CPU time for it."""
    await init.start("sleep 1000")
    await run(init, "sleep 1")
    ticks = (await run(init, "cut -d' ' -f14,15 /proc/1/stat")).stdout_base64
    assert sum(map(int, text(ticks).split())) <= 20, msgspec.json.encode(await guest.call(init.socket, Status()))
