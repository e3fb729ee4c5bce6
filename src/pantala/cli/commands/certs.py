"""`pantala certs`: host names of one's own and the certificates for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pantala.cli.context import load_config
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from pantala.wire.certificates import CertificateDetail, CertificateSummary


OWN_AUTHORITY = "Pantala box authority"


@click.group(cls=CommandGroup)
def certs() -> None:
    """Add host names of your own, check and remove them."""


@certs.command()
@click.argument("hostname")
@app_options
@json_option
def add(*, hostname: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Add a host name; its certificate is issued as soon as DNS is right."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            added = await client.add_certificate(name, hostname)
            checked = await client.check_certificate(name, added.hostname)
        _show(checked, as_json=as_json)

    run(main)


@certs.command(name="import")
@click.argument("hostname")
@click.option("--fullchain", required=True, metavar="PATH", help="PEM: the certificate, then who signed it.")
@click.option("--private-key", required=True, metavar="PATH", help="PEM, not encrypted.")
@app_options
@json_option
def import_certificate(
    *, hostname: str, fullchain: str, private_key: str, app_name: str | None, config_path: str | None, as_json: bool
) -> None:
    """Add a certificate that you have from elsewhere."""
    from pantala.wire.certificates import AddCustomRequest

    name = resolve_app(app_name, config_path)
    request = AddCustomRequest(
        hostname=hostname,
        fullchain=_read(fullchain, "--fullchain"),
        private_key=_read(private_key, "--private-key"),
    )

    async def main() -> None:
        async with api() as client:
            added = await client.import_certificate(name, request)
            checked = await client.check_certificate(name, added.hostname)
        _show(checked, as_json=as_json)

    run(main)


@certs.command()
@click.argument("hostname")
@app_options
@json_option
def check(*, hostname: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Look at public DNS now and say which record is missing."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            _show(await client.check_certificate(name, hostname), as_json=as_json)

    run(main)


@certs.command()
@click.argument("hostname")
@app_options
@json_option
def show(*, hostname: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Show a host name and its certificates."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            _show(await client.certificate(name, hostname), as_json=as_json)

    run(main)


@certs.command(name="list")
@app_options
@json_option
def list_certificates(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List an app's host names."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            found = await client.certificates(name)
        if as_json:
            emit_json(found)
            return
        rows = [(one.hostname, _status(one.status), _sources(one), one.created_at) for one in found]
        emit_table(
            ("HOST NAME", "STATUS", "CERTIFICATES", "ADDED AT"), rows, empty=f"{name} has no host names of its own."
        )

    run(main)


@certs.command()
@click.argument("hostname")
@app_options
@yes_option
@json_option
def remove(*, hostname: str, app_name: str | None, config_path: str | None, yes: bool, as_json: bool) -> None:
    """Remove a host name with its certificates; the app stops answering to it."""
    name = resolve_app(app_name, config_path)
    confirm(f"Remove {hostname} from {name}?", yes=yes)

    async def main() -> None:
        async with api() as client:
            await client.remove_certificate(name, hostname)
        say(f"{hostname} is removed from {name}.")
        if as_json:
            emit_json({"removed": [hostname]})

    run(main)


def _show(detail: CertificateDetail, *, as_json: bool) -> None:
    if as_json:
        emit_json(detail)
        return
    lines = [
        ("Host name", detail.hostname),
        ("Status", _status(detail.status)),
        *((f"{'Imported' if one.source == 'custom' else 'Issued'} certificate",
           f"{one.status}, {one.issued[0].type} by {one.issuer or 'nobody named'}, until {one.expires_at}")
          for one in detail.certificates),
        *([("Next order", f"not before {detail.rate_limited_until}")] if detail.rate_limited_until else []),
    ]  # fmt: skip
    width = max(len(title) for title, _ in lines)
    for title, value in lines:
        emit(f"{title.ljust(width)}  {value}")
    for error in detail.validation_errors:
        say(f"\n{error.message}")
        if error.remediation:
            say(f"  {error.remediation}")
    if (own := load_config().own_authority) and any(OWN_AUTHORITY in one.issuer for one in detail.certificates):
        say(f"\nThis box signs for it itself: clients trust it by {own}")
    if detail.status == "pending_validation" and not detail.validation_errors:
        say("\nDNS is right; the certificate is being issued.")
    if detail.status == "pending_ownership":
        proof = detail.dns_requirements.ownership
        say(f"\nThe certificate is served once {detail.hostname} leads here, or by a proof:")
        say(f"  add {proof.name} TXT {proof.app_value}")


def _status(status: str) -> str:
    words = {
        "active": "active",
        "pending_validation": "waiting for DNS or the authority",
        "pending_ownership": "waiting for a proof of ownership",
    }
    return words.get(status, status)


def _sources(one: CertificateSummary) -> str:
    there = {"imported": one.has_custom_certificate, "issued": one.has_fly_certificate}
    return ", ".join(word for word, has in there.items() if has)


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InvalidRequest(f"{path} cannot be read: {reason}", field=flag) from error
