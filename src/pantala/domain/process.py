"""Image and machine config to what PID 1 runs: argv, env, user, files (OCI rules, runtime environment). Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import msgspec

from pantala.domain.runtime import ImageConfig
from pantala.errors import InvalidRequest
from pantala.wire.guest import API_SOCKET, STATICS_PORT, GuestFile, GuestProcess, Start, StaticPath, Statics
from pantala.wire.machine import Container, EnvFrom, File, ImageRef, Init, MachineConfig, Process, SecretRef

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is told about itself."""

    app: str
    machine_id: str
    instance_id: str
    region: str
    image: ImageRef
    private_ip: str
    memory_mb: int


def argv(image: ImageConfig, init: Init | Process | Container | None, field: str = "config.init") -> list[str]:
    """`exec` replaces everything; `entrypoint` also drops the image's command, as `docker run` does."""
    if init is not None and init.exec:
        return list(init.exec)
    entrypoint = list(image.entrypoint)
    command = list(image.cmd)
    if init is not None and init.entrypoint is not None:
        entrypoint, command = list(init.entrypoint), []
    if init is not None and init.cmd is not None:
        command = list(init.cmd)
    if not entrypoint and not command:
        raise InvalidRequest("the image has no command; say what to run", field=f"{field}.cmd")
    return entrypoint + command


def image_name(image: ImageRef) -> str:
    name = f"{image.registry}/{image.repository}"
    if image.tag:
        name += f":{image.tag}"
    return f"{name}@{image.digest}" if image.digest and not image.tag else name


def process_group(metadata: Mapping[str, str] | None) -> str:
    """Of a machine with this metadata."""
    known = metadata or {}
    return known.get("fly_process_group") or known.get("process_group") or "app"


def environment(
    image: ImageConfig, config: MachineConfig, identity: Identity, secrets: Mapping[str, str]
) -> dict[str, str]:
    """The image's, then the config's, then secrets; what the platform says of the machine cannot be overridden."""
    defaults = {
        "PATH": DEFAULT_PATH,
        "FLY_PROCESS_GROUP": process_group(config.metadata),
        "PRIMARY_REGION": identity.region,
    }
    platform = {
        "FLY_APP_NAME": identity.app,
        "FLY_MACHINE_ID": identity.machine_id,
        "FLY_ALLOC_ID": identity.machine_id,
        "FLY_REGION": identity.region,
        "FLY_IMAGE_REF": image_name(identity.image),
        "FLY_MACHINE_VERSION": identity.instance_id,
        "FLY_PRIVATE_IP": identity.private_ip,
        "FLY_VM_MEMORY_MB": str(identity.memory_mb),
    }
    if config.standbys:
        platform["FLY_STANDBY_FOR"] = ",".join(config.standbys)
    return defaults | image.env | (config.env or {}) | dict(secrets) | platform


def beside(
    image: ImageConfig, config: MachineConfig, identity: Identity, secrets: Mapping[str, str]
) -> list[GuestProcess]:
    """What runs beside the app. A process has the app's environment, without its secrets if it ignores them."""
    made: list[GuestProcess] = []
    for index, process in enumerate(config.processes or []):
        field = f"config.processes[{index}]"
        given = {} if process.ignore_app_secrets else secrets
        env = environment(image, config, identity, given) | (process.env or {})
        env |= named_secrets(process.secrets or [], secrets, field) | fields(process.env_from or [], identity)
        made.append(
            GuestProcess(
                argv=argv(image, process, field), env=env, user=process.user or image.user, cwd=image.cwd or "/"
            )
        )
    return made


def named_secrets(wanted: list[SecretRef], secrets: Mapping[str, str], field: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, one in enumerate(wanted):
        name = one.name or one.env_var
        if name not in secrets:
            raise InvalidRequest(f"there is no secret {name!r}", field=f"{field}.secrets[{index}].name")
        found[one.env_var] = secrets[name]
    return found


def fields(wanted: list[EnvFrom], identity: Identity) -> dict[str, str]:
    known = {
        "id": identity.machine_id,
        "version": identity.instance_id,
        "app_name": identity.app,
        "private_ip": identity.private_ip,
        "region": identity.region,
        "image": image_name(identity.image),
    }
    return {one.env_var: known[one.field_ref] for one in wanted}


def files(given: Sequence[File], secrets: Mapping[str, str], where: str) -> list[GuestFile]:
    """Files of a config; a secret that holds one is base64 text."""
    out: list[GuestFile] = []
    for index, item in enumerate(given):
        field = f"{where}[{index}]"
        content = item.raw_value
        if item.secret_name is not None:
            if item.secret_name not in secrets:
                raise InvalidRequest(f"there is no secret {item.secret_name!r}", field=f"{field}.secret_name")
            content = secrets[item.secret_name]
        try:
            base64.b64decode(content or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest("is not base64", field=field) from error
        out.append(GuestFile(path=item.guest_path, content_base64=content or "", mode=item.mode or 0o644))
    return out


def statics(config: MachineConfig) -> Statics | None:
    """What init serves itself: all but what edges read from buckets. On IPv4 only: it is closed to all but the
    machine's host."""
    own = [one for one in config.statics or [] if not one.tigris_bucket]
    paths = [StaticPath(url_prefix=one.url_prefix, guest_path=one.guest_path) for one in own]
    return Statics(listen=f"0.0.0.0:{STATICS_PORT}", paths=paths) if paths else None


def start_message(image: ImageConfig, config: MachineConfig, identity: Identity, secrets: Mapping[str, str]) -> Start:
    """Everything PID 1 needs to run the app. Raises InvalidRequest naming what is missing."""
    return Start(
        argv=argv(image, config.init),
        env=environment(image, config, identity, secrets),
        user=image.user,
        cwd=image.cwd or "/",
        hostname=hostname(config, identity.machine_id),
        files=files(config.files or [], secrets, "config.files"),
        statics=statics(config),
        processes=beside(image, config, identity, secrets),
        api_socket=API_SOCKET,
    )


def hostname(config: MachineConfig, machine_id: str) -> str:
    return (config.dns.hostname if config.dns else None) or machine_id


def hosts_file(machine_id: str, *, ip4: str, private_ip: str, host: str) -> str:
    """`fly-global-services` is where a UDP service binds, so that it answers from the address it was asked at."""
    return (
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        f"{ip4}\tfly-global-services\n{private_ip}\tfly-local-6pn\n"
        f"{private_ip}\t{host}{f' {machine_id}' if host != machine_id else ''}\n"
    )


def resolv_conf(nameserver: str, searches: list[str] | None) -> str:
    search = f"search {' '.join(searches)}\n" if searches else ""
    return f"nameserver {nameserver}\n{search}options ndots:1\n"
