"""What runs beside the app in one machine: from config and secrets to what PID 1 is told."""

from __future__ import annotations

from typing import Any

import pytest

from pantala.domain import process, validate
from pantala.domain.runtime import ImageConfig
from pantala.errors import InvalidRequest
from pantala.wire.guest import GuestProcess
from pantala.wire.machine import EnvFrom, ImageRef, MachineConfig, Process, SecretRef

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("run",), env={"PATH": "/bin", "A": "image"}, user="app", cwd="/srv")
IDENTITY = process.Identity(
    app="hello",
    machine_id="d8d9510a295118",
    instance_id="01ARZ",
    region="iad",
    image=ImageRef(registry="r.test", repository="hello", tag="t"),
    private_ip="fdaa::2",
    memory_mb=256,
)
SECRETS = {"KEY": "k", "TOKEN": "t"}


def made(**asked: Any) -> GuestProcess:
    config = MachineConfig(image="r.test/hello:t", env={"A": "config"}, processes=[Process(**asked)])
    validate.validate_config(config)
    (one,) = process.start_message(IMAGE, config, IDENTITY, SECRETS).processes
    return one


def test_it_is_run_as_the_image_says_unless_it_says_otherwise() -> None:
    assert (made().argv, made().user, made().cwd) == (["/entry", "run"], "app", "/srv")
    assert made(cmd=["work"], user="root").argv == ["/entry", "work"]
    assert made(entrypoint=["/worker"]).argv == ["/worker"]
    assert made(exec=["/only"], cmd=["x"]).argv == ["/only"]


def test_it_has_the_environment_of_the_app_and_its_own() -> None:
    env = made(env={"A": "process"}, env_from=[EnvFrom(env_var="ME", field_ref="id")]).env
    assert (env["A"], env["KEY"], env["ME"], env["FLY_REGION"]) == ("process", "k", "d8d9510a295118", "iad")


def test_it_may_ignore_the_secrets_of_the_app_but_those_it_names() -> None:
    env = made(ignore_app_secrets=True, secrets=[SecretRef(env_var="MY_TOKEN", name="TOKEN")]).env
    assert env["MY_TOKEN"] == "t"
    assert "KEY" not in env
    assert "TOKEN" not in env
    with pytest.raises(InvalidRequest, match=r"config\.processes\[0\]\.secrets\[0\]\.name"):
        made(secrets=[SecretRef(env_var="GONE")])


@pytest.mark.parametrize("field_ref", ["id", "version", "app_name", "private_ip", "region", "image"])
def test_every_field_can_be_a_variable(field_ref: Any) -> None:
    assert made(env_from=[EnvFrom(env_var="X", field_ref=field_ref)]).env["X"]


def test_names_of_variables_are_checked_and_the_number_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match=r"config\.processes\[0\]\.env"):
        made(env={"A=B": "x"})
    many = MachineConfig(image="r.test/hello:t", processes=[Process()] * 17)
    with pytest.raises(InvalidRequest, match=r"config\.processes"):
        validate.validate_config(many)


def test_the_names_of_the_machine_in_its_hosts_file() -> None:
    text = process.hosts_file("d8d9510a295118", ip4="172.19.0.2", private_ip="fdaa::2", host="web")
    names = {name: line.split()[0] for line in text.splitlines() for name in line.split()[1:]}
    assert names["fly-local-6pn"] == names["d8d9510a295118"] == names["web"] == "fdaa::2"
    assert names["fly-global-services"] == "172.19.0.2"
