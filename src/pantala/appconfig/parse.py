"""fly.toml to `AppConfig`: sections, spellings, defaults and limits of the fly.toml reference.

Each section has one reader; together they ask for every known key, so that what is left is unknown. Rules that need
several sections are in `rules.py`.
"""

from __future__ import annotations

import shlex
from typing import Any

from pantala.appconfig.model import (
    VM,
    AppConfig,
    Build,
    Deploy,
    GroupFile,
    GroupMetrics,
    GroupRestart,
    Mount,
)
from pantala.appconfig.parse_services import read_services, read_top_level_checks
from pantala.appconfig.reading import Document, Finding, Table
from pantala.appconfig.rules import check_rules
from pantala.domain.guests import ISOLATIONS, PERSISTS
from pantala.wire.machine import File, Metrics, Restart, Static

STRATEGIES = ("rolling", "immediate", "canary", "bluegreen")
SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGSTOP")
KILL_TIMEOUT_S_MAX = 300.0
RESTART_POLICIES = {"always": "always", "never": "no", "no": "no", "on-failure": "on-failure", "on-fail": "on-failure"}
_MIB = {"": 1, "mb": 1, "mib": 1, "m": 1, "gb": 1024, "gib": 1024, "g": 1024, "kb": 1 / 1024, "kib": 1 / 1024}


def parse(data: dict[str, Any], text: str) -> tuple[AppConfig, list[Finding]]:
    """The configuration and what is wrong or odd about it. With an error among the findings it must not be deployed."""
    document = Document(data, text)
    root = document.root
    experimental = root.table("experimental")
    processes = _processes(root)
    config = AppConfig(
        app=root.string("app"),
        primary_region=root.string("primary_region"),
        kill_signal=root.choice("kill_signal", SIGNALS),
        kill_timeout_s=_kill_timeout(root, experimental),
        swap_size_mb=root.integer("swap_size_mb", low=0),
        env=_env(root),
        processes=processes,
        build=_build(root.table("build")),
        deploy=_deploy(root.table("deploy")),
        services=read_services(root),
        checks=read_top_level_checks(root),
        mounts=_mounts(root),
        vms=_vms(root),
        restarts=_restarts(root),
        files=_files(root),
        statics=_statics(root),
        metrics=_metrics(root),
        console_command=_command(root, "console_command"),
        init_cmd=_words(experimental, "cmd"),
        init_entrypoint=_words(experimental, "entrypoint"),
        init_exec=_words(experimental, "exec"),
        document=data,
    )
    _accepted(root, experimental)
    root.done()
    check_rules(config, document)
    return config, sorted(document.findings, key=lambda finding: (finding.level != "error", finding.line))


def split_command(text: str) -> list[str]:
    """Words of a command, POSIX quoting, no variables. Raises ValueError."""
    return shlex.split(text)


CONTAINERS_BY_API = "is not offered in fly.toml; containers are part of a machine's config in the Machines API"


def _accepted(root: Table, experimental: Table | None) -> None:
    """Keys that later work will use: known, so not warned about as typing errors."""
    if root.string("host_dedication_id"):
        root.document.warn("host_dedication_id", "not supported yet, kept but not used")
    for table, key in ((root, "machine_config"), (root, "container"), (experimental, "machine_config")):
        if table is not None and table.string(key):
            table.error(key, CONTAINERS_BY_API)
    if root.tables("machine_checks"):
        root.document.warn("machine_checks", "not supported yet, kept but not used")
    if experimental:
        for key in ("auto_rollback", "enable_consul", "enable_etcd", "lazy_load_images", "attached"):
            experimental.raw(key)
        for key in ("kill_timeout", "metrics_port", "metrics_path"):
            experimental.raw(key)
        experimental.done()


def _processes(root: Table) -> dict[str, str]:
    _, value = root.raw("processes")
    if isinstance(value, list):  # the old form: a list of {name, command}
        commands: dict[str, str] = {}
        for table in root.tables("processes"):
            name, command = table.string("name"), table.string("command")
            table.done()
            if not name:
                table.error("name", "is required")
            else:
                commands[name] = command or ""
        return commands
    commands = root.string_map("processes")
    for name, command in commands.items():
        try:
            split_command(command)
        except ValueError as error:
            root.error(f"processes.{name}", f"cannot be split into words: {error}")
    return commands


def _env(root: Table) -> dict[str, str]:
    env = root.string_map("env")
    for name in env:
        if name.startswith("FLY_"):
            root.error(f"env.{name}", "names that start with FLY_ are set by the platform")
    return env


def _kill_timeout(root: Table, experimental: Table | None) -> float | None:
    value = root.seconds("kill_timeout", bare_unit_s=1)
    if value is None and experimental is not None:
        value = experimental.seconds("kill_timeout", bare_unit_s=1)
    if value is not None and not 0 <= value <= KILL_TIMEOUT_S_MAX:
        root.error("kill_timeout", f"{value:g} s is out of range; it must be between 0 and {KILL_TIMEOUT_S_MAX:g} s")
        return None
    return value


def _build(table: Table | None) -> Build:
    if table is None:
        return Build()
    compression = table.choice("compression", ("gzip", "zstd"))
    table.integer("compression_level", low=0, high=9)
    unsupported = [
        key for key in ("builder", "buildpacks", "builtin", "settings", "compose") if table.raw(key)[1] is not None
    ]
    if compression == "zstd":
        table.document.warn(table.field("compression"), "zstd is not supported yet; layers are compressed with gzip")
    build = Build(
        image=table.string("image"),
        dockerfile=table.string("dockerfile"),
        ignorefile=table.string("ignorefile"),
        target=table.string("build-target", "build_target"),
        args=table.string_map("args"),
        unsupported=tuple(unsupported),
    )
    table.done()
    return build


def _deploy(table: Table | None) -> Deploy:
    if table is None:
        return Deploy()
    release_command = _command(table, "release_command")
    max_unavailable = table.number("max_unavailable")
    if max_unavailable is not None and max_unavailable <= 0:
        table.error("max_unavailable", "must be above 0: a number of machines, or a fraction of them")
        max_unavailable = None
    for key in ("seed_command", "release_command_vm"):
        if table.raw(key)[1] is not None:
            table.document.warn(table.field(key), "not supported yet, kept but not used")
    wait, command_wait = _wait(table, "wait_timeout"), _wait(table, "release_command_timeout")
    deploy = Deploy(
        strategy=table.choice("strategy", STRATEGIES) or "rolling",
        max_unavailable=max_unavailable or 0.33,
        wait_timeout_s=wait or 300.0,
        release_command=release_command,
        release_command_timeout_s=command_wait or 300.0,
    )
    table.done()
    return deploy


def _command(table: Table, key: str) -> str | None:
    text = table.string(key)
    if text:
        try:
            split_command(text)
        except ValueError as error:
            table.error(key, f"cannot be split into words: {error}")
    return text


def _wait(table: Table, key: str) -> float | None:
    """A bare number is nanoseconds in the original's client, which nobody means: accepted with a warning."""
    if isinstance(table.raw(key)[1], int | float):
        table.document.warn(table.field(key), 'a bare number counts nanoseconds; write "5m" or "30s"')
    return table.seconds(key, bare_unit_s=1e-9)


def _mounts(root: Table) -> tuple[Mount, ...]:
    mounts: list[Mount] = []
    for table in root.tables("mounts", "mount"):
        source, destination = table.string("source"), table.string("destination")
        if not source:
            table.error("source", "is required: the name of the volume")
        if not destination or not destination.startswith("/") or destination == "/":
            table.error("destination", "must be an absolute path other than /")
        retention = table.integer("snapshot_retention", low=1, high=60)
        del retention
        table.boolean("scheduled_snapshots")
        table.integer("auto_extend_size_threshold", low=0, high=99)
        for key in ("auto_extend_size_increment", "auto_extend_size_limit"):
            table.raw(key)
        size = table.raw("initial_size")[1]
        mounts.append(
            Mount(
                source=source or "",
                destination=destination or "",
                initial_size_gb=size if isinstance(size, int) else None,
                processes=tuple(table.strings("processes") or ()),
            )
        )
        table.done()
    return tuple(mounts)


def _vms(root: Table) -> tuple[VM, ...]:
    vms: list[VM] = []
    for table in root.tables("vm", "compute", "computes"):
        in_words = _memory_mib(table)
        memory = table.integer("memory_mb", low=1) or in_words
        for key in ("gpu_kind", "gpus"):
            if table.raw(key)[1] is not None:
                table.error(key, "GPU machines are not offered")
        for key in ("kernel_args", "host_dedication_id"):
            table.raw(key)
        vms.append(
            VM(
                size=table.string("size"),
                cpus=table.integer("cpus", low=1),
                cpu_kind=table.choice("cpu_kind", ("shared", "performance")),
                memory_mib=memory,
                max_memory_mib=table.integer("max_memory_mb", low=0),
                isolation=table.choice("isolation", ISOLATIONS),
                persist_rootfs=_persists(table),
                processes=tuple(table.strings("processes") or ()),
            )
        )
        table.done()
    return tuple(vms)


def _persists(table: Table) -> str | None:
    """Whether the root disk outlives a stop: a word, or its number."""
    key, value = table.raw("persist_rootfs")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(PERSISTS):
        value = PERSISTS[value]
    if value is None or value in PERSISTS:
        return value
    table.error(key, f"must be one of {', '.join(PERSISTS)}, not {value!r}")
    return None


def _memory_mib(table: Table) -> int | None:
    """`512`, `"512mb"`, `"2gb"`: binary units, whole MiB."""
    key, value = table.raw("memory")
    if value is None:
        return None
    text = str(value).strip().lower()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip()
    try:
        mib = int(float(digits) * _MIB[unit])
    except (ValueError, KeyError):
        table.error(key, f'{value!r} is not a size such as 512 or "512mb" or "2gb"')
        return None
    if mib < 1:
        table.error(key, f"{value!r} is too small")
        return None
    return mib


def _restarts(root: Table) -> tuple[GroupRestart, ...]:
    restarts: list[GroupRestart] = []
    for table in root.tables("restart"):
        policy = table.string("policy")
        retries = table.integer("retries", low=0)
        if policy is not None and policy not in RESTART_POLICIES:
            table.error("policy", f"invalid restart policy: {policy}; it must be always, never or on-failure")
        else:
            restart = Restart(policy=RESTART_POLICIES.get(policy or "on-failure"), max_retries=retries)
            restarts.append(GroupRestart(restart=restart, processes=tuple(table.strings("processes") or ())))
        table.done()
    return tuple(restarts)


def _files(root: Table) -> tuple[GroupFile, ...]:
    files: list[GroupFile] = []
    for table in root.tables("files"):
        guest_path = table.string("guest_path")
        local, secret, raw = table.string("local_path"), table.string("secret_name"), table.string("raw_value")
        if not guest_path or not guest_path.startswith("/"):
            table.error("guest_path", "must be an absolute path")
        elif sum(value is not None for value in (local, secret, raw)) != 1:
            table.error("guest_path", "needs exactly one of local_path, secret_name, raw_value")
        else:
            files.append(
                GroupFile(
                    file=File(guest_path=guest_path, raw_value=raw, secret_name=secret),
                    local_path=local,
                    processes=tuple(table.strings("processes") or ()),
                )
            )
        table.done()
    return tuple(files)


def _statics(root: Table) -> tuple[Static, ...]:
    statics: list[Static] = []
    for table in root.tables("statics"):
        guest_path, prefix = table.string("guest_path"), table.string("url_prefix")
        if not guest_path or not prefix:
            table.error("guest_path", "guest_path and url_prefix are both required")
        else:
            statics.append(
                Static(
                    guest_path=guest_path,
                    url_prefix=prefix,
                    tigris_bucket=table.string("tigris_bucket"),
                    index_document=table.string("index_document"),
                )
            )
        table.done()
    return tuple(statics)


def _metrics(root: Table) -> tuple[GroupMetrics, ...]:
    found: list[GroupMetrics] = []
    for table in root.tables("metrics", "metric"):
        metrics = Metrics(port=table.port("port"), path=table.string("path"), https=table.boolean("https"))
        found.append(GroupMetrics(metrics=metrics, processes=tuple(table.strings("processes") or ())))
        table.done()
    return tuple(found)


def _words(table: Table | None, key: str) -> tuple[str, ...] | None:
    words = table.strings(key) if table is not None else None
    return tuple(words) if words is not None else None
