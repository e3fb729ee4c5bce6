"""`pantala machine exec|ps|signal|kill`: what happens inside a running machine."""

from __future__ import annotations

import shlex
import sys

import click

from pantala.cli.commands.machine_parts import named
from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, app_options, json_option, resolve_app, run
from pantala.errors import InvalidRequest


@click.command(name="exec")
@click.argument("machine_id", metavar="ID")
@click.argument("command", metavar="COMMAND")
@app_options
@click.option("--container", metavar="NAME", help="In one of the machine's containers.")
@click.option("--timeout", type=int, default=None, metavar="SECONDS", help="Kill it after so long (at most 60).")
@click.option("--stdin", "reads_stdin", is_flag=True, help="Give it this command's standard input.")
@click.option("-t", "--tty", is_flag=True, help="Join it to this terminal, by SSH, for as long as it runs.")
@json_option
def run_command(
    *,
    machine_id: str,
    command: str,
    app_name: str | None,
    config_path: str | None,
    container: str | None,
    timeout: int | None,
    reads_stdin: bool,
    tty: bool,
    as_json: bool,
) -> int:
    """Run COMMAND in a machine, beside its app; this ends with its exit code.

    It is split as a shell would; for pipes and variables run one: 'sh -c "..."'.
    """
    from pantala.wire.api import ExecRequest

    name = resolve_app(app_name, config_path)
    if tty:
        if timeout is not None or reads_stdin or as_json:
            raise InvalidRequest("a terminal has no --timeout, --stdin or --json", field="--tty")
        return run(lambda: _run_on_terminal(name, machine_id, command, container))
    stdin = sys.stdin.read() if reads_stdin else None
    request = ExecRequest(cmd=command, container=container, timeout=timeout, stdin=stdin)

    async def main() -> int:
        async with api() as client:
            with named(name, machine_id):
                done = await client.run_command(name, machine_id, request)
        if as_json:
            emit_json(done)
            return 0
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        if done.truncated:
            say("There was more output than is kept (1 MiB).")
        if done.exit_signal:
            say(f"Ended by signal {done.exit_signal}")
        return done.exit_code or (128 + done.exit_signal if done.exit_signal else 0)

    return run(main)


async def _run_on_terminal(app: str, machine_id: str, command: str, container: str | None) -> int:
    """Where exec without a terminal would run it: without a name in the first container, if there are any."""
    from pantala.cli.login import Target, login
    from pantala.cli.terminal import converse

    try:
        words = shlex.join(shlex.split(command))
    except ValueError as error:
        raise InvalidRequest(str(error).lower(), field="COMMAND") from error
    if container is None:
        async with api() as client:
            with named(app, machine_id):
                config = (await client.machine(app, machine_id)).config
        container = config.containers[0].name if config and config.containers else None
    target = Target(app=app, machine_id=machine_id, container=container)
    async with login(target) as connection:
        return await converse(connection, words, pty=True, env=target.env)


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@json_option
def ps(*, machine_id: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Show a machine's processes and what they listen on."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.processes(name, machine_id)
        if as_json:
            emit_json(found)
            return
        rows = [
            (
                process.pid,
                process.rss // 1024,
                process.command,
                ", ".join(f"{socket.proto} {socket.address}" for socket in process.listen_sockets),
            )
            for process in found
        ]
        emit_table(("PID", "RSS (KIB)", "COMMAND", "LISTENS ON"), rows, empty=f"Machine {machine_id} does not run.")

    run(main)


@click.command()
@click.argument("machine_id", metavar="ID")
@click.argument("signal", metavar="SIGNAL")
@app_options
@json_option
def signal(*, machine_id: str, signal: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Send SIGNAL (HUP, SIGHUP or 1) to a machine's app."""
    _send(machine_id, signal, app_name, config_path, as_json=as_json)


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@json_option
def kill(*, machine_id: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Send SIGKILL to a machine's app; its restart policy decides what follows."""
    _send(machine_id, "SIGKILL", app_name, config_path, as_json=as_json)


def _send(machine_id: str, number: str, app_name: str | None, config_path: str | None, *, as_json: bool) -> None:
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                await client.signal(name, machine_id, number)
        say(f"Sent {number} to machine {machine_id}")
        if as_json:
            emit_json({"machine_id": machine_id, "signal": number})

    run(main)


INSIDE: tuple[click.Command, ...] = (run_command, ps, signal, kill)
