"""What a host is started with, as pure functions write it: the bus, the builds' namespace, units, tuned settings."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.agent.settings import AgentSettings
from pantala.box.places import tuned
from pantala.errors import InvalidRequest
from pantala.host import bus, systemd
from pantala.host.builds import Builds
from pantala.host.join import decode_token
from pantala.host.place import Place
from pantala.host.settings import Tuning, changed, promised
from pantala.host.supervisor import Process
from pantala.wire.feed import MeshSettings
from pantala.wire.hosts import BusAccess, Joined, TokenText

PLACE = Place(state="/state", run="/run", logs="/logs", address="192.0.2.4")
HUBS = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


def joined(*, hubs: list[str], hub: bool, accounts: dict[str, str] | None = None) -> Joined:
    access = BusAccess(
        user_jwt="user",
        operator_jwt="operator",
        accounts=accounts or {"ASYS": "one", "AHOSTS": "two"},
        system_account="ASYS",
        hubs=[f"{address}:7422" for address in hubs],
        routes=[f"{address}:6222" for address in hubs],
        hub=hub,
    )
    return Joined(
        node="fra-1", region="fra", zone="", epoch=1, certificate_pem="", authority_pem="", control_key="",
        edge_key_sealed="", bus=access, registries={}, api_backend="", app_domain="", platform_domain="",
        edge_addresses=[], closed_addresses=[], members=[],
    )  # fmt: skip


def configuration(given: Joined) -> dict[str, Any]:
    return json.loads(bus.configuration(PLACE, given))


def test_a_hub_routes_to_the_other_hubs_and_takes_leaves() -> None:
    made = configuration(joined(hubs=[*HUBS[:2], PLACE.address], hub=True))
    assert made["cluster"]["listen"] == "192.0.2.4:6222"
    assert made["cluster"]["routes"] == ["nats://192.0.2.1:6222", "nats://192.0.2.2:6222"]
    assert made["leafnodes"]["listen"] == "192.0.2.4:7422"
    assert made["cluster"]["tls"]["verify"] is made["leafnodes"]["tls"]["verify"] is True


def test_another_host_is_a_leaf_of_all_hubs_with_its_own_user() -> None:
    made = configuration(joined(hubs=HUBS, hub=False))
    (remote,) = made["leafnodes"]["remotes"]
    assert remote["urls"] == [f"tls://{address}:7422" for address in HUBS]
    assert (remote["credentials"], remote["account"]) == ("/state/identity/bus.creds", "AHOSTS")
    assert "cluster" not in made


def test_every_host_checks_the_users_of_its_own_bus() -> None:
    for hub in (True, False):
        made = configuration(joined(hubs=[*HUBS[:2], PLACE.address] if hub else HUBS, hub=hub))
        assert made["listen"] == "192.0.2.4:4222"
        assert (made["operator"], made["resolver_preload"]) == ("operator", {"ASYS": "one", "AHOSTS": "two"})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (joined(hubs=HUBS, hub=True), "bus.routes"),
        (joined(hubs=[], hub=False), "bus.hubs"),
        (joined(hubs=HUBS, hub=False, accounts={"ASYS": "one"}), "bus.accounts"),
    ],
    ids=["hub without its address", "leaf without hubs", "no account for hosts"],
)
def test_what_control_cannot_mean_is_refused_by_name(given: Joined, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        configuration(given)
    assert refused.value.field == field


# -- tokens ----------------------------------------------------------------------------------------------------------


def token(**changes: str) -> str:
    text = {"api": "https://api.example.com", "address": "192.0.2.1:443", "authority": "ab", "secret": "s"} | changes
    return "pjt_" + base64.urlsafe_b64encode(json.dumps(text).encode()).rstrip(b"=").decode()


def test_a_token_says_where_the_api_is_and_who_signs_for_it() -> None:
    assert decode_token(f" {token()}\n") == TokenText(
        api="https://api.example.com", address="192.0.2.1:443", authority="ab", secret="s"
    )


@pytest.mark.parametrize(
    "text",
    ["", "pjt_", "pjt_####", "fo1_abc", token(api="ftp://x"), token(address="192.0.2.1"), token(authority="")],
    ids=["empty", "only the prefix", "no base64", "another token", "no HTTP", "no port", "TLS without authority"],
)
def test_what_is_no_join_token_is_refused_before_anything_is_asked(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_token(text)
    assert refused.value.field == "TOKEN"


# -- tuned settings --------------------------------------------------------------------------------------------------


def test_settings_are_reached_by_part_and_field() -> None:
    made = tuned(Tuning(), {"agent.drain_s": "2.5", "proxy.queue_per_app_max": "7", "server.id": '"other"'})
    assert (made.agent, made.proxy, made.server) == ({"drain_s": 2.5}, {"queue_per_app_max": 7}, {"id": "other"})


@pytest.mark.parametrize("name", ["agent", "agent.", "driver.x", "drain_s"])
def test_a_part_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="--settings"):
        tuned(Tuning(), {name: "1"})


@pytest.mark.parametrize(
    "fields", [{"no_such": 1}, {"ping_interval_ms": "often"}], ids=["no such field", "another type"]
)
def test_a_field_that_is_not_there_or_of_another_type_is_refused(fields: dict[str, Any]) -> None:
    mesh = MeshSettings(listen="192.0.2.1:4443", certificate="c", key="k", authority="a")
    with pytest.raises(InvalidRequest, match="--settings"):
        changed(mesh, fields)
    assert changed(mesh, {"ping_interval_ms": 9}) == msgspec.structs.replace(mesh, ping_interval_ms=9)


def test_what_a_host_promises_is_the_operator_s_word_else_what_it_has() -> None:
    said = promised(16, 65_536)
    assert said == {"cpus": 16, "memory_mib": 65_536}
    assert promised(None, None) == {}
    assert said.keys() <= set(AgentSettings.__struct_fields__)


# -- builds ----------------------------------------------------------------------------------------------------------


def test_builds_reach_registry_and_api_of_this_host_and_nothing_else_of_the_platform() -> None:
    made = Builds(netns="builds", open=["192.0.2.4:4280", "192.0.2.4:5000"], closed=["198.51.100.0/24"])
    lines = [line.strip() for line in made.rules_inside().splitlines()]
    accepted, rejected = (
        lines.index("ip daddr 192.0.2.4 tcp dport 5000 accept"),
        lines.index("ip daddr { 169.254.0.0/16, 172.31.255.1, 192.0.2.4, 198.51.100.0/24 } reject"),
    )
    assert "ip daddr 192.0.2.4 tcp dport 4280 accept" in lines[:rejected]
    assert accepted < rejected


# -- units of systemd ------------------------------------------------------------------------------------------------


def process(name: str, **more: Any) -> Process:
    values: dict[str, Any] = {"command": ["/bin/x", "a b"], "netns": "", "env": {"PATH": "/bin"}, "log": ""}
    return Process(name=name, **(values | more))


def test_a_unit_leaves_machines_alone_and_starts_after_what_it_needs() -> None:
    files = systemd.units([process("nats"), process("agent", after=["nats"])], before_builds=["setup"])
    lines = files["pantala-agent.service"].splitlines()
    assert 'ExecStart="/bin/x" "a b"' in lines
    assert {"KillMode=process", "Restart=always", "Slice=pantala.slice", 'Environment="PATH=/bin"'} <= set(lines)
    assert "After=network-online.target pantala-nats.service" in lines
    assert not any(line.startswith("ExecStartPre") for line in lines)
    assert "pantala-machines.slice" in files


def test_the_builder_runs_in_its_namespace_which_is_made_before_it() -> None:
    made = systemd.units([process("buildkitd", netns="builds")], before_builds=["setup", '{"a": 1}'])
    lines = made["pantala-buildkitd.service"].splitlines()
    assert 'ExecStartPre="setup" "{\\"a\\": 1}"' in lines
    assert 'ExecStart="/usr/bin/nsenter" "--net=/run/netns/builds" "--" "/bin/x" "a b"' in lines


def test_renewed_files_reload_the_service() -> None:
    files = systemd.units([process("nats", reload_on=["/id/node.pem", "/id/bus.creds"])], before_builds=[])
    assert "PathChanged=/id/node.pem\nPathChanged=/id/bus.creds\n" in files["pantala-nats-renew.path"]
    assert "try-reload-or-restart pantala-nats.service" in files["pantala-nats-renew.service"]


def test_words_mean_to_systemd_what_they_mean_to_the_process() -> None:
    made = systemd.units([process("x", command=["50%", "$HOME", 'say "so"', "back\\slash"])], before_builds=[])
    assert 'ExecStart="50%%" "$$HOME" "say \\"so\\"" "back\\\\slash"' in made["pantala-x.service"].splitlines()


def test_a_place_keeps_keys_apart_from_what_control_gave() -> None:
    assert PLACE.key("node.key") == Path("/state/keys/node.key")
    assert PLACE.identity("node.pem") == Path("/state/identity/node.pem")
