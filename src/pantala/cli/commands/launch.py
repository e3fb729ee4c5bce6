"""`pantala launch`: from a directory to a running app: scan, name, region, fly.toml, app, deploy."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pantala.cli.commands.apps import default_org
from pantala.cli.commands.deploy import DeployOptions, deploy_app, load_checked
from pantala.cli.output import emit_json, say
from pantala.cli.session import api, confirm, interactive, json_option, run, yes_option
from pantala.errors import InvalidRequest, NameTaken
from pantala.kit.ids import generated_name

if TYPE_CHECKING:
    from pantala.builds.scanner import Source
    from pantala.client.api import ApiClient

NAME_TRIES = 5


@click.command()
@click.argument("directory", default=".", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", metavar="NAME", help="The app's name; else fly.toml's, else the directory's.")
@click.option("-r", "--region", metavar="CODE")
@click.option("-o", "--org", metavar="SLUG")
@click.option("-i", "--image", metavar="REF", help="Run this image instead of building one.")
@click.option("--dockerfile", metavar="PATH")
@click.option("--internal-port", type=click.IntRange(1, 65_535), metavar="PORT")
@click.option("--auto-stop", type=click.Choice(["off", "stop", "suspend"]), default="stop", show_default=True)
@click.option("--vm-memory", default="1gb", show_default=True, metavar="SIZE")
@click.option("--copy-config", is_flag=True, help="Use the fly.toml that is here.")
@click.option("--generate-name", is_flag=True)
@click.option("--now", is_flag=True, help="Deploy at once (the default with --yes).")
@click.option("--no-deploy", is_flag=True, help="Create the app and fly.toml only.")
@click.option("--ha/--no-ha", "high_availability", default=True)
@yes_option
@json_option
def launch(
    *,
    directory: Path,
    name: str | None,
    region: str | None,
    org: str | None,
    image: str | None,
    dockerfile: str | None,
    internal_port: int | None,
    auto_stop: str,
    vm_memory: str,
    copy_config: bool,
    generate_name: bool,
    now: bool,
    no_deploy: bool,
    high_availability: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Create an app from DIRECTORY and deploy it."""
    from pantala.appconfig.load import find_config, load

    existing = find_config(directory, None)
    known = load(existing).config if existing else None
    source = _source(directory, image=image, dockerfile=dockerfile, built=bool(known and known.build.image))
    port = internal_port or source.port
    fallback = known.app if known and known.app else _name_of(directory)
    wanted = name or (generated_name() if generate_name else fallback)

    async def main() -> None:
        async with api() as client:
            slug = org or await default_org(client)
            regions = await client.regions()
            where = region or (known.primary_region if known else None) or regions.Nearest
            say(f"==> {source.family} app in {directory.resolve()}")
            for note in source.notes:
                say(f"    {note}")
            chosen = wanted
            if interactive() and not yes and not name:
                chosen = click.prompt("App name", default=wanted, err=True)
                where = click.prompt("Region", default=where, err=True)
            say(f"    name {chosen}, organisation {slug}, region {where}, port {port}, auto stop {auto_stop}")
            if not (yes or now):
                confirm("Create this app?", yes=yes)
            made = await _create(client, chosen, slug, exact=name is not None)
            say(f"==> Created app {made}")
            if existing and (copy_config or known):
                path = existing
                _set_app(path, made)
            else:
                for filename in write_source(directory, source):
                    say(f"    wrote {filename}")
                path = _write_config(
                    directory,
                    app=made,
                    region=where,
                    port=port,
                    auto_stop=auto_stop,
                    memory=vm_memory,
                    dockerfile=dockerfile,
                )
            say(f"    wrote {path.name}")
            if no_deploy:
                say("    deploy it with `pantala deploy`")
                if as_json:
                    emit_json({"app": made, "region": where, "config": str(path)})
                return
            loaded = load_checked(directory, str(path), strict=False)
            options = DeployOptions(
                image=image, dockerfile=dockerfile, high_availability=high_availability, region=where
            )
            await deploy_app(client, made, loaded, options, as_json=as_json)

    run(main)


def write_source(directory: Path, source: Source) -> list[str]:
    """Write what the scanner made, unless the user has it."""
    written: list[str] = []
    for filename, text in source.files.items():
        path = directory / filename
        if not path.exists():
            path.write_text(text)
            written.append(filename)
    return written


def _source(directory: Path, *, image: str | None, dockerfile: str | None, built: bool) -> Source:
    from pantala.builds.scanner import Source, exposed_port, scan

    if image or built:
        return Source(family="image", port=8080)
    if dockerfile:
        path = directory / dockerfile
        if not path.is_file():
            raise InvalidRequest(f"there is no {path}", field="--dockerfile")
        return Source(family="Dockerfile", port=exposed_port(path.read_text(errors="replace")) or 8080)
    source = scan(directory)
    if source is None:
        raise InvalidRequest(
            f"cannot tell what {directory.resolve()} is",
            hint="known are: a Dockerfile, Flask (requirements.txt and app.py), a static site (index.html); "
            "add a Dockerfile, or pass --image",
        )
    return source


async def _create(client: ApiClient, name: str, org: str, *, exact: bool) -> str:
    """Create the app; a taken name gets a suffix, unless the user asked for exactly this one."""
    for attempt in range(NAME_TRIES):
        candidate = name if attempt == 0 else f"{name}-{generated_name()}"[:63]
        try:
            return (await client.create_app(candidate, org)).name
        except NameTaken:
            if exact or attempt == NAME_TRIES - 1:
                raise
            say(f"    the name {candidate} is taken")
    raise AssertionError("unreachable")


def _name_of(directory: Path) -> str:
    """The directory's name as an app name."""
    text = re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.encode("ascii", "ignore").decode().lower()).strip("-")
    return text[:63].strip("-") or generated_name()


def _write_config(
    directory: Path, *, app: str, region: str, port: int, auto_stop: str, memory: str, dockerfile: str | None
) -> Path:
    from pantala.appconfig.write import new_document, render

    document = new_document(
        app=app, region=region, port=port, auto_stop=auto_stop, memory=memory, dockerfile=dockerfile
    )
    path = directory / "fly.toml"
    path.write_text(render(document, at=datetime.now(UTC)))
    return path


def _set_app(path: Path, app: str) -> None:
    """Put the app's name into an existing file without touching the rest."""
    text = path.read_text()
    line = f'app = "{app}"'
    changed, count = re.subn(r"(?m)^\s*app\s*=.*$", line, text, count=1)
    path.write_text(changed if count else f"{line}\n{text}")
