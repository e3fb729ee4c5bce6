"""The commands that run on a server itself: `pantala host init`, `join`, `run` and `leave`. Loaded by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import confirm, json_option, yes_option
from pantala.errors import Conflict, InvalidRequest, NotFound
from pantala.host import first, systemd, tunnels
from pantala.host.identity import join_request, keep
from pantala.host.join import ask, decode_token, own_address
from pantala.host.outside import resolvers
from pantala.host.place import Place
from pantala.host.record import ROOT, RUN, HostRecord, load_record, save_record
from pantala.host.settings import Tuning, promised, read_buckets
from pantala.host.stop import stop_processes, sweep_machines
from pantala.host.supervisor import is_supervisor, read_status, replace_running, save_processes

TOOLS = ("ip", "nft", "nsenter", "crun", "runc", "mkfs.ext4", "wg")

root_option = click.option(
    "--state", "root", type=click.Path(path_type=Path), default=ROOT, show_default=True, metavar="DIR",
    envvar="PANTALA_HOST_STATE", help="What this host keeps.",
)  # fmt: skip
run_option = click.option(
    "--run", "run_dir", type=click.Path(path_type=Path), default=RUN, envvar="PANTALA_HOST_RUN", hidden=True
)
cgroup_option = click.option("--cgroup", default="", envvar="PANTALA_HOST_CGROUP", hidden=True)
buckets_option = click.option(
    "--buckets", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="JSON: the S3-compatible store that deploys put statics into and edges read them from.",
)  # fmt: skip
cpus_option = click.option(
    "--cpus", type=click.IntRange(min=1), metavar="N",
    help="CPUs that a host may promise to machines; default those it has. A shared CPU is a sixteenth of one.",
)  # fmt: skip
memory_option = click.option(
    "--memory", "memory_mib", type=click.IntRange(min=256), metavar="MIB",
    help="Memory that a host may promise to machines; default nine tenths of its own.",
)  # fmt: skip
systemd_option = click.option(
    "--systemd/--no-systemd", "use_systemd", default=None, help="Run as systemd units; default where systemd runs."
)


@click.command()
@click.option("--address", required=True, metavar="IP", help="Of this server, where other hosts and clients reach it.")
@click.option("--region", required=True, metavar="CODE", help="Where it is, such as iad.")
@click.option("--domain", required=True, metavar="NAME", help="api.NAME is the API, APP.apps.NAME an app.")
@click.option("--zone", default="", metavar="NAME", help="What fails together, such as a data centre.")
@click.option("--email", default="", help="Of the first user; default admin@DOMAIN.")
@click.option("-o", "--org", default="personal", show_default=True)
@click.option("--acme-directory", default="", metavar="URL", help="Of the authority that signs for users' host names.")
@click.option("--acme-email", default="", help="Where that authority writes to; default --email.")
@click.option("--acme-ca", default="", metavar="PATH", help="PEM of who signs for the directory, if not a usual one.")
@click.option("--acme-eab-kid", default="", metavar="ID", help="Of your account there, if that authority wants one.")
@click.option("--acme-eab-key", type=click.Path(exists=True, dir_okay=False, resolve_path=True), default=None,
              metavar="PATH", help="File with that account's HMAC key, as it gave it.")  # fmt: skip
@click.option("--pool-v4", multiple=True, metavar="PREFIX", help="Routed to all edges: IPv4 addresses of single apps.")
@click.option("--pool-v6", multiple=True, metavar="PREFIX", help="The same by IPv6.")
@cpus_option
@memory_option
@buckets_option
@systemd_option
@root_option
@run_option
@cgroup_option
@json_option
def init(
    *,
    address: str,
    region: str,
    domain: str,
    zone: str,
    email: str,
    org: str,
    acme_directory: str,
    acme_email: str,
    acme_ca: str,
    acme_eab_kid: str,
    acme_eab_key: str | None,
    pool_v4: tuple[str, ...],
    pool_v6: tuple[str, ...],
    cpus: int | None,
    memory_mib: int | None,
    buckets: Path | None,
    use_systemd: bool | None,
    root: Path,
    run_dir: Path,
    cgroup: str,
    as_json: bool,
) -> None:
    """Make this server the first host of a new platform, with its control plane."""
    check_server(root, [*TOOLS, "docker-registry"])
    if bool(acme_eab_kid) != bool(acme_eab_key):
        raise InvalidRequest("go together: give both or none", field="--acme-eab-kid and --acme-eab-key")
    supervised = _supervised(use_systemd)
    email = email or f"admin@{domain}"
    place = _place(root, run_dir, address=address, edge=True, cgroup=cgroup, supervised=supervised)
    record, made = first.set_up(
        root,
        place,
        region=region,
        zone=zone,
        domain=domain,
        email=email,
        org=org,
        systemd=supervised,
        proxy=read_buckets(buckets),
        agent=promised(cpus, memory_mib),
        server={
            "acme_directory": acme_directory,
            "acme_email": acme_email or email,
            "acme_ca_file": acme_ca,
            "acme_eab_kid": acme_eab_kid,
            "acme_eab_key_file": acme_eab_key or "",
            "pools": {"shared_v4": [address] if ":" not in address else [], "v4": pool_v4, "v6": pool_v6},
        },
    )
    save_record(record)
    first.log_in(record, made)
    say(f"==> This is {made.hosts[0].node}, the first host of {domain}; you are logged in as {email}")
    _start(record)
    say(
        f"\nPoint the names api.{domain}, registry.{domain} and *.apps.{domain} to {address}.\n"
        f"Certificates are signed by {made.ca}.\n"
        "The next host: `pantala host token --region CODE` here, then the line that it prints there."
    )
    if as_json:
        emit_json({"node": made.hosts[0].node, "domain": domain, "email": email, "ca_file": made.ca})


@click.command()
@click.argument("token", metavar="TOKEN")
@click.option("--region", default="", metavar="CODE", help="Where this host is; not needed if the token says it.")
@click.option("--address", default="", metavar="IP", help="Where other hosts reach it; default the way to the API.")
@click.option("--zone", default="", metavar="NAME", help="What fails together, such as a data centre.")
@click.option("--edge/--no-edge", default=True, show_default=True, help="Take public traffic.")
@cpus_option
@memory_option
@buckets_option
@systemd_option
@root_option
@run_option
@cgroup_option
@json_option
def join(
    *,
    token: str,
    region: str,
    address: str,
    zone: str,
    edge: bool,
    cpus: int | None,
    memory_mib: int | None,
    buckets: Path | None,
    use_systemd: bool | None,
    root: Path,
    run_dir: Path,
    cgroup: str,
    as_json: bool,
) -> None:
    """Make this server a host of a platform: TOKEN is what `pantala host token` printed there."""
    text = decode_token(token)
    check_server(root, TOOLS)
    store = read_buckets(buckets)
    supervised = _supervised(use_systemd)
    place = _place(
        root,
        run_dir,
        address=address or own_address(text.address),
        edge=edge,
        cgroup=cgroup,
        supervised=supervised,
    )
    joined = ask(text, join_request(place, region=region, zone=zone, edge=edge, token=token.strip()))
    keep(place, joined)
    tuning = Tuning(resolvers=resolvers(loopback=True), proxy=store, agent=promised(cpus, memory_mib))
    record = HostRecord(root=str(root), place=place, tuning=tuning, systemd=supervised)
    save_record(record)
    if as_json:
        emit_json({"node": joined.node, "domain": joined.platform_domain, "region": joined.region})
    else:
        emit(joined.node)
    say(f"==> This host is {joined.node} of {joined.platform_domain}, in {joined.region}")
    _start(record)


@click.command()
@root_option
def run(*, root: Path) -> None:
    """Run this host's processes in the foreground, until SIGTERM; its machines go on."""
    record = _record(root)
    if record.systemd:
        raise Conflict("systemd runs this host's processes", hint="`systemctl status pantala.target` shows them")
    status = read_status(record.root_dir)
    if status is not None and is_supervisor(status.supervisor):
        raise Conflict(f"this host's processes run already, under pid {status.supervisor}")
    if status is not None:
        stop_processes(status)  # of a supervisor that was killed
    if record.first is not None:
        record.first.builds.raise_network()
    save_processes(record.root_dir, record.processes())
    sys.stdout.flush()
    command = [sys.executable, "-m", "pantala.host.supervisor", str(record.root_dir)]
    os.execv(sys.executable, command)  # noqa: S606 - a list without a shell, by the path of this Python


@click.command()
@root_option
@json_option
def replace(*, root: Path, as_json: bool) -> None:
    """Put a new process in the place of this host's running proxy, as after an upgrade; no request is lost."""
    record = _record(root)
    if record.systemd:
        systemd.write(_units(record))  # those of an older version know no such reload
        systemd.reload("proxy")
    else:
        status = read_status(record.root_dir)
        if status is None or not is_supervisor(status.supervisor):
            raise Conflict("this host's processes do not run", hint="`pantala host run` starts them")
        replace_running(record.root_dir, [process.name for process in record.processes() if process.replace])
    say("==> A new proxy serves; the one before it ends when its last connection does")
    if as_json:
        emit_json({"replaced": True})


@click.command()
@yes_option
@root_option
@json_option
def leave(*, root: Path, yes: bool, as_json: bool) -> None:
    """Take the platform off this server: processes, machines and all that they keep here."""
    record = _record(root)
    what = "the control plane and all apps of this platform" if record.first else "its machines and their volumes"
    confirm(f"Remove this host from this server, with {what}?", yes=yes)
    if record.systemd:
        systemd.remove()
    status = read_status(record.root_dir)
    if status is not None:
        stop_processes(status)
    sweep_machines(record.place, leave=True)
    if record.first is not None:
        record.first.builds.lower_network()
    for path in (record.place.run_dir, record.root_dir):
        shutil.rmtree(path, ignore_errors=True)
    say("==> Nothing of the platform is left here; there, `pantala host remove` forgets this host")
    if as_json:
        emit_json({"left": True})


def check_server(root: Path, tools: list[str] | tuple[str, ...]) -> None:
    """Raises before anything is changed."""
    if os.geteuid() != 0:
        raise InvalidRequest("a host needs root: namespaces, mounts and control groups", hint="run it with sudo")
    if missing := [name for name in tools if shutil.which(name) is None]:
        raise InvalidRequest(f"not installed: {', '.join(missing)}", hint="run scripts/install")
    if load_record(root) is not None:
        raise Conflict(
            f"this server is a host already: {root}/host.json", hint="`pantala host leave` takes it off this server"
        )


def _place(root: Path, run_dir: Path, *, address: str, edge: bool, cgroup: str, supervised: bool) -> Place:
    return Place(
        state=str(root / "host"),
        run=str(run_dir),
        logs=str(root / "logs"),
        address=address,
        listen=[address] if edge else [],
        cgroup_root=cgroup or (systemd.MACHINES_CGROUP if supervised else "pantala"),
        agent=tunnels.agent_fields(),
    )


def _supervised(wanted: bool | None) -> bool:
    """By systemd. Raises InvalidRequest where it is wanted and not there."""
    if wanted and not systemd.is_running():
        raise InvalidRequest("systemd does not run here", field="--systemd")
    return systemd.is_running() if wanted is None else wanted


def _record(root: Path) -> HostRecord:
    record = load_record(root)
    if record is None:
        raise NotFound(f"this server is no host: there is no {root}/host.json", hint="`pantala host join TOKEN`")
    return record


def _start(record: HostRecord) -> None:
    if not record.systemd:
        record.processes()
        say(f"==> Start it with: pantala host run{'' if record.root_dir == ROOT else f' --state {record.root}'}")
        return
    systemd.install(_units(record))
    say("==> Its processes run: systemctl status pantala.target")


def _units(record: HostRecord) -> dict[str, str]:
    builds = record.first.builds.setup_command() if record.first is not None else []
    return systemd.units(record.processes(), before_builds=builds)
