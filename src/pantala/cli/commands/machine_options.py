"""What a machine's flags say, in the spellings of flyctl: ports with their handlers, files, a whole config. Pure but
for the files that are named."""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import msgspec.inspect
from msgspec.structs import replace

from pantala.cli.output import say
from pantala.errors import InvalidRequest
from pantala.wire.machine import File, MachineConfig, Port, Service

F = TypeVar("F", bound=Callable[..., Any])
PROTOCOLS = ("tcp", "udp")
PORT_SYNTAX = "PORT[:INTERNAL][/PROTOCOL[:HANDLER[:HANDLER]]], such as 443:8080/tcp:http:tls"
PORT_HELP = "443:8080/tcp:http:tls, 5432/tcp:pg_tls, 6000-6010:53/udp; 80:8080/tcp:- removes one."

_MIB = {"": 1, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024}


class BareFlags(click.Command):
    """`--autostop` alone means `--autostop=stop`; a value goes with it only by `=`, as clients spell it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = ["--autostop=stop" if word == "--autostop" else word for word in args[:end]]
        return super().parse_args(ctx, [*given, *args[end:]])


REMOVED = ["-"]
"""The handler of a port that is to be no more, as clients spell it: `80/tcp:-`."""


def services(
    ports: Iterable[str], known: Iterable[Service] = (), *, autostop: str | None = None, autostart: bool | None = None
) -> list[Service]:
    """The `known` ones with these ports: one service for each port inside and protocol, with all its ports outside. A
    port that is there is replaced; a service that has none left goes. Raises InvalidRequest."""
    made = {(one.internal_port, one.protocol): one for one in known}
    for text in commas(ports):
        inside, protocol, port = _port(text)
        service = made.get((inside, protocol))
        if service is None:
            service = Service(protocol=protocol, internal_port=inside, ports=[], autostop=autostop, autostart=autostart)
        others = [one for one in service.ports or [] if _outside(one) != _outside(port)]
        if port.handlers != REMOVED:
            made[inside, protocol] = replace(service, ports=[*others, port])
        elif len(others) == len(service.ports or []):
            raise InvalidRequest(f"{text!r}: there is no such port to remove", field="--port")
        elif others:
            made[inside, protocol] = replace(service, ports=others)
        else:
            del made[inside, protocol]
    return list(made.values())


def _outside(port: Port) -> tuple[int | None, int | None, int | None]:
    return port.port, port.start_port, port.end_port


def with_files(known: Iterable[File], given: Iterable[File]) -> list[File]:
    """One for each path; the later one counts."""
    return list({one.guest_path: one for one in (*known, *given)}.values())


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


def machine_config(given: str | None, *, strict: bool = False) -> MachineConfig:
    """A JSON document or the path of one. What of it nobody reads is warned of, or refused if `strict`. Raises
    InvalidRequest."""
    if not given:
        return MachineConfig()
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text()
        config = msgspec.json.decode(text, type=MachineConfig)
        unknown = unknown_fields(msgspec.json.decode(text), MachineConfig)
    except OSError as error:
        raise InvalidRequest(f"{given} cannot be read: {error.strerror}", field="--machine-config") from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(str(error), field="--machine-config") from error
    if unknown and strict:
        raise InvalidRequest("\n".join(unknown), field="--machine-config")
    for finding in unknown:
        say(f"warning: --machine-config: {finding}")
    return config


def unknown_fields(document: Any, wanted: type) -> list[str]:
    """Sentences about fields that no type of the config has, each with its path and the nearest name."""
    return list(_unknown(document, msgspec.inspect.type_info(wanted), ""))


def _unknown(value: Any, kind: msgspec.inspect.Type, path: str) -> Iterator[str]:
    match kind:
        case msgspec.inspect.UnionType(types=types):
            shape = next((one for one in types if isinstance(value, _SHAPES.get(type(one), ()))), None)
            if shape is not None:
                yield from _unknown(value, shape, path)
        case msgspec.inspect.ListType(item_type=inner) if isinstance(value, list):
            for index, item in enumerate(value):
                yield from _unknown(item, inner, f"{path}[{index}]")
        case msgspec.inspect.DictType(value_type=inner) if isinstance(value, dict):
            for key, item in value.items():
                yield from _unknown(item, inner, f"{path}.{key}" if path else key)
        case msgspec.inspect.StructType(fields=fields) if isinstance(value, dict):
            known = {field.encode_name: field.type for field in fields}
            for key, item in value.items():
                field = f"{path}.{key}" if path else key
                if key in known:
                    yield from _unknown(item, known[key], field)
                else:
                    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                    yield f"{field}: unknown field, not used" + (f"; did you mean {near[0]}?" if near else "")
        case _:
            pass  # what has no fields


_SHAPES: dict[type, type] = {
    msgspec.inspect.StructType: dict,
    msgspec.inspect.DictType: dict,
    msgspec.inspect.ListType: list,
}


def file_options(command: F) -> F:
    """`--file-local`, `--file-literal`, `--file-secret`."""
    for option in (
        click.option(
            "--file-secret", multiple=True, metavar="/PATH=SECRET", help="A file that a secret holds in base64."
        ),
        click.option("--file-literal", multiple=True, metavar="/PATH=TEXT", help="A file with this text."),
        click.option("--file-local", multiple=True, metavar="/PATH=FILE", help="A file of yours, in the machine."),
    ):
        command = option(command)
    return command


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
