"""fly.toml is read as the original's client reads it; expected values from the fly.toml reference."""

from __future__ import annotations

import tomllib

import pytest

from pantala.appconfig.machines import guest_of, machine_config
from pantala.appconfig.model import AppConfig
from pantala.appconfig.parse import parse
from pantala.appconfig.reading import Finding
from pantala.appconfig.write import new_document, render
from pantala.kit.clock import SystemClock
from pantala.wire.machine import MachineConfig

SEED = """\
app = "flask-flyio-app"
primary_region = "iad"

[build]
  dockerfile = "Dockerfile"

[env]
  PORT = "8080"

[http_service]
  internal_port = 8080
  force_https = true
  auto_stop_machines = false
  auto_start_machines = true
  min_machines_running = 1

[[vm]]
  cpu_kind = "shared"
  cpus = 1
  memory_mb = 512
"""


def read(text: str) -> tuple[AppConfig, list[Finding]]:
    return parse(tomllib.loads(text), text)


def errors(text: str) -> dict[str, str]:
    return {f.field: f.message for f in read(text)[1] if f.level == "error"}


def composed(text: str, group: str = "app") -> MachineConfig:
    config, _ = read(text)
    return machine_config(config, group, image="img", metadata={}, read_file=lambda path: path.encode())


def test_the_seed_documents_file_is_clean() -> None:
    config, findings = read(SEED)
    assert findings == []
    assert (config.app, config.primary_region) == ("flask-flyio-app", "iad")


def test_http_service_becomes_ports_80_and_443() -> None:
    service = (composed(SEED).services or [])[0]
    ports = service.ports or []
    assert [(p.port, p.handlers, p.force_https) for p in ports] == [
        (80, ["http"], True),
        (443, ["http", "tls"], None),
    ]
    assert (service.internal_port, service.autostop, service.autostart, service.min_machines_running) == (
        8080,
        False,
        True,
        1,
    )


@pytest.mark.parametrize(
    ("written", "echoed"),
    [("true", True), ('"stop"', True), ('"off"', False), ("false", False), ('"suspend"', "suspend")],
)
def test_autostop_spellings_are_echoed_as_the_client_expects(written: str, echoed: bool | str) -> None:
    text = f"[http_service]\ninternal_port = 80\nauto_stop_machines = {written}"
    assert (composed(text).services or [])[0].autostop == echoed


def test_env_numbers_are_strings_and_primary_region_overrides() -> None:
    env = composed('primary_region = "lhr"\n[env]\nA = 123\nB = true\nPRIMARY_REGION = "xxx"').env
    assert env == {"A": "123", "B": "true", "PRIMARY_REGION": "lhr", "FLY_PROCESS_GROUP": "app"}


def test_an_unknown_key_warns_with_its_line_and_the_nearest_name() -> None:
    config, findings = read('app = "a"\n\n[http_service]\n  internal_port = 80\n  min_machines_runing = 1\n')
    assert [(f.level, f.field, f.line, f.unknown) for f in findings] == [
        ("warning", "http_service.min_machines_runing", 5, True)
    ]
    assert "did you mean min_machines_running?" in findings[0].message
    assert config.document["http_service"]["min_machines_runing"] == 1


@pytest.mark.parametrize(
    ("text", "field"),
    [
        pytest.param("[http_service]\ninternal_port = 70000", "http_service.internal_port", id="port out of range"),
        pytest.param("[http_service]\nforce_https = true", "http_service.internal_port", id="port missing"),
        pytest.param('[http_service]\ninternal_port = 80\nforce_https = "yes"', "http_service.force_https", id="type"),
        pytest.param('[http_service]\ninternal_port = 80\nauto_stop_machines = "x"', "http_service.auto_stop_machines",
                     id="autostop"),
        pytest.param(
            '[[services]]\ninternal_port = 80\n[[services.ports]]\nport = 80\nhandlers = ["proxy_proto", "http"]',
            "services[0].ports[0].handlers", id="a PROXY header before HTTP",
        ),
        pytest.param('kill_signal = "SIGFOO"', "kill_signal", id="signal"),
        pytest.param('kill_timeout = "10m"', "kill_timeout", id="kill timeout above 300 s"),
        pytest.param('[deploy]\nstrategy = "magic"', "deploy.strategy", id="strategy"),
        pytest.param('[deploy]\nrelease_command = "a \'b"', "deploy.release_command", id="unsplittable command"),
        pytest.param('[env]\nFLY_X = "1"', "env.FLY_X", id="reserved env"),
        pytest.param('[[restart]]\npolicy = "sometimes"', "restart[0].policy", id="restart policy"),
        pytest.param('[checks.a]\ntype = "udp"\nport = 1', "checks.a.type", id="check type"),
        pytest.param('[checks.a]\ntype = "tcp"\nport = 1\ninterval = "1s"', "checks.a.interval", id="interval < 2s"),
        pytest.param('[checks.a]\ntype = "tcp"', "checks.a.port", id="check without port"),
        pytest.param('app = "Not A Name"', "app", id="name"),
        pytest.param('[[vm]]\nmemory = "lots"', "vm[0].memory", id="memory"),
        pytest.param('[[vm]]\nsize = "shared-cpu-3x"', "vm[0].size", id="size"),
        pytest.param('[[vm]]\nsize = "a100-40gb"', "vm[0].size", id="size with a GPU"),
        pytest.param('[[vm]]\nmemory = "4gb"', "vm[0].memory_mb", id="memory above what a shared CPU may have"),
        pytest.param('[[vm]]\nmemory = 300', "vm[0].memory_mb", id="memory between steps"),
        pytest.param("[[vm]]\ncpus = 3", "vm[0].cpus", id="number of CPUs"),
        pytest.param("[[vm]]\nmax_memory_mb = 512", "vm[0].max_memory_mb", id="memory that grows"),
        pytest.param('[[vm]]\npersist_rootfs = "often"', "vm[0].persist_rootfs", id="persistent root"),
        pytest.param("[[vm]]\npersist_rootfs = 4", "vm[0].persist_rootfs", id="persistent root by number"),
        pytest.param('[build]\nbuilder = "x"', "build.builder", id="unsupported builder"),
        pytest.param('[processes]\nweb = "a"\n[[services]]\ninternal_port = 1', "services", id="service without group"),
        pytest.param('[[services]]\nprocesses = ["x"]\ninternal_port = 1', "services", id="unknown group"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_field(text: str, field: str) -> None:
    assert field in errors(text)


def test_every_seed_like_section_is_known() -> None:
    text = """
    app = "a"
    primary_region = "iad"
    kill_signal = "SIGTERM"
    kill_timeout = 10
    swap_size_mb = 512
    [experimental]
    auto_rollback = true
    cmd = "serve"
    [deploy]
    strategy = "rolling"
    max_unavailable = 0.5
    wait_timeout = "2m"
    release_command = "bin/migrate --all"
    [processes]
    app = "gunicorn app:app"
    worker = "celery -A app worker"
    [http_service]
    internal_port = "8080"
    processes = ["app"]
    [http_service.concurrency]
    type = "requests"
    soft_limit = 100
    hard_limit = 200
    [[http_service.checks]]
    path = "/health"
    interval = "10s"
    timeout = 2000
    grace_period = "5s"
    headers = { X-A = "1" }
    [[services]]
    protocol = "tcp"
    internal_port = 5432
    processes = ["worker"]
    [[services.ports]]
    port = 5432
    handlers = ["pg_tls"]
    [[services.tcp_checks]]
    interval = "15s"
    [[vm]]
    size = "shared-cpu-2x"
    processes = ["worker"]
    [[vm]]
    memory = "1gb"
    [[statics]]
    guest_path = "/app/static"
    url_prefix = "/static"
    [metrics]
    port = 9091
    path = "/metrics"
    [[files]]
    guest_path = "/etc/x"
    raw_value = "aGk="
    """
    config, findings = read(text)
    assert findings == []
    assert config.deploy.wait_timeout_s == 120
    assert config.kill_timeout_s == 10
    worker, app = guest_of(config, "worker"), guest_of(config, "app")
    assert worker is not None
    assert app is not None
    assert (worker.cpus, worker.memory_mb) == (2, 512)
    assert (app.cpus, app.memory_mb) == (1, 1024)


def test_check_durations_are_go_strings_and_clamped() -> None:
    text = (
        '[http_service]\ninternal_port = 80\n[[http_service.checks]]\npath = "/"\ninterval = "100ms"\ntimeout = "5m"\n'
    )
    check = ((composed(text).services or [])[0].checks or [])[0]
    assert (check.type, check.method, check.interval, check.timeout) == ("http", "GET", "1s", "1m")
    assert sum(f.level == "warning" for f in read(text)[1]) == 2


def test_process_groups_get_their_own_command_and_services() -> None:
    text = '[processes]\napp = "run \'a b\'"\njobs = "work"\n[http_service]\ninternal_port = 80\nprocesses = ["app"]\n'
    app, jobs = composed(text, "app"), composed(text, "jobs")
    assert app.init is not None
    assert app.init.cmd == ["run", "a b"]
    assert app.services
    assert jobs.services is None


def test_the_old_concurrency_string_is_read() -> None:
    text = '[http_service]\ninternal_port = 80\nconcurrency = "20,25"'
    concurrency = (composed(text).services or [])[0].concurrency
    assert concurrency is not None
    assert (concurrency.type, concurrency.soft_limit, concurrency.hard_limit) == ("requests", 20, 25)


def test_what_launch_writes_is_read_back_without_a_finding() -> None:
    text = render(new_document(app="my-app", region="iad", port=8080), at=SystemClock().now())
    config, findings = read(text)
    assert findings == []
    service = config.services[0].service
    assert (service.autostop, service.autostart, service.min_machines_running) == (True, True, 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('size = "shared-cpu-4x"', ("shared", 4, 1024)),
        ('size = "performance-16x"', ("performance", 16, 32768)),
        ('size = "shared-cpu-1x"\nmemory = "1gb"', ("shared", 1, 1024)),
        ('memory = "1gb"\nmemory_mb = 512', ("shared", 1, 512)),
        ("memory = 512", ("shared", 1, 512)),
        ("cpus = 2", ("shared", 2, 512)),
        ('cpu_kind = "performance"', ("performance", 1, 2048)),
        ('cpu_kind = "performance"\ncpus = 2\nmemory = "8gb"', ("performance", 2, 8192)),
        ('size = "shared-cpu-1x"\ncpus = 8', ("shared", 8, 2048)),
        ('size = "performance-4x"\ncpu_kind = "shared"', ("shared", 4, 8192)),
        ('persist_rootfs = "never"\nmax_memory_mb = 256\nkernel_args = ["a=b"]', ("shared", 1, 256)),
    ],
)
@pytest.mark.parametrize("section", ["[[vm]]", "[vm]", "[[compute]]", "[[computes]]"])
def test_a_size_is_a_preset_changed_by_the_other_keys(section: str, text: str, wanted: tuple[str, int, int]) -> None:
    config, findings = read(f'app = "a"\n{section}\n{text}\n')
    assert findings == []
    guest = guest_of(config, "app")
    assert guest is not None
    assert (guest.cpu_kind, guest.cpus, guest.memory_mb) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ('"restart"', "restart"),
        ('"always"', "always"),
        ('"none"', "none"),
        ("0", "none"),
        ("1", "never"),
        ("3", "always"),
    ],
)
def test_whether_a_root_is_kept_goes_to_the_guest(given: str, wanted: str) -> None:
    config, findings = read(f'app = "a"\n[[vm]]\npersist_rootfs = {given}\n')
    guest = guest_of(config, "app")
    assert findings == []
    assert guest is not None
    assert guest.persist_rootfs == wanted


def test_without_a_size_in_the_file_machines_keep_theirs() -> None:
    config, _ = read('app = "a"')
    assert guest_of(config, "app") is None
