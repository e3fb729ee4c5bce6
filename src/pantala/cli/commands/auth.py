"""`pantala auth`, `pantala tokens`."""

from __future__ import annotations

import sys

import click
import msgspec

from pantala.cli.context import Config, forget_config, load_config, save_config, token
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, json_option, run
from pantala.errors import InvalidRequest


@click.group(cls=CommandGroup)
def auth() -> None:
    """Log in, log out, show who you are."""


@auth.command()
@click.option("--api", "api_url", metavar="URL", help="Address of the platform's API.")
@click.option("--access-token", "-t", metavar="TOKEN", help="The token; read from standard input when left out.")
@json_option
def login(*, api_url: str | None, access_token: str | None, as_json: bool) -> None:
    """Log in with a token, which is kept in ~/.pantala/config.json."""
    known = load_config()
    url = api_url or known.api_url
    if not url:
        raise InvalidRequest("the address of the platform's API is needed", field="--api")
    if access_token is None:
        access_token = click.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    config = msgspec.structs.replace(known, api_url=url, token=str(access_token).strip())
    _show_user(config, as_json=as_json)
    save_config(config)


@auth.command()
@json_option
def logout(*, as_json: bool) -> None:
    """Forget the token and the platform's address."""
    forget_config()
    say("Logged out.")
    if as_json:
        emit_json({"logged_out": True})


@auth.command()
@json_option
def whoami(*, as_json: bool) -> None:
    """Show who you are."""
    _show_user(None, as_json=as_json)


@auth.command(name="token")
@json_option
def show_token(*, as_json: bool) -> None:
    """Print the token in use."""
    value = token(load_config()).reveal()
    if as_json:
        emit_json({"token": value})
    else:
        emit(value)


def _show_user(config: Config | None, *, as_json: bool = False) -> None:
    async def main() -> None:
        async with api(config) as client:
            user = await client.user()
        if as_json:
            emit_json(user)
        else:
            emit(user.email)

    run(main)


@click.group(cls=CommandGroup)
def tokens() -> None:
    """Make tokens for programs, list and revoke them."""


@tokens.group(name="create")
def create_group() -> None:
    """Make a token."""


@create_group.command(name="deploy")
@click.option("-a", "--app", "app_name", required=True, metavar="NAME")
@click.option("-n", "--name", default="deploy token", show_default=True)
@click.option("-x", "--expiry", default="8760h", show_default=True, help="How long it is valid.")
@json_option
def deploy_token(*, app_name: str, name: str, expiry: str, as_json: bool) -> None:
    """A token that can manage one app."""
    from pantala.wire.api import CreateTokenRequest

    async def main() -> None:
        async with api() as client:
            made = await client.create_token(CreateTokenRequest(name=name, app=app_name, expiry=expiry))
        if as_json:
            emit_json(made)
        else:
            emit(made.token)

    run(main)


@tokens.command(name="list")
@json_option
def list_tokens(*, as_json: bool) -> None:
    """List valid tokens: your own, and those for orgs that you administer."""

    async def main() -> None:
        async with api() as client:
            found = await client.tokens()
        if as_json:
            emit_json(found)
            return
        rows = [(t.id, t.name, t.app or t.org_slug or "", t.role, t.user, t.created_at, t.expires_at) for t in found]
        headers = ("ID", "NAME", "FOR", "ROLE", "CREATED BY", "CREATED AT", "EXPIRES AT")
        emit_table(headers, rows, empty="No tokens.")

    run(main)


@tokens.command()
@click.argument("token_ids", nargs=-1, required=True, metavar="ID...")
@json_option
def revoke(*, token_ids: tuple[str, ...], as_json: bool) -> None:
    """Revoke tokens; SSH sessions that they opened end within ten seconds."""

    async def main() -> None:
        async with api() as client:
            for token_id in token_ids:
                await client.revoke_token(token_id)
                say(f"Token {token_id} is revoked")
        if as_json:
            emit_json({"revoked": list(token_ids)})

    run(main)
