"""The runtime specification and the limits of a container machine, as values."""

from __future__ import annotations

import platform
import re
from typing import Any

import pytest

from pantala.domain.runtime import Limits
from pantala.drivers.container import seccomp, spec
from pantala.drivers.container.cgroups import find_hierarchies, settings_v1, settings_v2
from pantala.drivers.container.disk import mke2fs_command
from pantala.drivers.container.driver import runtime_command
from pantala.drivers.container.isolation import describe


def build(*, netns: bool = True, userns: bool = True) -> dict[str, Any]:
    return spec.build(
        machine_id="m1", hostname="h", uid_base=70_000, joins_netns=netns, joins_userns=userns, cgroup_mount=False
    )


def test_every_kind_of_namespace_is_the_machines_own() -> None:
    namespaces = {entry["type"]: entry.get("path") for entry in build()["linux"]["namespaces"]}
    assert set(namespaces) == {"user", "network", "mount", "pid", "ipc", "uts", "cgroup"}
    assert namespaces["user"] == "/tmp/ns/user"
    assert namespaces["network"] == "/tmp/ns/net"


def test_what_is_told_of_the_isolation_is_what_machines_are_made_of() -> None:
    told = describe(70_000)
    made = build()
    assert told.driver == "container"
    assert told.capabilities == made["process"]["capabilities"]["bounding"]
    assert told.no_new_privileges is True
    assert told.user_mapping == "0-65535 -> 70000-135535"
    assert all(entry["type"] in told.boundary for entry in made["linux"]["namespaces"])
    assert re.fullmatch("sha256:[0-9a-f]{64}", told.seccomp)
    assert platform.release() in told.kernel


def test_namespaces_that_nobody_made_are_left_to_the_runtime() -> None:
    namespaces = {entry["type"]: entry.get("path") for entry in build(netns=False, userns=False)["linux"]["namespaces"]}
    assert namespaces["user"] is None
    assert namespaces["network"] is None


def test_sysfs_is_mounted_only_by_the_owner_of_the_network() -> None:
    def sys(document: dict[str, Any]) -> str:
        return next(mount["type"] for mount in document["mounts"] if mount["destination"] == "/sys")

    assert sys(build()) == "sysfs"
    assert sys(build(userns=False)) == "bind"
    assert sys(build(netns=False, userns=False)) == "sysfs"


def test_no_limit_of_resources_is_in_the_specification() -> None:
    document = build()
    assert "rlimits" not in document["process"]
    assert "resources" not in document["linux"]


@pytest.mark.parametrize(
    "name", ["mount", "unshare", "setns", "bpf", "keyctl", "add_key", "open_by_handle_at", "kexec_load"]
)
def test_dangerous_calls_are_not_allowed(name: str) -> None:
    assert name not in seccomp.ALLOWED
    assert name in seccomp.REFUSED


def test_no_call_is_both_allowed_and_refused() -> None:
    assert set(seccomp.ALLOWED) & set(seccomp.REFUSED) == set()
    assert len(set(seccomp.ALLOWED)) == len(seccomp.ALLOWED)


def test_clone_may_not_make_namespaces() -> None:
    rules = [rule for rule in seccomp.profile("x86_64")["syscalls"] if "clone" in rule["names"]]
    assert [rule["args"] for rule in rules] == [
        [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    ]
    namespaces = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
    assert sum(namespaces) == seccomp.CLONE_NEW_ANY
    assert "clone3" not in seccomp.ALLOWED


def test_a_processor_without_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="mips"):
        seccomp.profile("mips")


def test_limits_of_version_1() -> None:
    limits = Limits(cpus=2, shared_cpu=True, memory_mib=256, pids=100)
    written = {name: value for _, name, value in settings_v1(limits)}
    assert written["cpu.cfs_quota_us"] == "160000"
    assert written["cpu.cfs_period_us"] == "80000"
    assert written["memory.limit_in_bytes"] == str(260 * 1024 * 1024)
    assert written["pids.max"] == "100"


def test_limits_of_version_2() -> None:
    written = dict(settings_v2(Limits(cpus=2, shared_cpu=True, memory_mib=256, pids=100)))
    assert written["cpu.max"] == "160000 80000"
    assert written["memory.max"] == str(260 * 1024 * 1024)
    assert written["memory.swap.max"] == "0"


def test_controllers_are_found_in_version_1_mounts() -> None:
    text = (
        "40 39 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "41 39 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
        "42 39 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
        "43 39 0:33 / /nowhere/unified rw - cgroup2 cgroup2 rw\n"
    )
    found = find_hierarchies(text)
    assert {name: str(path) for name, path in found.v1.items()} == {
        "memory": "/sys/fs/cgroup/memory",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
    }
    assert found.unified is None


def test_version_2_is_taken_when_it_has_the_controllers(tmp_path: Any) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    found = find_hierarchies(f"43 39 0:33 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert found.unified == tmp_path


def test_crun_keeps_away_from_cgroups(tmp_path: Any) -> None:
    assert runtime_command(tmp_path / "crun") == [str(tmp_path / "crun"), "--cgroup-manager=disabled"]
    assert runtime_command(tmp_path / "runc") == [str(tmp_path / "runc")]


def test_the_disk_command_ends_with_its_size(tmp_path: Any) -> None:
    assert mke2fs_command(tmp_path / "d", 64)[-2:] == [str(tmp_path / "d"), "64m"]
