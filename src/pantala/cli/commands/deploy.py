"""`pantala deploy`: fly.toml, build, plan, execute, each stage with its time."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import api, app_options, interruptible, json_option, pairs, resolve_app, run, yes_option
from pantala.errors import CapacityError, InvalidRequest, UserError

if TYPE_CHECKING:
    from pantala.appconfig.load import Loaded
    from pantala.client.api import ApiClient
    from pantala.planner.deploy import Plan, Wanted
    from pantala.wire.api import App, Release
    from pantala.wire.machine import Machine, Static


class DeployOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of `deploy` that `launch` passes on."""

    image: str | None = None
    dockerfile: str | None = None
    strategy: str | None = None
    max_unavailable: float | None = None
    wait_timeout_s: float | None = None
    high_availability: bool = True
    smoke_checks: bool = True
    rollback: bool = True
    no_cache: bool = False
    build_args: tuple[str, ...] = ()
    build_target: str | None = None
    env: tuple[str, ...] = ()
    region: str | None = None
    verbose: bool = False
    dry_run: bool = False
    strict: bool = False
    public_ips: bool = True
    flycast: bool = False


@click.command()
@click.argument("directory", default=".", type=click.Path(exists=True, file_okay=False, path_type=Path))
@app_options
@click.option("-i", "--image", metavar="REF", help="Deploy this image instead of building one.")
@click.option("--dockerfile", metavar="PATH")
@click.option("--build-target", metavar="STAGE")
@click.option("--build-arg", "build_args", multiple=True, metavar="NAME=VALUE")
@click.option("--no-cache", is_flag=True, help="Build every step anew.")
@click.option("--build-only", is_flag=True, help="Build and push the image, then stop.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Added to [env].")
@click.option("--strategy", metavar="NAME", help="rolling or immediate.")
@click.option("--max-unavailable", type=float, metavar="N")
@click.option("--wait-timeout", metavar="DURATION", help="For one machine to be well; default 5m.")
@click.option("--ha/--no-ha", "high_availability", default=True, help="Two machines for a new group with services.")
@click.option("--smoke-checks/--no-smoke-checks", default=True)
@click.option("--rollback/--no-rollback", default=True, help="Put machines back when the new version is not well.")
@click.option("--primary-region", "region", metavar="CODE")
@click.option("--remote-only", is_flag=True, help="Accepted for compatibility: builds always run on the platform.")
@click.option("--strict", is_flag=True, help="Refuse unknown keys in fly.toml.")
@click.option("--public-ips/--no-public-ips", default=True, help="Give a new app public addresses.")
@click.option("--flycast", is_flag=True, help="Give a new app a private address instead.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--verbose", is_flag=True, help="Show the build's output.")
@yes_option
@click.option("--now", is_flag=True, hidden=True)
@json_option
def deploy(
    *,
    directory: Path,
    app_name: str | None,
    config_path: str | None,
    wait_timeout: str | None,
    build_only: bool,
    remote_only: bool,
    yes: bool,
    now: bool,
    as_json: bool,
    **flags: object,
) -> None:
    """Build and release the app of DIRECTORY."""
    del remote_only, now, yes
    options = msgspec.convert(flags | {"wait_timeout_s": _duration(wait_timeout)}, DeployOptions)
    loaded = load_checked(directory, config_path, strict=options.strict)
    name = resolve_app(app_name or loaded.config.app, config_path)

    async def main() -> None:
        async with api() as client:
            if build_only:
                image = await build_image(client, name, loaded, options)
                if as_json:
                    emit_json({"app": name, "image": image})
                else:
                    emit(image)
            else:
                await deploy_app(client, name, loaded, options, as_json=as_json)

    run(main)


async def deploy_app(
    client: ApiClient, name: str, loaded: Loaded, options: DeployOptions, *, as_json: bool = False
) -> None:
    """All of a deploy; a signal interrupts it in good order. Raises DeployFailed and other PantalaErrors."""
    async with interruptible():
        await _deploy(client, name, loaded, options, as_json=as_json)


async def _deploy(client: ApiClient, name: str, loaded: Loaded, options: DeployOptions, *, as_json: bool) -> None:
    from pantala.deploys import statics

    begun = time.monotonic()
    app = await client.app(name)
    folders = await statics.read_folders(loaded.path.parent, loaded.config.statics)
    image = options.image or loaded.config.build.image
    if image is None:
        image = await build_image(client, name, loaded, options)
    machines = await client.machines(name)
    config = loaded.config
    preview = make_plan(loaded, options, machines, image=image, metadata={})  # what is wrong with it makes no release
    if options.dry_run:
        if as_json:
            files = {prefix: sorted(folder.files) for prefix, folder in folders.items()}
            emit_json({"app": name, "image": image, "plan": preview.lines()} | ({"statics": files} if files else {}))
            return
        for prefix, folder in folders.items():
            emit(f"0. {len(folder.files)} file(s) of {folder.root} into the bucket, for {prefix}")
        for line in preview.lines():
            emit(line)
        return
    pushed = await statics.push_folders(client, name, config.statics, folders, say)
    try:
        release = await _release(client, app, loaded, options, machines, image=image, statics=pushed.statics)
    except BaseException:
        await statics.abandon(client, name, pushed.new)
        raise
    took = time.monotonic() - begun
    if as_json:
        emit_json({"app": name, "release": release.version, "image": image, "took_s": round(took, 3)})
    else:
        say(f"==> v{release.version} is live after {took:.1f} s")
        emit(f"https://{app.hostname}/")
    if folders or statics.served_from_buckets(machines):
        await statics.clean(client, name, say)


async def _release(
    client: ApiClient,
    app: App,
    loaded: Loaded,
    options: DeployOptions,
    machines: list[Machine],
    *,
    image: str,
    statics: tuple[Static, ...],
) -> Release:
    """A new release, carried out; the old version serves on where it fails."""
    from pantala.deploys.executor import Executor, Settings
    from pantala.wire.api import CreateReleaseRequest

    name, config = app.name, loaded.config
    release = await client.create_release(
        name,
        CreateReleaseRequest(
            image=image,
            definition=json.dumps(config.document, default=str),
            strategy=options.strategy or config.deploy.strategy,
        ),
    )
    metadata = {"fly_release_id": release.id, "fly_release_version": str(release.version)}
    plan = make_plan(loaded, options, machines, image=image, metadata=metadata, statics=statics)
    if app.status == "pending" and not machines and config.services:
        await give_addresses(client, name, options)
    say(f"==> Release v{release.version}: {len(plan.waves)} step(s)")
    settings = Settings(
        wait_timeout_s=options.wait_timeout_s or config.deploy.wait_timeout_s,
        smoke_checks=options.smoke_checks,
        rollback=options.rollback,
    )
    await Executor(client, name, release, settings=settings, say=say).run(plan, machines)
    return release


async def give_addresses(client: ApiClient, name: str, options: DeployOptions) -> None:
    """A first deploy: what the pools have, unless the app has addresses. Without them edges find it by its name."""
    from pantala.wire.addresses import AddressType, AllocateRequest

    wanted: list[AddressType] = ["private_v6"] if options.flycast else ["v6", "shared_v4"] if options.public_ips else []
    if not wanted or await client.addresses(name):
        return
    for kind in wanted:
        try:
            given = await client.allocate_address(name, AllocateRequest(type=kind))
            say(f"    address {given.ip}{' (shared)' if given.shared else ''}")
        except (UserError, CapacityError) as error:
            say(f"    no address: {error.message}")


def load_checked(directory: Path, config_path: str | None, *, strict: bool) -> Loaded:
    """The directory's fly.toml; warnings are shown, errors raised."""
    from pantala.appconfig.load import find_config, load

    path = find_config(directory, config_path)
    if path is None:
        raise InvalidRequest(
            f"there is no fly.toml in {directory.resolve()}", hint="run `pantala launch` to create the app"
        )
    loaded = load(path)
    errors = [f for f in loaded.findings if f.level == "error" or (strict and f.unknown)]
    for finding in loaded.findings:
        if finding not in errors:
            say(f"warning: {finding.text(path.name)}")
    if errors:
        raise InvalidRequest("\n".join(["App configuration is not valid", *(f"  {e.text(path.name)}" for e in errors)]))
    return loaded


def make_plan(
    loaded: Loaded,
    options: DeployOptions,
    machines: list[Machine],
    *,
    image: str,
    metadata: dict[str, str],
    statics: tuple[Static, ...] | None = None,
) -> Plan:
    """`statics`: where the files are now that fly.toml names by a folder of the project."""
    from pantala.appconfig.machines import machine_config, release_command_config
    from pantala.planner.deploy import ReleaseCommand, Wanted, group_of, plan_deploy

    config = loaded.config if statics is None else msgspec.structs.replace(loaded.config, statics=statics)
    region = options.region or config.primary_region or (machines[0].region if machines else "")
    wanted: list[Wanted] = []
    for group in config.groups():
        present = next((m for m in machines if group_of(m) == group and m.config), None)
        composed = machine_config(
            config,
            group,
            image=image,
            metadata=metadata,
            read_file=lambda path: (loaded.path.parent / path).read_bytes(),
            guest=present.config.guest if present and present.config else None,
        )
        if options.env:
            extra = pairs(options.env, "--env")
            composed = msgspec.structs.replace(composed, env=(composed.env or {}) | extra)
        wanted.append(Wanted(group=group, config=composed))
    command = None
    if config.deploy.release_command:
        base = next(w.config for w in wanted if w.group == config.default_group())
        command = ReleaseCommand(
            config=release_command_config(base, config.deploy.release_command),
            region=region,
            timeout_s=config.deploy.release_command_timeout_s,
        )
    return plan_deploy(
        machines=machines,
        wanted=wanted,
        primary_region=region,
        strategy=options.strategy or config.deploy.strategy,
        max_unavailable=(config.deploy.max_unavailable if options.max_unavailable is None else options.max_unavailable),
        high_availability=options.high_availability,
        release_command=command,
    )


async def build_image(client: ApiClient, name: str, loaded: Loaded, options: DeployOptions) -> str:
    """Build on the platform; the image with its digest. Raises UserError with the step that failed."""
    from pantala.builds import context, scanner
    from pantala.wire.api import BuildOptions

    root = loaded.path.parent
    build = loaded.config.build
    wanted = options.dockerfile or build.dockerfile
    dockerfile = (
        root / wanted
        if wanted
        else next((root / name for name in scanner.DOCKERFILES if (root / name).is_file()), root / "Dockerfile")
    )
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pantala-") as scratch:
        packed = Path(scratch) / "context.tar.gz"
        ignorefile = root / build.ignorefile if build.ignorefile else None
        inside = context.pack(root, packed, dockerfile=dockerfile, ignorefile=ignorefile)
        say(f"==> Building {name} ({packed.stat().st_size / 1024:.0f} KiB of source)")
        request = BuildOptions(
            dockerfile=inside,
            target=options.build_target or build.target,
            args=build.args | pairs(options.build_args, "--build-arg"),
            no_cache=options.no_cache,
        )
        async for event in client.build(name, packed, request):
            if event.type == "step":
                say(f"    {event.text}" + (f"  {event.took_ms / 1000:.1f} s" if event.took_ms else ""))
            elif event.type == "log" and options.verbose:
                say(f"      {event.text}")
            elif event.type == "failed":
                raise UserError(f"the build failed:\n{event.text}")
            elif event.type == "done" and event.image:
                say(f"==> Built and pushed {event.image} in {time.monotonic() - begun:.1f} s")
                return f"{event.image}@{event.digest}"
    raise UserError("the build ended without an image", hint="try again; `pantala doctor` looks at the builder")


def _duration(text: str | None) -> float | None:
    from pantala.kit.units import parse_go_duration

    if text is None:
        return None
    try:
        return float(text) if text.isdigit() else parse_go_duration(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field="--wait-timeout") from error
