"""The pure rules of a machine's life: table, judge, restart policy, process, sizes, validation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.domain import guests, process, restart, signals, validate
from pantala.domain.machine import TERMINAL, TRANSITIONS, Accepted, Ignored, Judgement, Refused, State, Verb, judge
from pantala.domain.runtime import ImageConfig
from pantala.errors import InvalidRequest, NotFound, WrongState
from pantala.testing.agent import config, service
from pantala.wire.machine import (
    Check,
    Concurrency,
    File,
    Guest,
    ImageRef,
    Init,
    MachineConfig,
    Mount,
    Port,
    Restart,
    RootFS,
    Static,
    StopConfig,
)

REACHED = frozenset(TRANSITIONS)
IDENTITY = process.Identity(
    app="hello",
    machine_id="d8d9510a295118",
    instance_id="01ARZ",
    region="iad",
    image=ImageRef(registry="r.test", repository="hello", tag="t"),
    private_ip="fdaa::2",
    memory_mb=256,
)


# -- table ---------------------------------------------------------------------------------------------------------


def test_every_state_of_the_table_is_reached_from_created_and_can_be_destroyed() -> None:
    seen, todo = {State.CREATED}, [State.CREATED]
    while todo:
        for following in TRANSITIONS[todo.pop()] - seen:
            seen.add(following)
            todo.append(following)
    assert seen == REACHED
    for state in REACHED - TERMINAL - {State.DESTROYING}:
        assert State.DESTROYING in TRANSITIONS[state]


# -- judge ---------------------------------------------------------------------------------------------------------


def kind(judgement: Judgement) -> str:
    return type(judgement).__name__.lower()


@pytest.mark.parametrize(
    ("state", "queued", "verb", "force", "wanted"),
    [
        (State.STARTED, (), Verb.START, False, "ignored"),
        (State.STARTED, (Verb.STOP,), Verb.START, False, "accepted"),
        (State.STARTED, (), Verb.STOP, False, "accepted"),
        (State.STARTED, (Verb.STOP,), Verb.STOP, False, "ignored"),
        (State.STOPPED, (Verb.START,), Verb.START, False, "ignored"),
        (State.STOPPED, (Verb.START,), Verb.STOP, False, "accepted"),
        (State.STOPPED, (), Verb.STOP, False, "ignored"),
        (State.STOPPED, (), Verb.RESTART, False, "refused"),
        (State.STARTED, (Verb.RESTART,), Verb.RESTART, False, "ignored"),
        (State.STARTED, (), Verb.DESTROY, False, "refused"),
        (State.STARTED, (), Verb.DESTROY, True, "accepted"),
        (State.STOPPED, (), Verb.DESTROY, False, "accepted"),
        (State.STOPPED, (Verb.DESTROY,), Verb.DESTROY, False, "ignored"),
        (State.STOPPED, (Verb.DESTROY,), Verb.START, False, "refused"),
        (State.DESTROYED, (), Verb.START, False, "refused"),
        (State.DESTROYED, (), Verb.DESTROY, False, "ignored"),
        (State.FAILED, (), Verb.START, False, "accepted"),
        (State.STOPPING, (), Verb.START, False, "accepted"),
        (State.UPDATING, (), Verb.UPDATE, False, "accepted"),
        (State.STARTED, (), Verb.SUSPEND, False, "accepted"),
        (State.SUSPENDED, (), Verb.SUSPEND, False, "ignored"),
        (State.SUSPENDED, (Verb.START,), Verb.SUSPEND, False, "accepted"),
        (State.STOPPED, (), Verb.SUSPEND, False, "refused"),
        (State.SUSPENDED, (), Verb.START, False, "accepted"),
        (State.SUSPENDED, (), Verb.STOP, False, "accepted"),
        (State.SUSPENDED, (), Verb.UPDATE, False, "accepted"),
        (State.SUSPENDED, (), Verb.DESTROY, False, "accepted"),
        (State.SUSPENDED, (), Verb.RESTART, False, "refused"),
    ],
)
def test_judge(state: State, queued: tuple[Verb, ...], verb: Verb, force: bool, wanted: str) -> None:
    assert kind(judge(state, queued, verb, force=force)) == wanted


@given(
    st.sampled_from(sorted(REACHED)),
    st.lists(st.sampled_from(sorted(Verb)), max_size=4),
    st.sampled_from(sorted(Verb)),
    st.booleans(),
)
def test_the_judge_is_consistent(state: State, queued: list[Verb], verb: Verb, force: bool) -> None:
    before = judge(state, tuple(queued), verb, force=force)
    match before:
        case Refused():
            assert before.reason
            assert before.error in (NotFound, WrongState)
        case Accepted() if verb is not Verb.UPDATE:
            assert isinstance(judge(state, (*queued, verb), verb, force=force), Ignored), "a repetition is ignored"
        case _:
            pass


# -- restart -------------------------------------------------------------------------------------------------------


def decide(
    policy: str | None, code: int, restarts_ms: list[int] | None = None, *, requested: bool = False, now_ms: int = 10**6
) -> restart.Again | restart.Stay:
    return restart.after_exit(
        Restart(policy=policy), exit_code=code, requested=requested, restarts_ms=restarts_ms or [], now_ms=now_ms
    )


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [("no", 1, False), ("always", 0, True), ("on-failure", 1, True), ("on-failure", 0, False), (None, 1, True)],
)
def test_policy(policy: str | None, code: int, again: bool) -> None:
    assert isinstance(decide(policy, code), restart.Again) is again


def test_a_requested_stop_is_never_restarted() -> None:
    assert isinstance(decide("always", 1, requested=True), restart.Stay)


def test_on_failure_gives_up_after_ten_within_five_minutes_and_the_first_is_quick() -> None:
    now_ms, restarts = 0, []
    while isinstance(verdict := decide("on-failure", 1, restarts, now_ms=now_ms), restart.Again):
        if not restarts:
            assert verdict.delay_s <= 1
        restarts.append(now_ms)
        now_ms += int(verdict.delay_s * 1000) + 100
    assert len(restarts) == 10
    assert now_ms < 300_000
    assert "after 10 restarts" in verdict.reason
    assert isinstance(decide("on-failure", 1, restarts, now_ms=now_ms + 300_000), restart.Again)


# -- process -------------------------------------------------------------------------------------------------------

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("run",), env={"A": "image", "PATH": "/bin"}, user="app", cwd="/srv")


@pytest.mark.parametrize(
    ("init", "wanted"),
    [
        (None, ["/entry", "run"]),
        (Init(cmd=["other"]), ["/entry", "other"]),
        (Init(entrypoint=["/mine"]), ["/mine"]),
        (Init(entrypoint=["/mine"], cmd=["x"]), ["/mine", "x"]),
        (Init(exec=["/only", "this"], cmd=["x"]), ["/only", "this"]),
        (Init(cmd=[]), ["/entry"]),
    ],
)
def test_argv(init: Init | None, wanted: list[str]) -> None:
    assert process.argv(IMAGE, init) == wanted


def test_an_image_without_a_command_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"config\.init\.cmd"):
        process.argv(ImageConfig(), None)


def test_environment_precedence() -> None:
    env = process.environment(
        IMAGE,
        MachineConfig(env={"A": "config", "B": "config", "FLY_REGION": "lies", "PRIMARY_REGION": "lhr"}),
        IDENTITY,
        {"B": "secret"},
    )
    assert (env["A"], env["B"], env["FLY_REGION"], env["PRIMARY_REGION"]) == ("config", "secret", "iad", "lhr")
    assert (env["FLY_ALLOC_ID"], env["FLY_PROCESS_GROUP"], env["PATH"]) == ("d8d9510a295118", "app", "/bin")
    assert env["FLY_IMAGE_REF"] == "r.test/hello:t"


def test_files_come_from_the_config_or_a_secret() -> None:
    asked = MachineConfig(files=[File(guest_path="/a", raw_value="eA=="), File(guest_path="/b", secret_name="S")])
    made = process.start_message(IMAGE, asked, IDENTITY, {"S": "eQ=="})
    assert [(f.path, f.content_base64) for f in made.files] == [("/a", "eA=="), ("/b", "eQ==")]
    with pytest.raises(InvalidRequest, match=r"config\.files\[1\]\.secret_name"):
        process.start_message(IMAGE, asked, IDENTITY, {})


# -- sizes, signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guest", "wanted"),
    [
        (None, ("shared", 1, 256)),
        (Guest(cpus=2), ("shared", 2, 512)),
        (Guest(cpu_kind="performance"), ("performance", 1, 2048)),
        (Guest(memory_mb=1024), ("shared", 1, 1024)),
    ],
)
def test_sizes(guest: Guest | None, wanted: tuple[str, int, int]) -> None:
    size = guests.resolve(MachineConfig(guest=guest))
    assert (size.cpu_kind, size.cpus, size.memory_mb) == wanted


def test_every_preset_has_the_least_memory_of_its_kind() -> None:
    for name in guests.PRESETS:
        size = guests.resolve(MachineConfig(size=name))
        assert size.memory_mb == (256 if name.startswith("shared") else 2048) * size.cpus


def test_the_table_of_sizes_is_that_of_the_original() -> None:
    table = {name: (*guests.memory_bounds(*guests.PRESETS[name]), guests.PRESETS[name][1]) for name in guests.PRESETS}
    assert table == {
        "shared-cpu-1x": (256, 2048, 1),
        "shared-cpu-2x": (512, 4096, 2),
        "shared-cpu-4x": (1024, 8192, 4),
        "shared-cpu-6x": (1536, 12288, 6),
        "shared-cpu-8x": (2048, 16384, 8),
        "performance-1x": (2048, 8192, 1),
        "performance-2x": (4096, 16384, 2),
        "performance-4x": (8192, 32768, 4),
        "performance-6x": (12288, 49152, 6),
        "performance-8x": (16384, 65536, 8),
        "performance-10x": (20480, 81920, 10),
        "performance-12x": (24576, 98304, 12),
        "performance-14x": (28672, 114688, 14),
        "performance-16x": (32768, 131072, 16),
    }


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"size": "huge"},
            "invalid machine preset requested, 'huge', expected to start with 'shared' or 'performance'",
        ),
        (
            {"size": "shared-cpu-3x"},
            "'shared-cpu-3x' is an invalid machine size, choose one of: "
            "[shared-cpu-1x shared-cpu-2x shared-cpu-4x shared-cpu-6x shared-cpu-8x]",
        ),
        ({"guest": Guest(cpu_kind="quantum")}, "The CPU kind given: quantum, is not valid"),
        ({"guest": Guest(cpus=3)}, "For the CPU kind shared, 3 CPUs is not valid"),
        ({"guest": Guest(memory_mb=300)}, "300MiB of memory is not valid"),
        ({"guest": Guest(cpus=2, memory_mb=256)}, "For shared VMs with 2 CPUs, 256MiB of memory is too low"),
        (
            {"guest": Guest(cpu_kind="performance", memory_mb=16384)},
            "For performance VMs with 1 CPUs, 16384MiB of memory is too high",
        ),
    ],
)
def test_refused_sizes_are_told_in_the_words_of_a_stock_client(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        guests.resolve(MachineConfig(**asked))
    assert sentence in caught.value.message


def test_limits_follow_the_size() -> None:
    asked = MachineConfig(
        guest=Guest(cpus=4, memory_mb=8192), init=Init(swap_size_mb=512), rootfs=RootFS(persist="never", size_gb=2)
    )
    limits = guests.resolve(asked).limits()
    assert (limits.cpus, limits.shared_cpu, limits.memory_mib, limits.swap_mib, limits.disk_mib) == (
        4, True, 8192, 512, 2048,
    )  # fmt: skip
    assert guests.resolve(MachineConfig()).limits().disk_mib == 8 * 1024
    assert guests.resolve(asked).cpu_share == 0.25
    assert guests.resolve(MachineConfig(size="performance-2x")).cpu_share == 2


@pytest.mark.parametrize("name", ["SIGTERM", "term", "15"])
def test_signal_names(name: str) -> None:
    assert signals.number(name, field="signal") == 15


def test_stop_defaults() -> None:
    assert signals.stop_signal(None, None, "") == 2
    assert signals.stop_signal(None, None, "SIGWINCH") == 2
    assert signals.stop_signal(StopConfig(signal="SIGTERM"), None, "SIGQUIT") == 15
    assert signals.stop_timeout_s(None, None) == 5
    assert signals.stop_timeout_s(StopConfig(timeout="1m"), 0) == 60
    assert signals.stop_timeout_s(None, 1000) == 300


# -- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"image": None}, "config.image"),
        ({"services": [service(internal_port=0)]}, "config.services[0].internal_port"),
        ({"services": [service(internal_port=70000)]}, "config.services[0].internal_port"),
        ({"services": [service(internal_port=None)]}, "config.services[0].internal_port"),
        ({"services": [service(ports=[Port(port=443, handlers=["htp"])])]}, "config.services[0].ports[0].handlers[0]"),
        ({"services": [service(ports=[Port(port=0)])]}, "config.services[0].ports[0]"),
        ({"services": [service(ports=[Port(start_port=9, end_port=3)])]}, "config.services[0].ports[0].end_port"),
        ({"services": [service(protocol="sctp")]}, "config.services[0].protocol"),
        ({"services": [service(autostop="sleep")]}, "config.services[0].autostop"),
        (
            {"services": [service(concurrency=Concurrency(soft_limit=9, hard_limit=3))]},
            "config.services[0].concurrency.soft_limit",
        ),
        ({"services": [service(checks=[Check(type="ping")])]}, "config.services[0].checks[0].type"),
        ({"services": [service(checks=[Check(type="tcp", interval="soon")])]}, "config.services[0].checks[0].interval"),
        ({"checks": {"up": Check(type="http")}}, "config.checks.up.port"),
        ({"restart": Restart(policy="sometimes")}, "config.restart.policy"),
        ({"guest": Guest(memory_mb=300)}, "config.guest.memory_mb"),
        ({"guest": Guest(memory_mb=4096)}, "config.guest.memory_mb"),
        ({"guest": Guest(cpus=3)}, "config.guest.cpus"),
        ({"guest": Guest(cpu_kind="quantum")}, "config.guest.cpu_kind"),
        ({"size": "huge"}, "config.size"),
        ({"size": "l40s"}, "config.size"),
        ({"guest": Guest(gpu_kind="a10")}, "config.guest.gpu_kind"),
        ({"guest": Guest(gpus=1)}, "config.guest.gpu_kind"),
        ({"guest": Guest(max_memory_mb=512)}, "config.guest.max_memory_mb"),
        ({"guest": Guest(persist_rootfs="often")}, "config.guest.persist_rootfs"),
        ({"guest": Guest(persist_rootfs="never"), "rootfs": RootFS(persist="always")}, "config.rootfs.persist"),
        ({"rootfs": RootFS(size_gb=1000)}, "config.rootfs.size_gb"),
        ({"init": Init(swap_size_mb=-1)}, "config.init.swap_size_mb"),
        ({"size": "shared-cpu-1x", "guest": Guest()}, "config.size"),
        ({"mounts": [Mount(volume="a", path="/a")]}, "config.mounts"),
        ({"mounts": [Mount(volume="a", path="/a"), Mount(volume="b", path="/b")]}, "config.mounts"),
        ({"stop_config": StopConfig(signal="SIGWHAT")}, "config.stop_config.signal"),
        ({"stop_config": StopConfig(timeout="10m")}, "config.stop_config.timeout"),
        ({"files": [File(guest_path="../etc", raw_value="")]}, "config.files[0].guest_path"),
        ({"env": {"A=B": "x"}}, "config.env"),
        ({"schedule": "yearly"}, "config.schedule"),
        ({"statics": [Static(url_prefix=f"/{n}", guest_path="/a") for n in range(11)]}, "config.statics"),
        ({"statics": [Static(url_prefix="a", guest_path="/a")]}, "config.statics[0].url_prefix"),
        ({"statics": [Static(url_prefix="/a", guest_path="a")]}, "config.statics[0].guest_path"),
        (
            {"statics": [Static(url_prefix="/a/", guest_path="/a"), Static(url_prefix="/a/b", guest_path="/b")]},
            "config.statics[1].url_prefix",
        ),
        (
            {"statics": [Static(url_prefix="/a", guest_path="/a", tigris_bucket="a/b")]},
            "config.statics[0].tigris_bucket",
        ),
        (
            {"statics": [Static(url_prefix="/a", guest_path="/a/../b", tigris_bucket="assets")]},
            "config.statics[0].guest_path",
        ),
        (
            {"statics": [Static(url_prefix="/a", guest_path="/a", index_document="index.html")]},
            "config.statics[0].index_document",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate.validate_config(config(**wrong))
    assert (caught.value.field or "").startswith(field)


def test_a_good_config_is_accepted_and_made_explicit() -> None:
    good = config(services=[service(ports=[Port(port=443, handlers=["tls", "http"])])], guest=Guest(cpus=2))
    validate.validate_config(good)
    guest = validate.normalized(good).guest
    assert guest is not None
    assert msgspec.to_builtins(guest) == {"cpu_kind": "shared", "cpus": 2, "memory_mb": 512}
