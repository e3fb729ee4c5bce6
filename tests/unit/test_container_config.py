"""`containers` and `volumes` of a machine config: what is refused, and what PID 1 and the driver are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.domain import containers, validate
from pantala.domain.process import Identity
from pantala.domain.runtime import ContainerRoot, ImageConfig, UnpackedImage, VolumeRoot
from pantala.domain.validate_containers import find_cycle
from pantala.errors import InvalidRequest
from pantala.wire.guest import CheckState, ContainerState, GuestContainer, GuestDependency, GuestHealthcheck
from pantala.wire.machine import ImageRef, MachineConfig

IDENTITY = Identity(
    app="hello",
    machine_id="d8d9510a295118",
    instance_id="01ARZ",
    region="iad",
    image=ImageRef(registry="r.test", repository="hello", tag="t"),
    private_ip="fdaa::2",
    memory_mb=256,
)
SECRETS = {"KEY": "k", "TOKEN": "t"}


def config(*given: dict[str, Any], **more: Any) -> MachineConfig:
    made = [{"name": f"c{index}", "image": "a"} | one for index, one in enumerate(given)]
    return msgspec.convert({"containers": made} | more, MachineConfig)


def image(name: str, **others: UnpackedImage) -> UnpackedImage:
    own = ImageConfig(entrypoint=(f"/{name}",), cmd=("run",), env={"OF": name}, user=f"{name}-user", stop_signal="TERM")
    return UnpackedImage(digest=f"sha256:{name}", layers=(Path("/") / name,), config=own, others=others)


def told(*given: dict[str, Any], **more: Any) -> list[GuestContainer]:
    asked = config(*given, **more)
    validate.validate_config(asked)
    return containers.start_message(image("a", b=image("b")), asked, IDENTITY, SECRETS).containers


def check(**more: Any) -> dict[str, Any]:
    return {"name": "up", "tcp": {"port": 80}} | more


def waits(name: str, condition: str = "started") -> dict[str, Any]:
    return {"depends_on": [{"name": name, "condition": condition}]}


@pytest.mark.parametrize(
    ("given", "more", "field"),
    [
        pytest.param([{"name": "a b"}], {}, "containers[0].name", id="name"),
        pytest.param([{"name": "../x"}], {}, "containers[0].name", id="name that is a path"),
        pytest.param([{"name": "x"}, {"name": "x"}], {}, "containers[1].name", id="name twice"),
        pytest.param([{"image": ""}], {}, "containers[0].image", id="no image"),
        pytest.param([{}] * 17, {}, "containers", id="too many"),
        pytest.param([waits("c9")], {}, "containers[0].depends_on[0].name", id="dependency that is not there"),
        pytest.param([waits("c1", "healthy"), {}], {}, "containers[0].depends_on[0].condition", id="no healthcheck"),
        pytest.param([{"healthchecks": [{"name": "x"}]}], {}, "containers[0].healthchecks[0]", id="no question"),
        pytest.param(
            [{"healthchecks": [check(exec={"command": ["x"]})]}],
            {},
            "containers[0].healthchecks[0]",
            id="two questions",
        ),
        pytest.param(
            [{"healthchecks": [check(), check()]}], {}, "containers[0].healthchecks[1].name", id="check twice"
        ),
        pytest.param(
            [{"healthchecks": [check(tcp={"port": 0})]}], {}, "containers[0].healthchecks[0].port", id="no port"
        ),
        pytest.param(
            [{"healthchecks": [check(interval=0)]}], {}, "containers[0].healthchecks[0].interval", id="no interval"
        ),
        pytest.param(
            [{"healthchecks": [{"name": "x", "http": {"port": 1, "scheme": "https"}}]}],
            {},
            "containers[0].healthchecks[0].http.tls_server_name",
            id="https of nobody",
        ),
        pytest.param(
            [{"healthchecks": [{"name": "x", "http": {"port": 1, "scheme": "https", "tls_server_name": "a b"}}]}],
            {},
            "containers[0].healthchecks[0].http.tls_server_name",
            id="https of no name",
        ),
        pytest.param(
            [{"healthchecks": [{"name": "x", "http": {"port": 1, "tls_skip_verify": True}}]}],
            {},
            "containers[0].healthchecks[0].http.scheme",
            id="TLS without https",
        ),
        pytest.param([{"mounts": [{"name": "v", "path": "/v"}]}], {}, "containers[0].mounts[0].name", id="no volume"),
        pytest.param(
            [{"mounts": [{"name": "v", "path": "/proc/x"}]}],
            {"volumes": [{"name": "v", "image": "a"}]},
            "containers[0].mounts[0].path",
            id="the platform's path",
        ),
        pytest.param([{}], {"volumes": [{"name": "v"}]}, "volumes[0]", id="volume of nothing"),
        pytest.param(
            [{}],
            {"volumes": [{"name": "v", "temp_dir": {"storage_type": "memory", "size_mb": 999}}]},
            "volumes[0].temp_dir.size_mb",
            id="more memory than there is",
        ),
        pytest.param(
            [{}],
            {"volumes": [{"name": n, "temp_dir": {"storage_type": "disk", "size_mb": 5000}} for n in ("v", "w")]},
            "volumes[1].temp_dir.size_mb",
            id="more disk than there is",
        ),
        pytest.param([], {"image": "a", "volumes": [{"name": "v", "image": "a"}]}, "volumes", id="nobody mounts it"),
        pytest.param([{}], {"processes": [{}]}, "processes", id="processes beside"),
        pytest.param([{}], {"init": {"cmd": ["x"]}}, "init.cmd", id="a command of the machine"),
        pytest.param([{"stop": {"signal": "SIGSEGV"}}], {}, "containers[0].stop.signal", id="signal"),
        pytest.param([{"restart": {"policy": "maybe"}}], {}, "containers[0].restart.policy", id="policy"),
        pytest.param([{"files": [{"guest_path": "x"}]}], {}, "containers[0].files[0].guest_path", id="file"),
    ],
)
def test_refusals_name_the_field(given: list[dict[str, Any]], more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate.validate_config(config(*given, **more))
    assert refused.value.field == f"config.{field}"


def test_a_cycle_is_refused_by_its_names() -> None:
    with pytest.raises(InvalidRequest, match="c0 → c2 → c1 → c0"):
        validate.validate_config(config(waits("c2"), waits("c0"), waits("c1"), waits("c0")))
    with pytest.raises(InvalidRequest, match="c0 → c0"):
        validate.validate_config(config(waits("c0")))


def test_an_order_without_a_cycle_has_none() -> None:
    assert find_cycle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


def test_each_runs_as_its_image_says_unless_it_says_otherwise() -> None:
    one, two = told({}, {"image": "b", "cmd": ["x"], "user": "root", "stop": {"signal": "SIGKILL", "timeout": "2s"}})
    assert (one.argv, one.user, one.stop_signal, one.stop_grace_ms) == (["/a", "run"], "a-user", 15, 5000)
    assert (two.argv, two.user, two.stop_signal, two.stop_grace_ms) == (["/b", "x"], "root", 9, 2000)
    assert (one.root, two.env["OF"]) == ("/.pantala/containers/c0", "b")


def test_the_machines_variables_and_files_are_everyones_under_its_own() -> None:
    shared = {"guest_path": "/shared", "raw_value": "YQ=="}
    own = {"guest_path": "/own", "raw_value": "Yg=="}
    one, two = told(
        {"env": {"A": "own"}, "files": [own], "env_from": [{"env_var": "ME", "field_ref": "id"}]},
        {"ignore_app_secrets": True, "secrets": [{"env_var": "MINE", "name": "TOKEN"}]},
        env={"A": "machine"},
        files=[shared],
    )
    assert (one.env["A"], one.env["KEY"], one.env["ME"]) == ("own", "k", "d8d9510a295118")
    assert [file.path for file in one.files] == ["/shared", "/own"]
    assert (two.env["A"], two.env["MINE"], "KEY" in two.env) == ("machine", "t", False)


def test_one_that_others_wait_to_succeed_is_not_started_again_when_it_has() -> None:
    web, job, other = told(waits("c1", "exited_successfully"), {}, {"restart": {"policy": "no", "max_retries": 2}})
    assert (web.restart, job.restart, other.restart, other.max_retries) == ("always", "on-failure", "no", 2)
    assert web.depends_on == [GuestDependency(name="c1", condition="exited_successfully")]


def test_times_of_health_checks_are_seconds() -> None:
    http = {"name": "h", "http": {"port": 80, "headers": [{"name": "A", "values": ["1", "2"]}]}, "unhealthy": "stop"}
    (one,) = told({"healthchecks": [check(interval=3, timeout=1, grace_period=7), http]})
    assert one.healthchecks == [
        GuestHealthcheck(name="up", tcp_port=80, interval_ms=3000, timeout_ms=1000, grace_ms=7000),
        GuestHealthcheck(name="h", http_port=80, http_headers=[("A", "1,2")], stops=True),
    ]


def test_roots_and_volumes_are_of_the_images_named() -> None:
    asked = config(
        {"mounts": [{"name": "v", "path": "/v"}]},
        {"image": "b"},
        volumes=[
            {"name": "v", "temp_dir": {"storage_type": "disk"}},
            {"name": "d", "temp_dir": {"storage_type": "disk", "size_mb": 64}},
            {"name": "m", "temp_dir": {"storage_type": "memory"}},
            {"name": "i", "image": "b"},
        ],
    )
    unpacked = image("a", b=image("b"))
    assert containers.other_images(asked) == ["b"]
    assert containers.roots(asked, unpacked) == (
        ContainerRoot(name="c0", layers=(Path("/a"),), mounts=(("v", "/v"),)),
        ContainerRoot(name="c1", layers=(Path("/b"),)),
    )
    assert containers.volumes(asked, unpacked, 256) == (
        VolumeRoot(name="v"),
        VolumeRoot(name="d", disk_mib=64),
        VolumeRoot(name="m", memory_mib=128),
        VolumeRoot(name="i", layers=(Path("/b"),)),
    )


@pytest.mark.parametrize(
    ("http", "wanted"),
    [
        ({}, ("off", "")),
        ({"scheme": "http"}, ("off", "")),
        ({"scheme": "https", "tls_skip_verify": True}, ("unverified", "")),
        ({"scheme": "https", "tls_server_name": "app.example.com"}, ("verified", "app.example.com")),
        (
            {"scheme": "https", "tls_server_name": "app.example.com", "tls_skip_verify": True},
            ("unverified", "app.example.com"),
        ),
    ],
)
def test_how_a_check_goes_through_tls(http: dict[str, Any], wanted: tuple[str, str]) -> None:
    (container,) = told({"healthchecks": [{"name": "x", "http": {"port": 1, **http}}]})
    (asked,) = container.healthchecks
    assert (asked.tls, asked.tls_server_name) == wanted


def test_the_grace_of_a_machine_is_enough_for_one_after_the_other() -> None:
    assert containers.stop_timeout_s(config({"stop": {"timeout": "7s"}}, {})) == 12.0
    assert containers.stop_timeout_s(config({}, stop_config={"timeout": "3s"})) is None


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        pytest.param(None, {"state": "started"}, ["container_started"], id="start"),
        pytest.param(None, {"state": "stopped", "exit_code": 0}, ["container_exited"], id="over before it was seen"),
        pytest.param(
            {"state": "started"},
            {"state": "started", "restarts": 1, "exit_code": 3},
            ["container_exited", "container_started"],
            id="again, between two looks",
        ),
        pytest.param(
            {"state": "started"},
            {"state": "restarting", "restarts": 1, "exit_code": 3},
            ["container_exited"],
            id="crash",
        ),
        pytest.param(
            {"state": "restarting", "restarts": 1, "exit_code": 3},
            {"state": "started", "restarts": 1, "exit_code": 3},
            ["container_started"],
            id="after the pause",
        ),
        pytest.param({"state": "started"}, {"state": "stopping"}, [], id="asked to end"),
        pytest.param(
            {"state": "started"},
            {"state": "started", "health": "unhealthy", "checks": [CheckState(name="up", kind="", passing=False)]},
            ["container_unhealthy"],
            id="unhealthy",
        ),
        pytest.param({"state": "pending"}, {"state": "stopped"}, [], id="never started"),
    ],
)
def test_changes_are_told_once(before: dict[str, Any] | None, now: dict[str, Any], words: list[str]) -> None:
    was = ContainerState(name="c", **before) if before else None
    assert [word for word, _ in containers.told(was, ContainerState(name="c", **now))] == words
