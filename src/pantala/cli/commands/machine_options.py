"""What a machine's flags say, in the spellings of flyctl: ports with their handlers, files, a whole config. Pure but
for the files that are named."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import msgspec
from msgspec.structs import replace

from pantala.errors import InvalidRequest
from pantala.wire.machine import File, MachineConfig, Port, Service

PROTOCOLS = ("tcp", "udp")
PORT_SYNTAX = "PORT[:INTERNAL][/PROTOCOL[:HANDLER[:HANDLER]]], such as 443:8080/tcp:http:tls"

_MIB = {"": 1, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024}


class BareFlags(click.Command):
    """`--autostop` alone means `--autostop=stop`; a value goes with it only by `=`, as clients spell it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = ["--autostop=stop" if word == "--autostop" else word for word in args[:end]]
        return super().parse_args(ctx, [*given, *args[end:]])


def services(ports: Iterable[str], *, autostop: str, autostart: bool) -> list[Service]:
    """One service for each port inside and protocol, with all its ports outside. Raises InvalidRequest."""
    made: dict[tuple[int, str], Service] = {}
    for text in commas(ports):
        inside, protocol, port = _port(text)
        known = made.get((inside, protocol)) or Service(
            protocol=protocol, internal_port=inside, ports=[], autostop=autostop, autostart=autostart
        )
        made[inside, protocol] = replace(known, ports=[*(known.ports or []), port])
    return list(made.values())


def commas(values: Iterable[str]) -> list[str]:
    """`a,b` and `a` `b` are the same."""
    return [word for value in values for word in value.split(",") if word]


def _port(text: str) -> tuple[int, str, Port]:
    """`443:8080/tcp:http:tls`, `80/tcp`, `6000-6010:53/udp`; without protocol `443:8080/http+tls`, too."""
    numbers, _, rest = text.partition("/")
    outside, _, inside = numbers.partition(":")
    first, _, last = outside.partition("-")
    if not all(number.isdigit() for number in (first, last or first, inside or first)):
        raise InvalidRequest(f"{text!r} is not {PORT_SYNTAX}", field="--port")
    words = [word for word in rest.replace("+", ":").split(":") if word]
    protocol = words.pop(0) if words and words[0] in PROTOCOLS else "tcp"
    port = Port(start_port=int(first), end_port=int(last)) if last else Port(port=int(first))
    return int(inside or first), protocol, replace(port, handlers=words)


def files(*, local: Sequence[str], literal: Sequence[str], secret: Sequence[str]) -> list[File]:
    """PATH=WHAT each. Raises InvalidRequest naming the flag."""
    made = [File(guest_path=path, raw_value=_base64(_read(value))) for path, value in _named(local, "--file-local")]
    made += [
        File(guest_path=path, raw_value=_base64(value.encode())) for path, value in _named(literal, "--file-literal")
    ]
    return made + [File(guest_path=path, secret_name=value) for path, value in _named(secret, "--file-secret")]


def _named(values: Sequence[str], flag: str) -> list[tuple[str, str]]:
    found = [value.partition("=") for value in values]
    if bad := [path for path, equals, value in found if not (path.startswith("/") and equals and value)]:
        raise InvalidRequest(f"{bad[0]!r}: must be /PATH/IN/MACHINE=VALUE", field=flag)
    return [(path, value) for path, _, value in found]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="--file-local") from error


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def machine_config(given: str | None) -> MachineConfig:
    """A JSON document or the path of one. Raises InvalidRequest."""
    if not given:
        return MachineConfig()
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text()
        return msgspec.json.decode(text, type=MachineConfig)
    except OSError as error:
        raise InvalidRequest(f"{given} cannot be read: {error.strerror}", field="--machine-config") from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(str(error), field="--machine-config") from error


class Size(click.ParamType[int]):
    """MiB of `512`, `512mb` or `1gb`."""

    name = "size"

    def __init__(self, bare: str = "mb") -> None:
        self.bare = bare

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)\s*([a-z]*)", str(value).strip().lower())
        if found is None or found[2] not in _MIB or not int(found[1]):
            self.fail(f"{value!r} is not a size such as 512, 512mb or 1gb", param, ctx)
        return int(found[1]) * _MIB[found[2] or self.bare]
