"""What any program of a machine is given, an app, a process or a container: variables, files, restart, stop. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pantala.domain import restart, signals
from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest
from pantala.wire.machine import EnvFrom, File, Restart, SecretRef, StopConfig

ENV_BYTES_MAX = 512 * 1024
FILES_BYTES_MAX = 1024 * 1024


def check_restart(given: Restart | None, field: str) -> None:
    if given is None:
        return
    if given.policy not in (None, "", *restart.POLICIES):
        raise InvalidRequest(f"{given.policy!r} is not one of {', '.join(restart.POLICIES)}", field=f"{field}.policy")
    if given.max_retries is not None and given.max_retries < 0:
        raise InvalidRequest("cannot be negative", field=f"{field}.max_retries")


def check_stop(given: StopConfig | None, field: str) -> None:
    if given is None:
        return
    if given.signal:
        signals.number(given.signal, field=f"{field}.signal")
    if seconds(given.timeout, field=f"{field}.timeout", default=5.0) > signals.TIMEOUT_MAX_S:
        raise InvalidRequest(f"is above {signals.TIMEOUT_MAX_S:g}s", field=f"{field}.timeout")


def check_variables(env: Mapping[str, str], field: str) -> None:
    total = 0
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidRequest(f"{name!r} is not a variable name", field=field)
        if "\0" in value:
            raise InvalidRequest("contains a NUL byte", field=f"{field}.{name}")
        total += len(name) + len(value)
    if total > ENV_BYTES_MAX:
        raise InvalidRequest(f"{total} bytes; at most {ENV_BYTES_MAX}", field=field)


def check_own_variables(
    env: Mapping[str, str] | None, secrets: Sequence[SecretRef] | None, env_from: Sequence[EnvFrom] | None, field: str
) -> None:
    """Of a process or a container."""
    check_variables(env or {}, f"{field}.env")
    check_variables({one.env_var: "" for one in secrets or []}, f"{field}.secrets")
    check_variables({one.env_var: "" for one in env_from or []}, f"{field}.env_from")


def check_files(files: Sequence[File] | None, field: str) -> None:
    total = 0
    for index, item in enumerate(files or []):
        here = f"{field}[{index}]"
        if not item.guest_path.startswith("/") or ".." in item.guest_path.split("/"):
            raise InvalidRequest(f"{item.guest_path!r} is not an absolute path", field=f"{here}.guest_path")
        if (item.raw_value is None) == (item.secret_name is None):
            raise InvalidRequest("give raw_value or secret_name", field=here)
        total += len(item.raw_value or "")
    if total > FILES_BYTES_MAX:
        raise InvalidRequest(f"{total} bytes; at most {FILES_BYTES_MAX}", field=field)
