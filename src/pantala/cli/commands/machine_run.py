"""`pantala machine run|create`: a new machine from an image, with the flags of flyctl."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click
from msgspec.structs import replace

from pantala.cli.commands.machine_options import (
    PORT_HELP,
    BareFlags,
    Size,
    commas,
    file_options,
    files,
    machine_config,
    services,
    with_files,
)
from pantala.cli.commands.machine_parts import WAIT_S
from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import api, app_options, json_option, pairs, resolve_app, run
from pantala.domain import guests
from pantala.errors import InvalidRequest, WrongState
from pantala.wire.machine import Guest, Init, Machine, MachineConfig, Restart, RootFS

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.argument("image", required=False),
    click.argument("command", nargs=-1),
    app_options,
    click.option("-n", "--name", metavar="NAME"),
    click.option("-r", "--region", metavar="CODE"),
    click.option("-e", "--env", multiple=True, metavar="NAME=VALUE"),
    click.option("-m", "--metadata", multiple=True, metavar="NAME=VALUE"),
    click.option(
        "-p",
        "--port",
        "ports",
        multiple=True,
        metavar="PORT:INTERNAL/PROTOCOL:HANDLERS",
        help=PORT_HELP,
    ),
    click.option("--entrypoint", metavar="COMMAND", help="Instead of the image's."),
    click.option("--vm-size", metavar="SIZE", help="A preset such as shared-cpu-2x."),
    click.option("--vm-cpu-kind", "--vm-cpukind", type=click.Choice(["shared", "performance"]), default=None),
    click.option("--vm-cpus", "--cpus", type=int, metavar="N"),
    click.option(
        "--vm-memory", "--memory", type=Size(), metavar="SIZE", help="512, 512mb, 1gb; default: the least of its CPUs."
    ),
    click.option("--rootfs-size", type=Size(bare="gb"), metavar="SIZE", help="Of its root disk, in GB; default 8."),
    click.option(
        "--rootfs-persist",
        type=click.Choice(["never", "restart", "always"]),
        default=None,
        help="Whether its root disk outlives restarts, or updates too.",
    ),
    click.option("--swap-size", type=Size(), metavar="SIZE", help="Swap, in MB."),
    click.option("--isolation", type=click.Choice(guests.ISOLATIONS), default=None, help="At least this."),
    file_options,
    click.option("--machine-config", metavar="JSON", help="A config, or its file; the other flags change it."),
    click.option("--strict", is_flag=True, help="Refuse unknown fields in --machine-config."),
    click.option(
        "--autostop",
        type=click.Choice(["off", "stop", "suspend"]),
        default="off",
        metavar="[=off|stop|suspend]",
        help="What idleness does to it; stop when nothing is said after it.",
    ),
    click.option("--autostart/--no-autostart", default=True),
    click.option("--restart", type=click.Choice(["no", "always", "on-failure", "on-fail"]), default=None),
    click.option("--schedule", metavar="WHEN", help="hourly, daily, weekly, monthly, or five cron fields and a zone."),
    click.option(
        "--standby-for",
        multiple=True,
        metavar="ID",
        help="Stand by for the loss of these machines' hosts (commas or repeated).",
    ),
    click.option("--rm", "auto_destroy", is_flag=True, help="Destroy the machine when it exits."),
    click.option("--min-secrets-version", type=int, metavar="N", help="Never start with older secrets."),
    click.option("--skip-dns-registration", is_flag=True),
)


def _described(command: F) -> F:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command(name="run", cls=BareFlags)
@_described
@click.option("-d", "--detach", is_flag=True, help="Do not wait until it is started.")
@json_option
def run_machine(*, detach: bool, as_json: bool, **given: Any) -> None:
    """Run IMAGE as a new machine."""
    _launch(given, skip_launch=False, detach=detach, as_json=as_json)


@click.command(cls=BareFlags)
@_described
@json_option
def create(*, as_json: bool, **given: Any) -> None:
    """Make a machine of IMAGE and leave it stopped."""
    _launch(given, skip_launch=True, detach=True, as_json=as_json)


def _launch(given: dict[str, Any], *, skip_launch: bool, detach: bool, as_json: bool) -> None:
    from pantala.wire.api import LaunchMachineRequest

    app = resolve_app(given["app_name"], given["config_path"])
    config = _config(given)
    request = LaunchMachineRequest(
        config=config,
        name=given["name"],
        region=given["region"],
        skip_launch=skip_launch,
        min_secrets_version=given["min_secrets_version"],
    )

    async def main() -> None:
        async with api() as client:
            made = await client.create_machine(app, request)
            say(f"Machine {made.id} is created in {made.region}" + ("" if detach else "; waiting for it to start"))
            if not detach and not config.standbys:
                # Not `started`: what has an end may have come to it.
                states = ["settled", "destroyed"] if config.auto_destroy else ["settled"]
                await client.wait(app, made.id, states=states, timeout_s=WAIT_S, version=made.instance_id)
            made = await client.machine(app, made.id)
            began = any(event.type == "start" and event.status == "started" for event in made.events)
            if made.state in ("failed", "launch_failed") or (made.state == "destroyed" and not began):
                raise WrongState(f"machine {made.id} did not start{_why(made)}")
            if not detach:
                say(f"Machine {made.id} is {made.state}")
        if as_json:
            emit_json(made)
        else:
            emit(made.id)

    run(main)


def _why(machine: Machine) -> str:
    told = next((event.request.reason for event in machine.events if event.request and event.request.reason), "")
    return f": {told}" if told else f"; `pantala machine status {machine.id}` has its history"


def _config(given: dict[str, Any]) -> MachineConfig:
    """That of `--machine-config`, else an empty one, with what the flags say."""
    from pantala.wire.machine import DNSConfig

    config = machine_config(given["machine_config"], strict=given["strict"])
    changes: dict[str, Any] = {"image": given["image"] or config.image}
    if not changes["image"] and not config.containers:
        raise InvalidRequest("must be named, here or in --machine-config", field="IMAGE")
    init = config.init or Init()
    if given["entrypoint"]:
        init = replace(init, entrypoint=shlex.split(given["entrypoint"]))
    if given["command"]:
        init = replace(init, cmd=list(given["command"]))
    if given["swap_size"]:
        init = replace(init, swap_size_mb=given["swap_size"])
    changes["init"] = init
    for field in ("env", "metadata"):
        changes[field] = {**(getattr(config, field) or {}), **pairs(given[field], f"--{field}")} or None
    changes["guest"] = _guest(given, config.guest)
    known = config.services or []
    ports = services(given["ports"], known, autostop=given["autostop"], autostart=given["autostart"])
    changes["services"] = ports or None
    made = files(local=given["file_local"], literal=given["file_literal"], secret=given["file_secret"])
    changes["files"] = with_files(config.files or [], made) or None
    changes["schedule"] = given["schedule"] or config.schedule
    changes["standbys"] = commas(given["standby_for"]) or config.standbys
    changes["auto_destroy"] = given["auto_destroy"] or config.auto_destroy
    if given["rootfs_size"]:
        changes["rootfs"] = replace(config.rootfs or RootFS(), size_gb=given["rootfs_size"] // 1024)
    if given["rootfs_persist"]:
        changes["rootfs"] = replace(changes.get("rootfs") or config.rootfs or RootFS(), persist=given["rootfs_persist"])
    if given["skip_dns_registration"]:
        changes["dns"] = replace(config.dns or DNSConfig(), skip_registration=True)
    config = replace(config, **changes)
    return replace(config, restart=_restart(given["restart"], config))


def _restart(given: str | None, config: MachineConfig) -> Restart | None:
    policy = {"on-fail": "on-failure"}.get(given or "", given)
    if policy is None and config.restart is not None:
        return config.restart
    if policy is None:  # what has an end, and standbys, keep the platform's default
        policy = "no" if config.auto_destroy else None if config.schedule or config.standbys else "always"
    return Restart(policy=policy) if policy else None


def _guest(given: dict[str, Any], known: Guest | None) -> Guest:
    """A preset, with other memory if that is said; or CPUs and memory."""
    kind, cpus, memory = given["vm_cpu_kind"], given["vm_cpus"], given["vm_memory"]
    if given["vm_size"]:
        if kind or cpus:
            raise InvalidRequest("give it, or --vm-cpu-kind and --vm-cpus", field="--vm-size")
        preset = guests.preset(given["vm_size"], field="--vm-size")
        kind, cpus, memory = preset.cpu_kind, preset.cpus, memory or preset.memory_mb
    known = known or Guest()
    return replace(
        known,
        cpu_kind=kind or known.cpu_kind or "shared",
        cpus=cpus or known.cpus or 1,
        memory_mb=memory or known.memory_mb,
        isolation=given["isolation"] or known.isolation,
    )


RUNS: tuple[click.Command, ...] = (run_machine, create)
