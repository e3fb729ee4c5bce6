"""`pantala machine run|create`: a new machine from an image, with the flags of flyctl."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pantala.cli.commands.machine_parts import WAIT_S
from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import api, app_options, json_option, pairs, resolve_app, run
from pantala.domain import guests
from pantala.errors import InvalidRequest, WrongState
from pantala.wire.machine import Guest, Init, Machine, MachineConfig, Port, Restart, Service

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.argument("image"),
    click.argument("command", nargs=-1),
    app_options,
    click.option("-n", "--name", metavar="NAME"),
    click.option("-r", "--region", metavar="CODE"),
    click.option("-e", "--env", multiple=True, metavar="NAME=VALUE"),
    click.option("-m", "--metadata", multiple=True, metavar="NAME=VALUE"),
    click.option("-p", "--port", "ports", multiple=True, metavar="PORT:INTERNAL/HANDLERS", help="443:8080/http+tls"),
    click.option("--entrypoint", metavar="COMMAND", help="Instead of the image's."),
    click.option("--vm-size", metavar="SIZE", help="A preset such as shared-cpu-2x."),
    click.option("--vm-cpu-kind", type=click.Choice(["shared", "performance"]), default=None),
    click.option("--vm-cpus", type=int, metavar="N"),
    click.option("--vm-memory", type=int, metavar="MIB", help="Default: the least of its CPUs."),
    click.option("--isolation", type=click.Choice(guests.ISOLATIONS), default=None, help="At least this."),
    click.option("--autostop", is_flag=True),
    click.option("--autostart/--no-autostart", default=True),
    click.option("--restart", type=click.Choice(["no", "always", "on-fail"]), default=None),
    click.option("--schedule", metavar="WHEN", help="hourly, daily, weekly, monthly, or five cron fields and a zone."),
    click.option("--standby-for", multiple=True, metavar="ID", help="Stand by for the loss of these machines' hosts."),
    click.option("--rm", "auto_destroy", is_flag=True, help="Destroy the machine when it exits."),
    click.option("--min-secrets-version", type=int, metavar="N", help="Never start with older secrets."),
    click.option("--skip-dns-registration", is_flag=True),
)


def _described(command: F) -> F:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command(name="run")
@_described
@click.option("-d", "--detach", is_flag=True, help="Do not wait until it is started.")
@json_option
def run_machine(*, detach: bool, as_json: bool, **given: Any) -> None:
    """Run IMAGE as a new machine."""
    _launch(given, skip_launch=False, detach=detach, as_json=as_json)


@click.command()
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
            if not detach and not config.auto_destroy and not config.standbys:
                # Not `started`: what has an end may have come to it.
                await client.wait(app, made.id, states=["settled"], timeout_s=WAIT_S, version=made.instance_id)
            made = await client.machine(app, made.id)
            if made.state in ("failed", "launch_failed"):
                raise WrongState(f"machine {made.id} did not start{_why(made)}")
        if as_json:
            emit_json(made)
        else:
            emit(made.id)

    run(main)


def _why(machine: Machine) -> str:
    told = next((event.request.reason for event in machine.events if event.request and event.request.reason), "")
    return f": {told}" if told else f"; `pantala machine status {machine.id}` has its history"


def _config(given: dict[str, Any]) -> MachineConfig:
    from pantala.wire.machine import DNSConfig

    policy = {"on-fail": "on-failure"}.get(given["restart"] or "", given["restart"])
    if policy is None:  # what has an end, and standbys, keep the platform's default
        policy = "no" if given["auto_destroy"] else None if given["schedule"] or given["standby_for"] else "always"
    return MachineConfig(
        image=given["image"],
        init=Init(
            entrypoint=shlex.split(given["entrypoint"]) if given["entrypoint"] else None,
            cmd=list(given["command"]) or None,
        ),
        env=pairs(given["env"], "--env") or None,
        metadata=pairs(given["metadata"], "--metadata") or None,
        guest=_guest(given),
        services=[_service(port, autostop=given["autostop"], autostart=given["autostart"]) for port in given["ports"]]
        or None,
        restart=Restart(policy=policy) if policy else None,
        schedule=given["schedule"],
        standbys=list(given["standby_for"]) or None,
        auto_destroy=given["auto_destroy"] or None,
        dns=DNSConfig(skip_registration=True) if given["skip_dns_registration"] else None,
    )


def _guest(given: dict[str, Any]) -> Guest:
    """A preset, with other memory if that is said; or CPUs and memory."""
    kind, cpus, memory = given["vm_cpu_kind"], given["vm_cpus"], given["vm_memory"]
    if given["vm_size"]:
        if kind or cpus:
            raise InvalidRequest("give it, or --vm-cpu-kind and --vm-cpus", field="--vm-size")
        preset = guests.preset(given["vm_size"], field="--vm-size")
        kind, cpus, memory = preset.cpu_kind, preset.cpus, memory or preset.memory_mb
    return Guest(cpu_kind=kind or "shared", cpus=cpus or 1, memory_mb=memory, isolation=given["isolation"])


def _service(text: str, *, autostop: bool, autostart: bool) -> Service:
    """`443:8080/http+tls`, `80/http`, `5432:5432`."""
    numbers, _, handlers = text.partition("/")
    outside, _, inside = numbers.partition(":")
    if not outside.isdigit() or not (inside or outside).isdigit():
        raise InvalidRequest(f"{text!r} is not PORT[:INTERNAL][/HANDLER[+HANDLER]]", field="--port")
    wanted = [handler for handler in handlers.split("+") if handler]
    return Service(
        protocol="tcp",
        internal_port=int(inside or outside),
        ports=[Port(port=int(outside), handlers=wanted)],
        autostop=autostop,
        autostart=autostart,
    )


RUNS: tuple[click.Command, ...] = (run_machine, create)
