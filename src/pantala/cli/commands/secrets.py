"""`pantala secrets`: write-only values, seen by machines as environment variables."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click
import msgspec

from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, interruptible, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from pantala.client.api import ApiClient

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@click.group(cls=CommandGroup)
def secrets() -> None:
    """Set, list and unset an app's secrets."""


@secrets.command(name="set")
@click.argument("pairs", nargs=-1, metavar="NAME=VALUE... (VALUE - reads standard input)")
@app_options
@click.option("--stage", is_flag=True, help="Keep them for the next deploy; restart nothing.")
@json_option
def set_secrets(
    *, pairs: tuple[str, ...], app_name: str | None, config_path: str | None, stage: bool, as_json: bool
) -> None:
    """Set secrets and restart the machines that run, one after the other."""
    values = dict(_pair(text) for text in pairs)
    if not values:
        raise InvalidRequest("at least one NAME=VALUE is needed")
    _apply(resolve_app(app_name, config_path), dict(values), stage=stage, as_json=as_json)


@secrets.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@app_options
@click.option("--stage", is_flag=True)
@json_option
def unset(*, names: tuple[str, ...], app_name: str | None, config_path: str | None, stage: bool, as_json: bool) -> None:
    """Remove secrets and restart the machines that run."""
    _apply(resolve_app(app_name, config_path), dict.fromkeys(names), stage=stage, as_json=as_json)


@secrets.command(name="list")
@app_options
@json_option
def list_secrets(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List names and digests; values cannot be read back."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            found = await client.secrets(name)
        if as_json:
            emit_json(found)
        else:
            rows = [(secret.name, secret.digest, secret.updated_at) for secret in found]
            emit_table(("NAME", "DIGEST", "UPDATED AT"), rows, empty=f"{name} has no secrets.")

    run(main)


def _apply(name: str, values: dict[str, str | None], *, stage: bool, as_json: bool) -> None:
    """A release of its own: machines that run get the new values one by one, the others at their next start."""
    from pantala.deploys.executor import Executor, Settings
    from pantala.planner.deploy import WARM_STATES, Plan, Update, Wave, group_of, managed_by_deploy
    from pantala.wire.api import CreateReleaseRequest

    async def main() -> None:
        async with api() as client:
            await client.set_secrets(name, values)
            await reach_machines(client)
            if as_json:
                emit_json(await client.secrets(name))

    async def reach_machines(client: ApiClient) -> None:
        if stage:
            say("Staged; machines see them at their next start or deploy.")
            return
        machines = [m for m in await client.machines(name) if managed_by_deploy(m) and m.config]
        running = [m for m in machines if m.state in WARM_STATES]
        if not running:
            say("Set; machines see them at their next start.")
            return
        image = next(m.config.image or "" for m in running if m.config)
        release = await client.create_release(name, CreateReleaseRequest(image=image, description="secrets"))
        metadata = {"fly_release_id": release.id, "fly_release_version": str(release.version)}
        waves: list[Wave] = []
        for m in running:
            assert m.config is not None
            config = msgspec.structs.replace(m.config, metadata=(m.config.metadata or {}) | metadata)
            update = Update(machine_id=m.id, group=group_of(m), config=config, warm=True)
            waves.append(Wave(title=f"{group_of(m)}: restart {m.id} with the new secrets", actions=[update]))
        executor = Executor(client, name, release, settings=Settings(), say=say)
        async with interruptible():
            await executor.run(Plan(waves=waves, strategy="rolling"), machines)
        say(f"==> v{release.version} is live")

    run(main)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r}: must be NAME=VALUE, with a name of letters, digits and _", field="NAME")
    return name, (sys.stdin.read() if value == "-" else value)


# -- keys --------------------------------------------------------------------------------------------------------


@secrets.group(name="keys", cls=CommandGroup)
def keys() -> None:
    """Keys that encrypt and sign for an app through the API and are never shown."""


@keys.command(name="list")
@app_options
@json_option
def list_keys(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List names, types and public halves."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            found = await client.secret_keys(name)
        if as_json:
            emit_json(found)
        else:
            rows = [(key.name, key.type, key.public_key) for key in found]
            emit_table(("NAME", "TYPE", "PUBLIC KEY"), rows, empty=f"{name} has no secret keys.")

    run(main)


@keys.command(name="generate")
@click.argument("kind", metavar="TYPE")
@click.argument("key", metavar="NAME")
@app_options
@json_option
def generate_key(*, kind: str, key: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Make a key: hs256, hs384, hs512, es256, nacl_auth, nacl_sign, nacl_box, nacl_secretbox or xaes256gcm."""
    _put_key(resolve_app(app_name, config_path), key, kind, None, as_json=as_json)


@keys.command(name="set")
@click.argument("kind", metavar="TYPE")
@click.argument("key", metavar="NAME")
@app_options
@json_option
def set_key(*, kind: str, key: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Keep a key of your own; base64 on standard input."""
    _put_key(resolve_app(app_name, config_path), key, kind, sys.stdin.read().strip(), as_json=as_json)


@keys.command(name="delete")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@app_options
@yes_option
@json_option
def delete_keys(
    *, names: tuple[str, ...], app_name: str | None, config_path: str | None, yes: bool, as_json: bool
) -> None:
    """Delete keys; what they encrypted cannot be read any more."""
    app = resolve_app(app_name, config_path)
    confirm(f"Delete {', '.join(names)}? What they encrypted is lost.", yes=yes)

    async def main() -> None:
        async with api() as client:
            for name in names:
                await client.delete_secret_key(app, name)
                say(f"The key {name} is deleted")
        if as_json:
            emit_json({"deleted": names})

    run(main)


def _put_key(app: str, name: str, kind: str, value: str | None, *, as_json: bool) -> None:
    from pantala.wire.secret_keys import SetSecretKeyRequest

    async def main() -> None:
        async with api() as client:
            made = await client.set_secret_key(app, name, SetSecretKeyRequest(type=kind, value=value))
        say(
            f"The key {made.name} ({made.type}) is kept"
            + (f"; public key {made.public_key}" if made.public_key else "")
        )
        if as_json:
            emit_json(made)

    run(main)
