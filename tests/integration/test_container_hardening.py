"""What a machine sees and may do, asked from inside of it; and that nothing it does reaches the host."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from pantala.drivers.container.cgroups import Cgroups
from pantala.drivers.container.spec import CAPABILITIES, IDS, MASKED_PATHS
from pantala.drivers.protocol import LogRecord, Runtime
from pantala.errors import DriverError
from pantala.kit.clock import SystemClock
from pantala.testing import driver_harness as h
from pantala.testing.poll import until
from pantala.wire.guest import GuestFile, Start

pytestmark = [pytest.mark.anyio, pytest.mark.root]
CAP_BITS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SYS_CHROOT": 18,
}


@pytest.fixture(params=["crun", "runc"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[h.ContainerHarness]:
    with h.container_harness(tmp_path / "host", runtime=Path("/usr") / _folder(request.param) / request.param) as made:
        yield made


def _folder(runtime: str) -> str:
    return "bin" if runtime == "crun" else "sbin"


async def run(
    harness: h.ContainerHarness, script: str, *, user: str = "", env: dict[str, str] | None = None, **start: object
) -> tuple[Runtime, list[str]]:
    """The end of a machine whose app was `script`, and what it printed."""
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    request = Start(
        argv=["sh", "-c", script],
        env={"PATH": "/bin", **(env or {})},
        user=user,
        **start,  # type: ignore[arg-type]  # fields of Start, checked by msgspec
    )
    await driver.start(spec.machine_id, request)
    with anyio.fail_after(20):
        runtime = await driver.wait(spec.machine_id)
    lines = [record.text for record in await driver.logs(spec.machine_id, 0)]
    return runtime, lines


async def status_of(harness: h.ContainerHarness, path: str, user: str = "") -> dict[str, str]:
    _, lines = await run(harness, f"cat {path}", user=user)
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize("path", ["/proc/self/status", "/proc/1/status"])
async def test_root_of_a_machine_has_few_rights(harness: h.ContainerHarness, path: str) -> None:
    status = await status_of(harness, path)
    kept = sum(1 << CAP_BITS[name] for name in CAPABILITIES)
    assert int(status["CapBnd"], 16) == kept
    assert int(status["CapEff"], 16) == kept
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


async def test_another_user_has_none(harness: h.ContainerHarness) -> None:
    status = await status_of(harness, "/proc/self/status", user="app")
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["1000"] * 4
    assert status["Groups"].split() == ["1500"]
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


async def test_ids_are_mapped_to_those_of_the_machine(harness: h.ContainerHarness) -> None:
    _, lines = await run(harness, "cat /proc/self/uid_map /proc/self/gid_map; cat /proc/self/setgroups")
    assert [line.split() for line in lines[:2]] == [["0", str(h.UID_BASE), str(IDS)]] * 2


async def test_the_app_is_one_of_few_processes_and_sees_no_other(harness: h.ContainerHarness) -> None:
    _, lines = await run(harness, "echo $$; ls -d /proc/[0-9]* | wc -l; cat /proc/1/cmdline; hostname")
    assert int(lines[0]) < 20  # the second one, after the runtime's own threads
    assert int(lines[1]) <= 5
    assert lines[2].startswith("/.pantala/init")


async def test_no_attempt_to_get_out_gets_through(harness: h.ContainerHarness, tmp_path: Path) -> None:
    """The suite that hosts run themselves; here without a network, so what is reached by one is not applicable."""
    canary = tmp_path / "canary"
    canary.write_text("secret")
    aims = {"canary": str(canary), "secret": "secret", "image_file": "/www/index.html", "pid": os.getpid()}
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    await driver.start(spec.machine_id, Start(argv=["/proc/self/exe", "escape", json.dumps(aims)], env={}))
    with anyio.fail_after(30):
        runtime = await driver.wait(spec.machine_id)
    said = [json.loads(record.text) for record in await driver.logs(spec.machine_id, 0)]
    assert runtime.exit is not None
    assert runtime.exit.exit_code == 0
    assert len(said) > 100
    assert [one for one in said if one["outcome"] in ("through", "unclear")] == []
    held = {one["name"] for one in said if one["outcome"] == "held"}
    assert {"mount-tmpfs", "unshare-user", "overwrite-init", "set-user-id", "file-of-host"} <= held
    assert [one["name"] for one in said if one["outcome"] == "host_sees"] == ["write-image-layer"]
    page = harness.base / "layer/www/index.html"
    assert (page.read_text(), page.stat().st_uid, page.stat().st_mode & 0o7000) == ("hello from a machine\n", 0, 0)


async def test_other_calls_stay_refused_for_root(harness: h.ContainerHarness) -> None:
    attempts = {
        "nsenter -t 1 -m true": "",
        "echo '{}' > /proc/1/fd/5": "Permission denied",
        "kill -9 1; kill -0 1 && false": "",
        "touch /.pantala/init": "Read-only file system",
        "chroot / mount -t proc none /tmp": "permission denied",
    }
    for command, refusal in attempts.items():
        _, lines = await run(harness, f"if {command}; then echo allowed; else echo refused; fi")
        expected = refusal or "refused"
        assert any(expected in line for line in lines), (command, lines)


async def test_masked_paths_show_nothing(harness: h.ContainerHarness) -> None:
    script = "; ".join(
        f"echo {path} $(cat {path} 2>/dev/null | wc -c) $(ls -A {path} | wc -l)" for path in MASKED_PATHS
    )
    _, lines = await run(harness, script)
    shown = {line.split()[0]: (int(line.split()[1]), int(line.split()[2])) for line in lines if len(line.split()) == 3}
    for path in MASKED_PATHS:
        size, entries = shown[path]
        assert size == 0, path
        assert entries <= 1, path  # a masked file lists itself


async def test_a_write_to_the_image_stays_in_the_machine(harness: h.ContainerHarness) -> None:
    page = harness.base / "layer/www/index.html"
    before, inode = page.read_text(), page.stat().st_ino
    _, lines = await run(
        harness, "echo changed > /www/index.html; rm /etc/group; cat /www/index.html; ls -n / | head -3"
    )
    assert lines[0] == "changed"
    assert (page.read_text(), page.stat().st_ino, page.stat().st_uid) == (before, inode, 0)
    assert (harness.base / "layer/etc/group").exists()


async def test_files_of_the_image_belong_to_root_of_the_machine(harness: h.ContainerHarness) -> None:
    _, lines = await run(
        harness, "stat -c '%u:%g' /www/index.html; chown 1000:1000 /www/index.html && stat -c %u /www/index.html"
    )
    assert lines == ["0:0", "1000"]


async def test_the_writable_layer_has_its_size(harness: h.ContainerHarness) -> None:
    _, lines = await run(
        harness, "dd if=/dev/zero of=/fill bs=1M count=200 2>&1; echo then; rm /fill && echo ok > /x && cat /x"
    )
    assert any("No space left" in line for line in lines)
    assert lines[-1] == "ok"
    image = next(harness.base.glob("state/machines/*/disk.img"))
    assert image.stat().st_size == 64 * 1024 * 1024


async def test_the_number_of_processes_is_limited(harness: h.ContainerHarness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    script = "i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; echo done; sleep 1000"
    await driver.start(spec.machine_id, Start(argv=["sh", "-c", script], env={"PATH": "/bin"}))

    async def said() -> list[LogRecord]:
        return await driver.logs(spec.machine_id, 0)

    await until(said, lambda lines: any("fork" in line.text for line in lines), within_s=20)
    cgroups = Cgroups(root=harness.cgroup_root, clock=SystemClock())
    assert len(cgroups.pids(spec.machine_id)) <= spec.limits.pids
    await driver.destroy(spec.machine_id)
    assert harness.leftovers(spec.machine_id) == []


async def test_names_and_resolver_are_given(harness: h.ContainerHarness) -> None:
    _, lines = await run(harness, "cat /etc/hostname; hostname; cat /etc/resolv.conf; tail -1 /etc/hosts")
    assert lines[0] == lines[1]
    assert lines[2] == "nameserver fdaa::3"
    assert lines[3] == f"172.19.0.2 {lines[0]}"


async def test_environment_directory_and_files_are_those_asked_for(harness: h.ContainerHarness) -> None:
    _, lines = await run(
        harness,
        "pwd; env | sort | grep -v -e ^SHLVL -e ^PWD -e ^OLDPWD;"
        " cat /srv/conf/secret; echo; stat -c %a /srv/conf/secret; stat -c %U .",
        user="app",
        env={"GREETING": "hello world"},
        cwd="/made/for/it",
        files=[GuestFile(path="/srv/conf/secret", content_base64="aHVudGVyMg==", mode=0o444)],
    )
    assert lines == ["/made/for/it", "GREETING=hello world", "HOME=/www", "PATH=/bin", "hunter2", "444", "app"]


async def test_no_descriptor_of_init_reaches_the_app(harness: h.ContainerHarness) -> None:
    _, lines = await run(harness, "ls /proc/self/fd; readlink /proc/self/fd/0")
    assert lines[-1] == "/dev/null"
    assert set(lines[:-1]) <= {"0", "1", "2", "3"}  # 3 is the listing itself


async def test_output_of_what_outlives_the_app_is_kept(harness: h.ContainerHarness) -> None:
    """The app ends at once; the last, unfinished line of a child is still in the ring."""
    runtime, lines = await run(harness, "printf 'no newline'; exit 4")
    assert runtime.exit is not None
    assert runtime.exit.exit_code == 4
    assert lines == ["no newline"]


@pytest.mark.parametrize(
    ("start", "code", "sentence"),
    [
        pytest.param(Start(argv=["nothing"], env={}), 127, "not found in PATH", id="not in PATH"),
        pytest.param(Start(argv=["/www/index.html"], env={}), 126, "x permission", id="not executable"),
        pytest.param(Start(argv=["/www"], env={}), 126, "is a directory", id="a directory"),
        pytest.param(Start(argv=["sh"], env={}, user="nobody-here"), 126, "no user", id="unknown user"),
        pytest.param(Start(argv=["sh"], env={}, cwd="/www/index.html"), 126, "is a file", id="cwd is a file"),
    ],
)
async def test_a_start_that_cannot_be_says_why(
    harness: h.ContainerHarness, start: Start, code: int, sentence: str
) -> None:
    driver, spec = harness.driver(), harness.spec()
    await driver.prepare(spec)
    with pytest.raises(DriverError, match=sentence) as refused:
        await driver.start(spec.machine_id, start)
    assert refused.value.guest_fault
    after = await driver.wait(spec.machine_id)
    assert after.exit is not None
    assert after.exit.exit_code == code
    logs = await driver.logs(spec.machine_id, 0)
    assert sentence in logs[-1].text
