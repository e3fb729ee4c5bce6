"""A session with one machine of an app, for `ssh console`, `ssh sftp`, `machine exec --tty` and `console`.

`Target` is what the flags say, `chosen` the machine that they mean, `login` the connection: a fresh key, a certificate
for it, and the way there through the API.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from pantala.cli.output import say
from pantala.cli.session import api, app_options, interactive, resolve_app
from pantala.errors import Forbidden, InvalidRequest, NotFound, TransientError, WrongState

if TYPE_CHECKING:
    import asyncssh

    from pantala.client.api import ApiClient
    from pantala.wire.machine import Machine
    from pantala.wire.ssh import Certificate

LOGIN_S = 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a session goes. Without a container it is the machine itself."""

    app: str
    machine_id: str | None = None
    region: str | None = None
    group: str | None = None
    select: bool = False
    user: str = "root"
    container: str | None = None

    @property
    def env(self) -> dict[str, str]:
        """How a session says to the machine where in it it belongs."""
        return {"FLY_SSH_CONTAINER": self.container} if self.container else {"FLY_SSH_MACHINE": "1"}


_OPTIONS = (
    click.option("--machine", "machine_id", metavar="ID", help="This machine."),
    click.option("-s", "--select", is_flag=True, help="Choose among the started machines."),
    click.option("-r", "--region", metavar="CODE", help="A machine in this region."),
    click.option("-g", "--group", metavar="NAME", help="A machine of this process group."),
    click.option("-u", "--user", default="root", show_default=True, metavar="NAME", help="Log in as."),
    click.option("--container", metavar="NAME", help="In this container of the machine."),
)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say where; the command takes them as one `target`."""

    @wraps(command)
    def with_target(
        *,
        app_name: str | None,
        config_path: str | None,
        machine_id: str | None,
        select: bool,
        region: str | None,
        group: str | None,
        user: str,
        container: str | None,
        **more: Any,
    ) -> Any:
        target = Target(
            app=resolve_app(app_name, config_path),
            machine_id=machine_id,
            region=region,
            group=group,
            select=select,
            user=user,
            container=container,
        )
        return command(target=target, **more)

    made: Callable[..., Any] = with_target
    for option in reversed(_OPTIONS):
        made = option(made)
    return app_options(made)


async def certified(
    client: ApiClient, app: str, users: Sequence[str], *, hours: int = 1
) -> tuple[asyncssh.SSHKey, Certificate]:
    """A new key, and what lets it in to the app's machines."""
    import asyncssh

    from pantala.wire.ssh import CertificateRequest

    key = asyncssh.generate_private_key("ssh-ed25519", comment=f"pantala {app}")
    public_key = key.export_public_key().decode()
    request = CertificateRequest(public_key=public_key, principals=list(users), hours=hours)
    return key, await client.ssh_certificate(app, request)


@asynccontextmanager
async def login(target: Target) -> AsyncGenerator[asyncssh.SSHClientConnection]:
    """A connection to the machine that is meant, with a key and a certificate that live as long as it."""
    import asyncssh

    from pantala.cli.context import api_url, load_config, token
    from pantala.client.tunnel import open_tunnel

    config = load_config()
    async with api(config) as client:
        machine = await chosen(client, target)
        _check_container(machine, target.container)
        key, issued = await certified(client, target.app, [target.user])
    certificate = asyncssh.import_certificate(issued.certificate)
    async with open_tunnel(api_url(config), token(config), app=target.app, machine=machine.id) as tunnel:
        try:
            # Who answers there, the API and the platform's own connections vouch for.
            connection = await asyncssh.connect(
                sock=tunnel.local,
                username=target.user,
                client_keys=[(key, certificate)],
                known_hosts=None,
                agent_path=None,
                config=None,
                login_timeout=LOGIN_S,
            )
        except asyncssh.PermissionDenied as error:
            raise Forbidden(
                f"machine {machine.id} does not let {target.user} in",
                hint="a machine that was started before the authority was changed lets in after a restart",
            ) from error
        except (OSError, asyncssh.Error) as error:
            raise tunnel.refusal or TransientError(f"machine {machine.id} does not answer: {error}") from error
        try:
            async with connection:
                yield connection
        except (
            asyncssh.ConnectionLost,
            asyncssh.DisconnectError,
            asyncssh.SFTPConnectionLost,
            asyncssh.SFTPNoConnection,
        ) as error:
            raise tunnel.refusal or TransientError(f"the connection to {machine.id} is lost: {error}") from error
        if tunnel.refusal is not None:
            raise tunnel.refusal


async def chosen(client: ApiClient, target: Target) -> Machine:
    """Raises what is wrong with the machine that was named, or that none fits."""
    from pantala.planner.deploy import group_of

    app, region, group = target.app, target.region, target.group
    if target.machine_id:
        found = await client.machine(app, target.machine_id)
        if found.state != "started":
            raise WrongState(
                f"machine {found.id} is {found.state}", hint=f"`pantala machine start {found.id} -a {app}` starts it"
            )
        return found
    machines = await client.machines(app)
    fitting = [m for m in machines if region in {None, m.region} and group in {None, group_of(m)}]
    started = sorted((m for m in fitting if m.state == "started"), key=lambda m: m.id)
    if not started:
        what = " ".join(["machine", *([f"of {group}"] if group else []), *([f"in {region}"] if region else [])])
        if not fitting:
            raise NotFound(f"{app} has no {what}", hint=f"`pantala machine list -a {app}` shows what there is")
        raise WrongState(
            f"no {what} of {app} is started", hint=f"`pantala machine start {fitting[0].id} -a {app}` starts one"
        )
    if not target.select or len(started) == 1:
        return started[0]
    if not interactive():
        raise InvalidRequest("there is no terminal to choose on", field="--select", hint="name it with --machine ID")
    for number, machine in enumerate(started, 1):
        say(f"{number:>3}  {machine.id}  {machine.region}  {group_of(machine):<10} {machine.name}")
    number = click.prompt("Machine", type=click.IntRange(1, len(started)), default=1, err=True)
    return started[number - 1]


def _check_container(machine: Machine, name: str | None) -> None:
    """Before anybody logs in: a file server that does not begin cannot say why."""
    config = machine.config or machine.incomplete_config
    if not name or config is None:
        return
    names = [container.name for container in config.containers or []]
    if name not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise NotFound(f"machine {machine.id} has no container {name}: {there}")
