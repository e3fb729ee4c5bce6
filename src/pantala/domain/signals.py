"""Stop signals and their grace. Pure."""

from __future__ import annotations

import signal as _signal

from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest
from pantala.wire.machine import StopConfig

ALLOWED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGTERM")
DEFAULT_SIGNAL = int(_signal.SIGINT)
DEFAULT_TIMEOUT_S = 5.0
TIMEOUT_MAX_S = 300.0


def number(name: str, *, field: str) -> int:
    """The number of `SIGTERM`, `TERM` or `15`. Raises InvalidRequest naming `field`."""
    wanted = name.strip().upper()
    for allowed in ALLOWED:
        value = int(_signal.Signals[allowed])
        if wanted in (allowed, allowed.removeprefix("SIG"), str(value)):
            return value
    raise InvalidRequest(f"{name!r} is not one of {', '.join(ALLOWED)}", field=field)


SENDABLE = (
    "SIGABRT", "SIGALRM", "SIGFPE", "SIGHUP", "SIGILL", "SIGINT", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSEGV", "SIGTERM",
    "SIGTRAP", "SIGUSR1", "SIGUSR2",
)  # fmt: skip
"""What may be sent to a running app (`SignalRequest` of the Machines API)."""


def sendable(signal: str | int) -> int:
    """The number of `SIGHUP`, `HUP`, `1` or `"1"`. Raises InvalidRequest."""
    wanted = str(signal).strip().upper()
    for name in SENDABLE:
        value = int(_signal.Signals[name])
        if wanted in (name, name.removeprefix("SIG"), str(value)):
            return value
    raise InvalidRequest(f"{signal!r} is not one of {', '.join(SENDABLE)}, nor the number of one", field="signal")


def stop_signal(config: StopConfig | None, asked: str | None, image: str) -> int:
    """What the caller asked for, else the config's, else SIGINT; the image's own word counts only if it is allowed."""
    if asked:
        return number(asked, field="signal")
    if config is not None and config.signal:
        return number(config.signal, field="config.stop_config.signal")
    try:
        return number(image, field="image") if image else DEFAULT_SIGNAL
    except InvalidRequest:
        return DEFAULT_SIGNAL


def stop_timeout_s(config: StopConfig | None, asked_s: float | None) -> float:
    """Grace before the kill: what the caller asked for (0 means the config's), bounded."""
    if asked_s is not None and asked_s > 0:
        return min(asked_s, TIMEOUT_MAX_S)
    configured = config.timeout if config is not None else None
    return min(seconds(configured, field="config.stop_config.timeout", default=DEFAULT_TIMEOUT_S), TIMEOUT_MAX_S)
